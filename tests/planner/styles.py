"""Tiny models in the ways people write them, each a file that `tpplan` could be given."""

from __future__ import annotations

HEAD = """
import copy, random
from dataclasses import dataclass
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside()
    def forward(self, x):
        return self.out(self.body(x)).float().square().mean()
    def stack(self, make, n=3):
        self.blocks = nn.ModuleList([make() for _ in range(n)])
        self.out = nn.Linear(8, 4)
def build_model():
    return Model()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""

STYLES = {
    "custom_function_saves_tensors": """
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * x) @ w
    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return 2 * x * (grad @ w.t()), (x * x).flatten(0, 1).t() @ grad.flatten(0, 1)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
    def forward(self, x):
        return x + Square.apply(x, self.w)
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x
""",
    "custom_function_keeps_attributes": """
class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.x, ctx.w, ctx.half = x.detach(), w.detach(), 0.5
        return ctx.half * x @ w
    @staticmethod
    def backward(ctx, grad):
        return ctx.half * grad @ ctx.w.t(), ctx.half * ctx.x.flatten(0, 1).t() @ grad.flatten(0, 1)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
    def forward(self, x):
        return x + Scale.apply(x, self.w)
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x
""",
    "dict_inputs": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 8)
    def forward(self, batch):
        return {"loss": (self.a(batch["x"]) * self.b(batch["more"]["y"])).mean(), "name": "none"}
def example_inputs(batch, seq):
    return {"batch": {"x": torch.randn(batch, seq, 8), "more": {"y": torch.randn(batch, seq, 4)}}}
""",
    "keyword_only_inputs": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, *, x, scale=2.0):
        return (self.a(x) * scale).square().mean()
def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 8)}
""",
    "dataclass_output": """
@dataclass
class Result:
    loss: torch.Tensor
    kind: str
    nothing: None = None
@dataclass
class Inner:
    hidden: torch.Tensor
    note: str
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return Inner(torch.relu(self.a(x)), "block")
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = block(x).hidden
        return x
    def forward(self, x):
        return Result(super().forward(x), "tiny")
""",
    "in_place": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        y = self.a(x)
        y.relu_()
        y[..., 0] = 0.0
        out = torch.zeros_like(y)
        out[..., :4] += y[..., 4:]
        out.mul_(2).add_(x)
        return out
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x
""",
    "written_buffer": """
class Model(Net):
    def inside(self):
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("allowed", torch.ones(8, dtype=torch.bool))
        self.register_buffer("code", torch.ones(8, dtype=torch.int8))
    def body(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
            self.seen += 1
        y = self.a(x - self.mean) * self.allowed * self.code
        self.mean = self.mean * 1.0
        return y
""",
    "called_twice": """
class Model(Net):
    def inside(self):
        self.a, self.act, self.out = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)
    def body(self, x):
        return self.act(self.a(self.act(self.a(x))))
""",
    "layer_shared_by_all_depths": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    def forward(self, x):
        return self.norm(x + torch.tanh(self.a(x)))
class Model(Net):
    def inside(self):
        self.stack(Block, 1)
    def body(self, x):
        for _ in range(6):
            x = self.blocks[0](x)
        return x
""",
    "raw_parameters": """
class Model(Net):
    def inside(self):
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(8))})
        self.out = nn.Linear(8, 4)
    def body(self, x):
        for w in self.weights:
            x = torch.tanh(F.linear(x, w, self.named["bias"]))
        return x
""",
    "tied": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.mid = nn.Linear(8, 8)
    def forward(self, ids):
        logits = self.head(self.mid(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
def example_inputs(batch, seq):
    return torch.randint(0, 16, (batch, seq))
""",
    "sparse_embedding": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bag = nn.Embedding(16, 8, sparse=True), nn.EmbeddingBag(16, 8, mode="sum")
        self.mid = nn.Linear(8, 8)
    def forward(self, ids):
        return (self.mid(self.embed(ids)).mean(1) * self.bag(ids)).square().mean()
def example_inputs(batch, seq):
    return torch.randint(0, 16, (batch, seq))
""",
    "checkpoint": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x
""",
    "checkpoint_reentrant": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))
