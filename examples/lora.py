"""Fine-tuning with low-rank adapters: a small decoder whose own weights are frozen and only the adapters learn.

tpplan suggest examples/lora.py --gpus 8
tpplan suggest examples/lora.py --gpus 4 --hardware cpu-gloo --model-arg n_layer=4 --model-arg n_embd=128
"""

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices, scale * B A x."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))  # starts as the base alone
        nn.init.normal_(self.lora_a, std=rank**-0.5)
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


class Rotary(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position."""

    def __init__(self, head_dim, block_size):
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(block_size).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x):
        cos, sin = self.cos[: x.size(-2)].to(x.dtype), self.sin[: x.size(-2)].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.rotary = Rotary(n_embd // n_head, block_size)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            proj(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.up_proj = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.attention_norm = nn.RMSNorm(n_embd, eps=1e-6)
        self.attention = Attention(n_embd, n_head, block_size)
        self.mlp_norm = nn.RMSNorm(n_embd, eps=1e-6)
        self.mlp = FeedForward(n_embd)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, vocab_size, n_layer, n_head, n_embd, block_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.layers = nn.ModuleList(Layer(n_embd, n_head, block_size) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd, eps=1e-6)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def add_adapters(model, names, rank, alpha):
    """Freeze `model` and put an adapter on every linear layer whose last name is in `names`."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    return model


def build_model(vocab_size=32000, n_layer=12, n_head=12, n_embd=768, block_size=2048, rank=8, alpha=16.0):
    model = Decoder(vocab_size, n_layer, n_head, n_embd, block_size)
    return add_adapters(model, ("q_proj", "k_proj", "v_proj", "o_proj"), rank, alpha)


def example_inputs(batch, seq, model):
    tokens = torch.randint(0, model.vocab_size, (batch, seq + 1))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def loss_fn(output, inputs, num_items_in_batch=None):
    """Cross entropy over the labels that are not -100: their mean, or their sum over a given number."""
    labels = inputs["labels"].view(-1)
    if num_items_in_batch is None:
        return F.cross_entropy(output.view(-1, output.size(-1)), labels)
    return F.cross_entropy(output.view(-1, output.size(-1)), labels, reduction="sum") / num_items_in_batch
