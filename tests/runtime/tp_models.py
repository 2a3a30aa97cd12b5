"""Small models written the ways people write them, for the tensor-parallel tests."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend  # imported before anything is replaced

VOCAB, WIDTH, HEADS = 96, 64, 4


class ManualAttention(nn.Module):
    """Fused qkv cut by split, scores by hand with a mask buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (u.view(b, t, HEADS, c // HEADS).transpose(1, 2) for u in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(c // HEADS)
        weights = F.softmax(scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(b, t, c))


class UnboundAttention(nn.Module):
    """Fused qkv as timm writes it: reshape, permute, unbind; a learned bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH // HEADS)
        self.register_buffer("slopes", -torch.arange(1.0, HEADS + 1).view(1, HEADS, 1, 1) / 8, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        steps = torch.arange(t, dtype=x.dtype)
        bias = self.slopes.to(x.dtype) * (steps[:, None] - steps[None, :]).abs()
        y = attend(self.norm(q), self.norm(k), v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class RotaryAttention(nn.Module):
    """Grouped queries, complex rotary, heads repeated by expand, as Meta's own Llama."""

    def __init__(self, kv: int = 2) -> None:
        super().__init__()
        self.kv, self.d = kv, WIDTH // HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, kv * self.d, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (w(x).view(b, t, -1, self.d) for w in (self.wq, self.wk, self.wv))
        angles = torch.outer(torch.arange(t), 0.1 ** torch.arange(self.d // 2)).to(x.dtype)
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
        q, k = (
            torch.view_as_real(torch.view_as_complex(u.reshape(*u.shape[:-1], -1, 2)) * turn).flatten(3) for u in (q, k)
        )
        k, v = (u[:, :, :, None, :].expand(b, t, self.kv, HEADS // self.kv, self.d).flatten(2, 3) for u in (k, v))
        y = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))


class GateUp(nn.Module):
    """Gate and up in one projection, cut by chunk or by slices."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced
        self.both, self.down = nn.Linear(WIDTH, 2 * 96), nn.Linear(96, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.both(x)
        gate, up = (y[..., :96], y[..., 96:]) if self.sliced else y.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Product(nn.Linear):
    """A linear that multiplies by its transposed weight itself, as Falcon's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


class Transposed(nn.Sequential):
    """An MLP of such products."""

    def __init__(self) -> None:
        super().__init__(Product(WIDTH, 128, bias=False), nn.GELU(), Product(128, WIDTH, bias=False))


class Adapter(nn.Module):
    """A frozen linear and a low-rank learned one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


class ScaledEmbedding(nn.Embedding):
    """An embedding whose own forward does more, as Gemma's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 8.0


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH), mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    """Embedding with a padding token, blocks, a head with a bias."""

    def __init__(self, blocks: list[Block], embedding: nn.Embedding) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.wte, self.h = embedding, nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten(), ignore_index=-1)


def build_model(kind: str) -> Model:
    """One of the models: manual, unbound, rotary, one key, adapters."""
    embedding: nn.Embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
    blocks = []
    for _ in range(2):
        mlp: nn.Module = GateUp(sliced=kind == "unbound")
        attention: nn.Module = RotaryAttention()
        if kind == "manual":
            attention = ManualAttention()
        if kind == "unbound":
            attention, embedding = UnboundAttention(), ScaledEmbedding(VOCAB, WIDTH)
        if kind == "one key":
            attention, mlp = RotaryAttention(kv=1), Transposed()
        if kind == "adapters":
            attention = RotaryAttention(kv=4)
            for name in ("wq", "wv", "wo"):
                setattr(attention, name, Adapter(getattr(attention, name)))
        if kind in ("rotary", "adapters"):
            mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))
        blocks.append(Block(attention, mlp))
    return Model(blocks, embedding)


def example_inputs(batch: int, seq: int, model: Any) -> dict[str, torch.Tensor]:
    """Tokens that include the padding token and the first row of every later rank."""
    tokens = torch.randint(0, VOCAB, (batch, seq))
    tokens[:, :4] = torch.tensor([0, VOCAB // 2, VOCAB // 4, 3 * VOCAB // 4])
    labels = torch.randint(0, VOCAB, (batch, seq))
    labels[0, : seq // 3] = -1
    return {"tokens": tokens, "labels": labels}