class Model(Net):
    def inside(self):
        self.first = nn.Linear(8, 8)
        self.stack(Block)
    def body(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x
""",
    "no_grad_parts": """
class Model(Net):
    def inside(self):
        self.frozen, self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.frozen.requires_grad_(False)
    def body(self, x):
        with torch.no_grad():
            y = self.frozen(x)
        side = self.a(x).detach()
        return torch.tanh(self.a(y)) + side
""",
    "multihead_attention": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])
class Model(Net):
    def inside(self):
        self.stack(Block)
    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x
""",
    "encoder_layers": """
class Model(Net):
    def inside(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 4), nn.Linear(8, 4)
    def body(self, x):
        return self.encoder(x)
""",
    "compiled": """
@torch.compile
def gelu(x):
    return F.gelu(x) * 2
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return gelu(self.a(x))
class Model(Net):
    def inside(self):
        self.one = torch.compile(Block())
        self.stack(Block)
        self.blocks[1].compile()
    def body(self, x):
        x = self.one(x)
        for block in self.blocks:
            x = block(x)
        return x
""",
    "autocast": """
class Model(Net):
    def inside(self):
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
    def body(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.a(x))
        return y.float()
""",
    "fft": """
class Model(Net):
    def inside(self):
        self.filter, self.out = nn.Parameter(torch.randn(5, 8, 2)), nn.Linear(8, 4)
    def body(self, x):
        spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        return torch.fft.irfft(spectrum, n=x.shape[1], dim=1)
""",
    "converts_in_forward": """
class Model(Net):
    def inside(self):
        self.router, self.out = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 4)
    def body(self, x):
        self.router = self.router.to(torch.float32)
        return self.router(x)
""",
    "keeps_tables": """
class Model(Net):
    def inside(self):
        self.a, self.out, self.table, self.switched = nn.Linear(8, 8), nn.Linear(8, 4), None, False
    def body(self, x):
        if self.table is None:
            self.table = torch.arange(8) + 1
        if not self.switched:
            x, self.switched = x * 1.0, True
        return self.a(x)[..., : int(self.table[-1])] * self.table.to(x)
""",
    "loss_dict": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)
    def forward(self, x):
        return {"loss_class": self.a(x).square().mean(), "loss_box": self.b(x).abs().mean()}
""",
    "devices": """
class Model(Net):
    def inside(self):
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
    def body(self, x):
        device = next(self.parameters()).device
        x = x.to(device)
        if torch.cuda.is_available():
            x = x.cuda()
        return self.a(x) + torch.arange(8, device=device).to(x)
""",
    "einsum": """
class Model(Net):
    def inside(self):
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)
    def body(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2)
""",
    "no_gradient_branch": """
class Model(Net):
    def inside(self):
        self.a, self.unused, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    def body(self, x):
        self.shown = self.unused(x)
        return self.a(x)
""",
    "deepcopied_blocks": """
class Model(Net):
    def inside(self):
        block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([copy.deepcopy(block) for _ in range(5)])
        self.out = nn.Linear(8, 4)
    def body(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x
""",
    "user_hooks": """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.tanh(self.a(x))
class Model(Net):
    def inside(self):
        self.seen = []
        self.stack(Block, 5)
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: self.seen.append(output))
        self.out.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    def body(self, x):
        self.seen.clear()
        for block in self.blocks:
            x = block(x)
        return sum(self.seen)
""",
    "branch_by_data": """
class Model(Net):
    def inside(self):
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
    def body(self, x):
        y = self.a(x)
        if torch.isnan(y).any() or y.abs().max().item() > 1e6:
            y = torch.zeros_like(y)
        scale = float(torch.tensor([1.0, 2.0]).sum())
        return y * scale
""",
    "padding_by_mask": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a = nn.Embedding(16, 8), nn.Linear(8, 8)
    def forward(self, ids, mask):
        lengths = mask.sum(1).tolist()
        rows = self.embed(ids)[mask]
        assert len(rows) == sum(lengths)
        return self.a(rows).square().mean()
def example_inputs(batch, seq):
    mask = torch.ones(batch, seq, dtype=torch.bool)
    mask[:, -2:] = False
    return torch.randint(0, 16, (batch, seq)), mask
""",
    "numpy_inside": """
class Model(Net):
    def inside(self):
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
    def body(self, x):
        order = torch.from_numpy(np.argsort(np.linspace(1, 0, 8)).copy())
        order.unsqueeze_(0)
        weight = torch.as_tensor(np.ones(8, dtype=np.float32))
        return self.a(x)[..., order[0]] * weight
""",
}

_LAYERS = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.tanh(self.a(x))
class Model(Net):
    def inside(self):
        self.stack(Block, 5)
    def body(self, x):
        for block in self.blocks:
            {decide}
                x = block(x)
        return x
"""

DROPS = {
    "rand_scalar": "if not torch.rand([]) < 0.5:",
    "rand_one": "if (torch.rand(1) >= 0.5).item():",
    "rand_keep": "if torch.rand(1).item() < 0.5:",
    "rand_vector": "if torch.rand(len(self.blocks))[0] > 0.5:",
    "uniform_": "if torch.empty(1).uniform_() > 0.5:",
    "uniform_bounds": "if torch.zeros(()).uniform_(0, 1) > 0.5:",
    "bernoulli_": "if torch.empty(1).bernoulli_(0.5):",
    "bernoulli": "if torch.bernoulli(torch.tensor(0.5)) > 0:",
    "bernoulli_drop": "if not torch.bernoulli(torch.full((1,), 0.5)).bool():",
    "python_random": "if random.random() > 0.5:",
    "python_uniform": "if random.uniform(0, 1) < 0.5:",
    "numpy_rand": "if np.random.rand() > 0.5:",
    "numpy_uniform": "if np.random.uniform(0, 1) > 0.5:",
}


def style(name: str) -> str:
    """The text of the file of one style."""
    return HEAD + STYLES[name]


def drop(name: str) -> str:
    """The text of a model that drops layers in the way `name`."""
    return HEAD + _LAYERS.replace("{decide}", DROPS[name])
