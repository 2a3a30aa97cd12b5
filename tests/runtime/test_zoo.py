"""A sample of the zoo: small variants counted as torch counts them, planned, and run on two gloo processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tpplan

sys.path.append(str(Path(tpplan.__file__).resolve().parent / "benchmarks" / "zoo"))

from execute import execute
from members import by_name
from oracle import count, saved_bytes
from tpplan.planner.target import Target, load_target
from tpplan.planner.trace import trace

# Alternating attention, experts, an encoder-decoder, a scan over time, convolutions, long skips, a loss over pairs of
# samples, fused projections.
SAMPLE = ("gemma3-text", "qwen3-moe", "t5", "mamba", "convnext", "u_net", "clip", "fused_qkv_gate_up")
LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}


def small(name: str, folder: Path) -> tuple[Target, int]:
    member = by_name(name)
    spec, arguments = member.target(folder, small=True)
    return load_target(spec, model_args=arguments, inputs=member.inputs, precision="fp32"), member.small_seq


@pytest.mark.parametrize("name", SAMPLE)
def test_counted_as_torch_counts(name: str, tmp_path: Path) -> None:
    target, seq = small(name, tmp_path)
    graph = trace(target, sequence_length=seq, precision="fp32")
    torchs = count(target, 4, seq, "fp32")
    assert graph.captured
    assert (graph.flops_forward.at(4), graph.flops_backward.at(4)) == (torchs.forward, torchs.backward)
    assert set(graph.unused) == torchs.unused
    model = target.build("meta")
    assert graph.parameter_count == sum(p.numel() for p in model.parameters())
    assert graph.buffer_count == sum(b.numel() for b in model.buffers())
    assert graph.saved_bytes.at(4) == pytest.approx(saved_bytes(target, 4, seq), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLE)
def test_runs_like_one_process(name: str, layout: str, tmp_path: Path, pool) -> None:
    member = by_name(name)
    spec, arguments = member.target(tmp_path, small=True)
    result = execute(spec, arguments, member.inputs, member.small_seq, LAYOUTS[layout], pool)
    assert result["equal"], result["trace"] or result
    assert layout == "pp2" or result["sharded_share"] >= 0.5


PACKED_BY_HAND = """
import torch
from torch import nn
from torch.nn import functional as F
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(96, 32) * 0.1)
        self.out = nn.Linear(32, 32)
    def forward(self, x):
        q, k, v = (x @ self.qkv.t()).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()
def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 32)}
"""


def test_a_fused_weight_multiplied_by_hand_is_cut_right(tmp_path: Path, pool) -> None:
    path = tmp_path / "by_hand.py"
    path.write_text(PACKED_BY_HAND)
    result = execute(str(path), {}, (), 8, {"tp": 2}, pool)
    assert result["equal"], result["trace"] or result
    assert result["sharded_share"] > 0.7
