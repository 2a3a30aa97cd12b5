"""Parts of models whose figures depend on data, or that have no formula: traced in place, and named."""

from __future__ import annotations

import pytest
import torch
from tpplan.errors import ModelError
from tpplan.planner.graph import ModelGraph
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

EXPERTS = """
import torch, torch.nn.functional as F
from torch import nn

class Expert(nn.Module):
    def __init__(self, h, f):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((h, f), (h, f), (f, h)))
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

class Experts(nn.Module):
    def __init__(self, h, f, n, k):
        super().__init__()
        self.k, self.router = k, nn.Linear(h, n, bias=False)
        self.experts = nn.ModuleList([Expert(h, f) for _ in range(n)])
    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1, dtype=torch.float).topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(rows)
        hit = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for e in (hit.sum((1, 2)) > 0).nonzero():
            place, row = torch.where(hit[e].squeeze(0))
            out.index_add_(0, row, self.experts[e](rows[row]) * weights[row, place, None])
        return out.view_as(x)

class Layer(nn.Module):
    def __init__(self, h, f, n, k):
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(h), nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.moe = Experts(h, f, n, k)
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 128)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(x)

class Model(nn.Module):
    def __init__(self, h=4096, f=14336, n=8, k=2, layers=32):
        super().__init__()
        self.embed, self.head = nn.Embedding(32000, h), nn.Linear(h, 32000, bias=False)
        self.layers = nn.ModuleList([Layer(h, f, n, k) for _ in range(layers)])
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

def example_inputs(batch, seq):
    return torch.randint(0, 32000, (batch, seq))
"""


def traced(tmp_path, text: str, seq: int = 8) -> ModelGraph:
    (tmp_path / "own.py").write_text(text)
    return trace(load_target(str(tmp_path / "own.py") + ":Model"), sequence_length=seq, precision="bf16").verify()


def test_a_46b_router_by_nonzero_is_opaque_in_its_module_alone(tmp_path):
    graph = traced(tmp_path, EXPERTS, 256)
    assert graph.parameter_count == pytest.approx(47.5e9, rel=0.01)
    assert [fqn for fqn, _, _ in graph.opaque] == [f"layers.{i}.moe" for i in range(32)]
    reason = graph.opaque[0][1]
    line = 1 + EXPERTS[: EXPERTS.index(".nonzero()")].count("\n")
    assert f"own.py, line {line}: nonzero makes sizes of data" in reason
    assert any("repeated layers" in note for note in graph.notes)
    assert graph.unused == ()
    tokens, h, f = 2 * 256, 4096, 14336
    experts = 32 * (2 * 3 * 2 * tokens * h * f + 2 * tokens * h * 8)
    share = sum(share for _, _, share in graph.opaque)
    assert share * graph.flops_forward.at(2) == pytest.approx(experts, rel=1e-9)
    assert graph.flops_backward.at(2) / graph.flops_forward.at(2) == pytest.approx(2, rel=0.02)


CUSTOM = """
import torch, torch.nn.functional as F
from torch import nn
library = torch.library.Library("tpplan_test_{name}", "FRAGMENT")
if not hasattr(torch.ops.tpplan_test_{name}, "double"):
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CPU")
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.tpplan_test_{name}.double(x)
    @staticmethod
    def backward(ctx, grad):
        return torch.ops.tpplan_test_{name}.double(grad)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return x + Double.apply(self.a(x))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(5)]), nn.Linear(8, 100)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""


def test_an_operator_without_fake_kernel_runs_on_real_tensors_and_is_named(tmp_path):
    graph = traced(tmp_path, CUSTOM.replace("{name}", "a"))
    assert [fqn for fqn, _, _ in graph.opaque] == [f"blocks.{i}" for i in range(5)]
    assert "tpplan_test_a.double.default has no cost formula" in graph.opaque[0][1]
    assert graph.opaque[0][1].startswith("own.py, line 11: ")
    block = graph.classes[graph.units[1].class_index]
    (op,) = [op for op in block.ops if "double" in op.name]
    assert op.forward.bytes_moved.at(3) == 2 * 3 * 8 * 8 * 2
    assert [k.name for k in op.backward] == ["tpplan_test_a.double.default"]
    assert not graph.captured


def test_sizes_that_follow_the_inputs_are_exact_and_noted(tmp_path):
    text = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a = nn.Embedding(16, 8), nn.Linear(8, 8)
    def forward(self, ids):
        return self.a(self.embed(ids)[ids > 0]).square().mean()
def example_inputs(batch, seq):
    return torch.arange(seq).repeat(batch, 1)
"""
    graph = traced(tmp_path, text)
    assert graph.opaque == ()
    assert graph.flops_forward.at(4) == 2 * 4 * 7 * 8 * 8
    assert any("own.py, line 9" in note and "example inputs" in note for note in graph.notes)


def test_values_of_too_large_tensors_are_refused(tmp_path):
    text = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        if torch.zeros(2**15, 2**15).sum() > 0:
            x = x * 2
        return self.a(x).square().mean()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""
    with pytest.raises(ModelError, match="1,073,741,824 elements"):
        traced(tmp_path, text)


def test_a_cached_function_of_the_model_keeps_no_fake_tensor(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("""
import functools
import torch
from torch import nn
@functools.lru_cache(maxsize=8)
def table(n):
    return torch.arange(n) + torch.zeros(n)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return (self.a(x) * table(8)).mean()
def example_inputs(batch, seq):
    return torch.randn(batch, 8)
""")
    target = load_target(str(path), precision="fp32")
    trace(target, sequence_length=8, precision="fp32")
    real = target.build("cpu")(torch.ones(2, 8))
    assert type(real.detach()) is torch.Tensor
    assert torch.isfinite(real)
