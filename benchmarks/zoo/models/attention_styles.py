"""Decoders in the styles that people write attention in: fused projections, einops-like reshapes, einsum, raw weights.

One factory a style. All take `vocab`, `dim`, `heads`, `layers`; the inputs are token ids and labels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def rearrange_heads(x, heads):
    """b s (h d) -> b h s d, as einops would."""
    b, s, width = x.shape
    return x.reshape(b, s, heads, width // heads).permute(0, 2, 1, 3)


class FusedBlock(nn.Module):
    """One projection for q, k and v, one for gate and up (SwiGLU), pre-norm."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        q, k, v = (rearrange_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GroupedFusedBlock(nn.Module):
    """q, k and v of unequal widths in one projection (grouped-query attention), split by sizes."""

    def __init__(self, dim, heads, hidden, groups=4):
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * groups) * self.width)
        self.proj = nn.Linear(dim, dim)
        self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        q, k, v = self.qkv(self.norm1(x)).split(sizes, dim=-1)
        q, k, v = rearrange_heads(q, self.heads), rearrange_heads(k, self.groups), rearrange_heads(v, self.groups)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.w2(F.gelu(self.w1(self.norm2(x))))


class EinsumBlock(nn.Module):
    """Weights with a heads dimension and einsum everywhere, softmax by hand."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        width = dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(dim, heads, width) * dim**-0.5) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, width, dim) * dim**-0.5)
        self.w1 = nn.Parameter(torch.randn(dim, hidden) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(hidden, dim) * hidden**-0.5)

    def forward(self, x, mask):
        y = self.norm1(x)
        q, k, v = (torch.einsum("bsd,dhk->bhsk", y, w) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bhqk,bhtk->bhqt", q, k) / math.sqrt(q.size(-1))
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        a = torch.einsum("bhqt,bhtk->bhqk", weights, v)
        x = x + torch.einsum("bhqk,hkd->bqd", a, self.wo)
        return x + torch.einsum("bsf,fd->bsd", F.gelu(torch.einsum("bsd,df->bsf", self.norm2(x), self.w1)), self.w2)


class RawBlock(nn.Module):
    """F.linear on raw parameters that lie in a ParameterDict and a ParameterList."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        weight = lambda out, into: nn.Parameter(torch.randn(out, into) * into**-0.5)  # noqa: E731
        self.attention = nn.ParameterDict({name: weight(dim, dim) for name in ("q", "k", "v", "o")})
        self.mlp = nn.ParameterList([weight(hidden, dim), weight(dim, hidden)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(dim)) for _ in range(2)])

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.scales[0])
        q, k, v = (rearrange_heads(F.linear(y, self.attention[name]), self.heads) for name in ("q", "k", "v"))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).flatten(2), self.attention["o"])
        y = F.rms_norm(x, x.shape[-1:], self.scales[1])
        return x + F.linear(F.relu(F.linear(y, self.mlp[0])).square(), self.mlp[1])


class Decoder(nn.Module):
    """Embedding, blocks, norm and a head tied to the embedding by the caller's wish."""

    def __init__(self, block, vocab, dim, layers, tied=False, longest=2048, masked=False):
        super().__init__()
        self.vocab, self.masked = vocab, masked
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.zeros(longest, dim))
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        x = self.embed(ids) + self.position[: ids.size(1)]
        extra = ()
        if self.masked:
            extra = (torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).triu(1),)
        for block in self.blocks:
            x = block(x, *extra)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def fused(vocab=32000, dim=1536, heads=12, layers=24, longest=2048):
    return Decoder(lambda: FusedBlock(dim, heads, 8 * dim // 3), vocab, dim, layers, longest=longest)


def grouped_fused(vocab=32000, dim=1024, heads=16, layers=24, groups=4, longest=2048):
    return Decoder(lambda: GroupedFusedBlock(dim, heads, 4 * dim, groups), vocab, dim, layers, longest=longest)


def einsum(vocab=32000, dim=1024, heads=16, layers=24, longest=2048):
    return Decoder(lambda: EinsumBlock(dim, heads, 4 * dim), vocab, dim, layers, masked=True, longest=longest)


def raw_parameters(vocab=32000, dim=1024, heads=16, layers=24, longest=2048):
    return Decoder(lambda: RawBlock(dim, heads, 4 * dim), vocab, dim, layers, longest=longest)


def tied_weights(vocab=50000, dim=1024, heads=16, layers=16, longest=2048):
    return Decoder(lambda: FusedBlock(dim, heads, 4 * dim), vocab, dim, layers, tied=True, longest=longest)


def example_inputs(batch, seq, model):
    ids = torch.randint(0, model.vocab, (batch, seq))
    return {"ids": ids, "labels": ids.clone()}
