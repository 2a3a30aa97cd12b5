"""Models that loop over the samples of a batch: their operators follow the microbatch size, their figures are sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tpplan.planner.graph import ModelGraph
from tpplan.planner.sharding import analyse
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
"""
FEED = """
def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 8)}
"""
INSIDE = """
class Each(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
    def forward(self, x):
        return torch.stack([torch.tanh(sample @ self.weight) for sample in x])
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.each, self.out = nn.Linear(8, 8), Each(), nn.Linear(8, 8)
    def forward(self, x):
        return self.out(self.each(self.into(x))).square().mean()
"""
CALLS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.each, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        x = self.into(x)
        return self.out(torch.stack([self.each(sample) for sample in x])).square().mean()
"""


def traced(folder: Path, text: str) -> ModelGraph:
    path = folder / "own.py"
    path.write_text(HEAD + text + FEED)
    return trace(load_target(str(path), precision="fp32"), sequence_length=4, precision="fp32").verify()


@pytest.mark.parametrize("text", [INSIDE, CALLS], ids=["inside one module", "a module called for each sample"])
def test_sums_are_exact_and_the_part_is_opaque(text: str, tmp_path: Path) -> None:
    graph = traced(tmp_path, text)
    # two products of the linears around and one in the loop, each 2 x 4 x 8 x 8 a sample
    assert graph.flops_forward.at(7) == 7 * 3 * 2 * 4 * 8 * 8
    assert graph.flops_backward.at(7) == 7 * (3 * 2 - 1) * 2 * 4 * 8 * 8
    (part,) = graph.opaque
    assert part[0] == "each"
    assert "loop over samples" in part[1]
    assert 0.3 < part[2] < 0.7
    assert not graph.captured
    styles = analyse(graph).styles
    assert "each" not in styles


def test_what_the_loop_keeps_is_what_a_real_step_keeps(tmp_path: Path) -> None:
    graph = traced(tmp_path, INSIDE)
    target = load_target(str(tmp_path / "own.py"), precision="fp32")
    model = target.build("cpu")
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**target.example_inputs(model, 7, 4).kwargs)
    assert graph.saved_bytes.at(7) == pytest.approx(sum(kept.values()), rel=0.01)
