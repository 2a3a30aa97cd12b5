"""Models in odd styles that people really write: shared layers, modules called twice, custom autograd Functions, dict
inputs, keyword-only inputs, in-place operators, buffers updated in forward, data-dependent control flow, outputs that
are no tensors. One factory a style; all take `dim` and `layers`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 16000


class Block(nn.Module):
    """A plain pre-norm block with separate projections."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (m(y).view(b, s, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SharedDepth(nn.Module):
    """One block, run `layers` times (a universal transformer)."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.layers = layers
        self.embed = nn.Embedding(VOCAB, dim)
        self.step = nn.Embedding(layers, dim)
        self.block = Block(dim, heads)
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for i in range(self.layers):
            x = self.block(x + self.step.weight[i])
        return self.head(x)


class Siamese(nn.Module):
    """An encoder called twice, on a pair of texts, and a metric between the two."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.encoder = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.compare = nn.Bilinear(dim, dim, 2) if dim <= 64 else nn.Linear(2 * dim, 2)

    def encode(self, ids):
        return self.encoder(self.embed(ids)).mean(1)

    def forward(self, first, second):
        a, b = self.encode(first), self.encode(second)
        return self.compare(a, b) if isinstance(self.compare, nn.Bilinear) else self.compare(torch.cat([a, b], -1))


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 that keeps only its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0).square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.clamp(min=0) * grad


class LinearFunction(torch.autograd.Function):
    """The linear layer of torch's own tutorial."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x.matmul(weight.t()) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad.matmul(weight), flat.t().matmul(x.flatten(0, -2)), flat.sum(0)


class CustomLinear(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into) * into**-0.5)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias)


class CustomFunctions(nn.Module):
    """Residual MLPs whose layers are custom autograd Functions."""

    def __init__(self, dim, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.ups = nn.ModuleList(CustomLinear(dim, 4 * dim) for _ in range(layers))
        self.downs = nn.ModuleList(CustomLinear(4 * dim, dim) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(SquaredReLU.apply(up(norm(x))))
        return self.head(x)


@dataclass
class Prediction:
    """An output that is a plain dataclass."""

    logits: torch.Tensor
    hidden: list
    depth: int


class DictInput(nn.Module):
    """A dict goes in, a dataclass comes out; dropout with a python number, a list of hidden states."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, batch):
        x = self.embed(batch["ids"]) * batch["weights"].unsqueeze(-1)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x.detach().mean())
        return Prediction(self.head(x), hidden, len(self.blocks))


class KeywordOnly(nn.Module):
    """Inputs by keyword only, an optional one among them; a tuple with a string and None comes out."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, *, ids, bias=None, verbose=False):
        x = self.embed(ids)
        if bias is not None:
            x = x + bias
        for block in self.blocks:
            x = block(x)
        return "logits", self.head(self.norm(x)), None


class InPlace(nn.Module):
    """In-place operators wherever they are legal: add_, mul_, masked_fill_, slices written to."""

    def __init__(self, dim, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.ups = nn.ModuleList(nn.Linear(dim, 4 * dim) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(4 * dim, dim) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        shifted = torch.zeros_like(x)
        shifted[:, 1:] = x[:, :-1]
        x = x + shifted
        x.masked_fill_((ids == 0).unsqueeze(-1), 0.0)
        for up, down in zip(self.ups, self.downs, strict=True):
            y = down(F.relu(up(x), inplace=True))
            y.mul_(0.5).add_(x)
            x = y
        return self.head(x)


class MovingCodebook(nn.Module):
    """Buffers updated in forward: a running mean and a step count, outside of any BatchNorm."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, ids):
        x = self.embed(ids)
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.99).add_(x.detach().mean((0, 1)).to(self.centre.dtype), alpha=0.01)
                self.steps += 1
        x = x - self.centre.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class EarlyExit(nn.Module):
    """Data-dependent control flow: how often the last block runs depends on the length of the longest text."""

    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim, padding_idx=0)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        longest = int((ids != 0).sum(1).max().item())
        x = self.embed(ids[:, :longest])
        for block in self.blocks:
            x = block(x)
        if x.float().abs().mean().item() > 1e6:
            x = torch.tanh(x)
        return F.pad(self.head(x), (0, 0, 0, ids.size(1) - longest))


class Router(nn.Module):
    """A mixture of experts as a loop: every expert takes the tokens that chose it (nonzero, index_add)."""

    def __init__(self, dim, experts):
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(experts)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(-1)
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(x)


class LoopedExperts(nn.Module):
    def __init__(self, dim, layers, experts=4):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.experts = nn.ModuleList(Router(dim, experts) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for norm, experts in zip(self.norms, self.experts, strict=True):
            x = x + experts(norm(x))
        return self.head(x)


def shared_depth(dim=2048, heads=16, layers=12):
    return SharedDepth(dim, heads, layers)


def siamese(dim=1024, heads=16, layers=12):
    return Siamese(dim, heads, layers)


def custom_functions(dim=1024, layers=12):
    return CustomFunctions(dim, layers)


def dict_input(dim=1024, heads=16, layers=12):
    return DictInput(dim, heads, layers)


def keyword_only(dim=1024, heads=16, layers=12):
    return KeywordOnly(dim, heads, layers)


def in_place(dim=1024, layers=12):
    return InPlace(dim, layers)


def moving_buffers(dim=1024, heads=16, layers=12):
    return MovingCodebook(dim, heads, layers)


def early_exit(dim=1024, heads=16, layers=12):
    return EarlyExit(dim, heads, layers)


def looped_experts(dim=1024, layers=8, experts=4):
    return LoopedExperts(dim, layers, experts)


def example_inputs(batch, seq, model):
    ids = torch.randint(1, VOCAB, (batch, seq))
    if isinstance(model, Siamese):
        other = torch.randint(1, VOCAB, (batch, seq))
        return {"first": ids, "second": other, "labels": torch.randint(0, 2, (batch,))}
    if isinstance(model, DictInput):
        return {"batch": {"ids": ids, "weights": torch.rand(batch, seq)}, "labels": ids.clone()}
    return {"ids": ids, "labels": ids.clone()}


def loss_fn(output, inputs):
    if isinstance(output, Prediction):
        output = output.logits
    if isinstance(output, tuple):
        output = output[1]
    labels = inputs["labels"]
    return F.cross_entropy(output.flatten(0, -2).float(), labels.flatten())
