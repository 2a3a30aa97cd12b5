"""A diffusion UNet by hand, shaped like Stable Diffusion 1.5; `seq` is the side of the latents (64).

320 channels x 1, 2, 4, 4; two residual blocks a level; spatial transformers that attend to 77 prompt tokens of 768.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Res(nn.Module):
    def __init__(self, cin, cout, temb):
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(32, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.t = nn.Linear(temb, cout)
        self.n2, self.c2 = nn.GroupNorm(32, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, temb):
        h = self.c1(F.silu(self.n1(x))) + self.t(F.silu(temb))[:, :, None, None]
        return self.skip(x) + self.c2(F.silu(self.n2(h)))


class Attn(nn.Module):
    def __init__(self, dim, ctx, heads=8):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (
            nn.Linear(dim, dim, bias=False),
            nn.Linear(ctx, dim, bias=False),
            nn.Linear(ctx, dim, bias=False),
        )
        self.o = nn.Linear(dim, dim)

    def forward(self, x, ctx):
        n, t, d = x.shape

        def sp(y):
            return y.view(n, -1, self.heads, d // self.heads).transpose(1, 2)

        a = F.scaled_dot_product_attention(sp(self.q(x)), sp(self.k(ctx)), sp(self.v(ctx)))
        return self.o(a.transpose(1, 2).reshape(n, t, d))


class Spatial(nn.Module):
    def __init__(self, dim, ctx):
        super().__init__()
        self.n = nn.GroupNorm(32, dim)
        self.inp, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.a1, self.a2 = Attn(dim, dim), Attn(dim, ctx)
        self.ff1, self.ff2 = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, ctx):
        n, c, h, w = x.shape
        y = self.inp(self.n(x)).flatten(2).transpose(1, 2)
        z = self.ln1(y)
        y = y + self.a1(z, z)
        y = y + self.a2(self.ln2(y), ctx)
        a, g = self.ff1(self.ln3(y)).chunk(2, -1)
        y = y + self.ff2(a * F.gelu(g))
        return x + self.out(y.transpose(1, 2).reshape(n, c, h, w))


class Stage(nn.Module):
    """One residual block and, where asked, one spatial transformer, then an optional resampling."""

    def __init__(self, cin, cout, temb, ctx, attn, down=False, up=False):
        super().__init__()
        self.res = Res(cin, cout, temb)
        self.attn = Spatial(cout, ctx) if attn else None
        self.down = nn.Conv2d(cout, cout, 3, 2, 1) if down else None
        self.up = nn.Conv2d(cout, cout, 3, padding=1) if up else None

    def forward(self, x, temb, ctx):
        x = self.res(x, temb)
        if self.attn is not None:
            x = self.attn(x, ctx)
        if self.up is not None:
            x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if self.down is not None:
            return x, self.down(x)
        return x


class UNet(nn.Module):
    def __init__(self, ch=320, mult=(1, 2, 4, 4), n_res=2, ctx=768, cin=4):
        super().__init__()
        temb = 4 * ch
        self.ch, self.prompt = ch, ctx
        self.time = nn.Sequential(nn.Linear(ch, temb), nn.SiLU(), nn.Linear(temb, temb))
        self.conv_in = nn.Conv2d(cin, ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        chans, c = [ch], ch
        for i, m in enumerate(mult):
            for j in range(n_res):
                last = j == n_res - 1 and i < len(mult) - 1
                self.down.append(Stage(c, ch * m, temb, ctx, i < len(mult) - 1, down=last))
                c = ch * m
                chans.append(c)
                if last:
                    chans.append(c)
        self.mid = nn.ModuleList([Stage(c, c, temb, ctx, True), Stage(c, c, temb, ctx, False)])
        for i, m in reversed(list(enumerate(mult))):
            for j in range(n_res + 1):
                self.up.append(Stage(c + chans.pop(), ch * m, temb, ctx, i < len(mult) - 1, up=j == n_res and i > 0))
                c = ch * m
        self.norm, self.conv_out = nn.GroupNorm(32, c), nn.Conv2d(c, cin, 3, padding=1)

    def forward(self, x, t, ctx, noise):
        f = torch.exp(
            -math.log(10000) * torch.arange(self.ch // 2, device=x.device, dtype=torch.float32) / (self.ch // 2)
        )
        a = t.float()[:, None] * f[None]
        temb = self.time(torch.cat([a.cos(), a.sin()], -1).to(x.dtype))
        h = self.conv_in(x)
        hs = [h]
        for blk in self.down:
            o = blk(h, temb, ctx)
            if isinstance(o, tuple):
                hs.append(o[0])
                h = o[1]
            else:
                h = o
            hs.append(h)
        for blk in self.mid:
            h = blk(h, temb, ctx)
        for blk in self.up:
            h = blk(torch.cat([h, hs.pop()], 1), temb, ctx)
        return F.mse_loss(self.conv_out(F.silu(self.norm(h))).float(), noise.float())


def unet(**sizes):
    return UNet(**sizes)


def example_inputs(batch, seq, model):
    noise, image = (torch.randn(batch, 4, seq, seq) for _ in range(2))
    prompt = torch.randn(batch, 77, model.prompt)
    return {"x": image, "t": torch.randint(0, 1000, (batch,)), "ctx": prompt, "noise": noise}
