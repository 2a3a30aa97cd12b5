"""Models small enough to trace in a second each: skips over levels, a part whose sizes depend on data, tied weights."""

from __future__ import annotations

from pathlib import Path

import pytest

NANOGPT = Path(__file__).resolve().parents[2] / "examples" / "nanogpt.py"
TINY = {"n_layer": "4", "n_embd": "64", "n_head": "4", "vocab_size": "128", "block_size": "64"}

LEVELS = """
import torch
from torch import nn

class Level(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self, levels=3):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.downs = nn.ModuleList(Level(16) for _ in range(levels))
        self.reduce = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(levels))
        self.ups = nn.ModuleList(Level(16) for _ in range(levels))
        self.forgotten = nn.Linear(16, 16)
    def forward(self, x):
        x, kept = self.first(x), []
        for down, reduce in zip(self.downs, self.reduce):
            x = down(x)
            kept.append(x)
            x = reduce(x)
        for up in self.ups:
            x = up(x + kept.pop())
        return x

def build_model(levels=3):
    return Net(levels)

def example_inputs(batch, seq=8):
    return {"x": torch.randn(batch, seq, 16)}
"""

ROUTED = """
import torch
from torch import nn

class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 2)
        self.expert = nn.Linear(16, 16)
    def forward(self, x):
        rows = (self.gate(x).argmax(-1) == 0).reshape(-1).nonzero().squeeze(-1)
        flat = x.reshape(-1, 16)
        return flat.index_add(0, rows, self.expert(flat[rows])).view_as(x)

def build_model():
    return nn.Sequential(nn.Linear(16, 16), Routed(), Routed(), nn.Linear(16, 16))

def example_inputs(batch, seq=8):
    return torch.randn(batch, seq, 16)
"""


def traced(target: str, arguments: dict[str, str], length: int):
    """(graph, sharding) of a target."""
    from tpplan.planner.sharding import analyse
    from tpplan.planner.target import load_target
    from tpplan.planner.trace import trace

    graph = trace(load_target(target, model_args=arguments), sequence_length=length)
    return graph, analyse(graph)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Name -> (graph, sharding)."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "levels.py").write_text(LEVELS)
    (folder / "routed.py").write_text(ROUTED)
    return {
        "nanogpt": traced(str(NANOGPT), TINY, 64),
        "levels": traced(str(folder / "levels.py"), {}, 8),
        "routed": traced(str(folder / "routed.py"), {}, 8),
    }


@pytest.fixture
def levels_source() -> str:
    """The file of the model with skips over levels."""
    return LEVELS
