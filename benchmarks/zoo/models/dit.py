"""DiT-XL/2: 28 blocks, hidden 1152, 16 heads, patch 2 over a 4-channel latent; adaLN-zero; `seq` is its side."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim, heads, ratio=4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        s1, b1, g1, s2, b2, g2 = self.ada(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), s1, b1)
        n, t, d = h.shape
        q, k, v = self.qkv(h).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + g1.unsqueeze(1) * self.proj(h)
        h = modulate(self.norm2(x), s2, b2)
        return x + g2.unsqueeze(1) * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, depth=28, dim=1152, heads=16, patch=2, ch=4, classes=1000, side=32):
        super().__init__()
        self.patch, self.ch, self.dim = patch, ch, dim
        self.x_embed = nn.Conv2d(ch, dim, patch, patch)
        self.pos = nn.Parameter(torch.randn(1, (side // patch) ** 2, dim) * 0.02)
        self.t_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embed = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.out = nn.Linear(dim, patch * patch * ch)

    def forward(self, x, t, y, noise):
        n, _, hh, ww = x.shape
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        a = t.float()[:, None] * freqs[None]
        temb = torch.cat([a.cos(), a.sin()], -1).to(x.dtype)
        h = self.x_embed(x).flatten(2).transpose(1, 2) + self.pos
        c = self.t_embed(temb) + self.y_embed(y)
        for blk in self.blocks:
            h = blk(h, c)
        s, b = self.ada(c).chunk(2, dim=1)
        h = self.out(modulate(self.norm(h), s, b))
        p, g = self.patch, hh // self.patch
        h = h.view(n, g, g, p, p, self.ch).permute(0, 5, 1, 3, 2, 4).reshape(n, self.ch, hh, ww)
        return F.mse_loss(h.float(), noise.float())


def dit(**sizes):
    return DiT(**sizes)


def example_inputs(batch, seq, model):
    image = (batch, 4, seq, seq)
    t = torch.randint(0, 1000, (batch,))
    y = torch.randint(0, model.y_embed.num_embeddings - 1, (batch,))
    return {"x": torch.randn(image), "t": t, "y": y, "noise": torch.randn(image)}
