"""Styles that run on each rank's plain tensors equal one process: convolutions, norms, experts, torch's attention."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tpplan.planner.plan import ModuleStyle, TensorParallelSection

sys.path.append(str(Path(__file__).resolve().parent))  # the pool's workers load this file by its path
COL, ROW = ModuleStyle(style="col", output="shard"), ModuleStyle(style="row")


class Images(nn.Module):
    """Column, grouped and row convolutions with norms, padding and pooling of split channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
        self.grouped, self.groups = nn.Conv2d(8, 16, 3, groups=8), nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 4, 1)
        self.up, self.down = nn.ConvTranspose2d(4, 8, 2, stride=2), nn.ConvTranspose2d(8, 3, 2)
        self.out = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, 8, 8) to (batch, 5)."""
        x = F.max_pool2d(F.pad(F.relu(self.norm(self.first(x))), (1, 1, 1, 1)), 2)
        x = self.last(F.interpolate(self.groups(self.grouped(x)), scale_factor=2))
        return self.out(F.adaptive_avg_pool2d(self.down(F.gelu(self.up(x))), 1).flatten(1))


class Experts(nn.Module):
    """Two experts with biases, gate and up interleaved by expert, chosen by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(2, 16, 6)), nn.Parameter(torch.randn(2, 6, 8))
        self.down_bias = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """(tokens, 6) to (tokens, 6); `which` expert for each."""
        out = torch.zeros_like(x)
        for e in which.unique():
            (rows,) = torch.where(which == e)
            gate, up = F.linear(x[rows], self.gate_up[e]).chunk(2, -1)
            out = out.index_add(0, rows, F.linear(F.silu(gate) * up, self.down[e], self.down_bias[e]))
        return out


class Routed(nn.Module):
    """Experts behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts, self.out = nn.LayerNorm(6), Experts(), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, 6) to (tokens, 5)."""
        flat = self.norm(x).flatten(0, 1)
        which = torch.arange(flat.shape[0]) % 2
        return self.out(flat + self.experts(flat, which))


class Attends(nn.Module):
    """torch's own attention, to itself and to another length, with masks and averaged weights."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 4, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=batch_first)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, other: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """(a, b, 8) and (a', b', 6) to (a, b, 5)."""
        length = x.shape[1 if self.inner.batch_first else 0]
        causal = torch.ones(length, length).triu(1).bool()
        x = x + self.inner(x, x, x, attn_mask=causal, need_weights=False)[0]
        attended, weights = self.cross(x, other, other, key_padding_mask=padding)
        return self.out(x + attended) + weights.mean()


class Mixer(nn.Module):
    """A packed projection cut behind a transpose, a grouped convolution called as a function, a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.conv = nn.Linear(6, 16), nn.Conv1d(8, 8, 3, groups=8, padding=2)
        self.scale, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 6)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, 6) to the same."""
        inner, gate = self.proj(x).transpose(1, 2).chunk(2, dim=1)
        inner = F.silu(F.conv1d(inner, self.conv.weight, self.conv.bias, padding=2, groups=8)[..., : x.shape[1]])
        return self.out((inner * F.silu(gate)).transpose(1, 2) * self.scale) * self.temperature.exp()


def _heads(names: tuple[str, ...]) -> ModuleStyle:
    packed = {name: [8, 8, 8] for name in names if name.startswith("in_proj")} | {"in_proj_bias": [8, 8, 8]}
    return ModuleStyle(
        style="heads", parameters={**dict.fromkeys(names, 0), "in_proj_bias": 0, "out_proj.weight": 1}, packed=packed
    )


ATTENDS = {
    "inner": _heads(("in_proj_weight",)),
    "cross": _heads(("q_proj_weight", "k_proj_weight", "v_proj_weight")),
}
CHANNEL = ModuleStyle(style="channel")
CASES: dict[str, tuple[Any, list[tuple[int, ...]], dict[str, ModuleStyle]]] = {
    "images": (
        Images,
        [(4, 3, 8, 8)],
        {"first": COL, "norm": CHANNEL, "grouped": CHANNEL, "groups": CHANNEL, "last": ROW, "up": COL, "down": ROW},
    ),
    "experts": (
        Routed,
        [(2, 5, 6)],
        {
            "experts": ModuleStyle(
                style="region",
                parameters={"gate_up": 1, "down": 2},
                packed={"gate_up": [8, 8]},
                shared=["down_bias"],
            )
        },
    ),
    "attention, batch first": (lambda: Attends(True), [(2, 5, 8), (2, 7, 6), (2, 7)], ATTENDS),
    "attention, length first": (lambda: Attends(False), [(5, 2, 8), (7, 2, 6), (2, 7)], ATTENDS),
    "mixer": (
        Mixer,
        [(2, 5, 6)],
        {
            "": ModuleStyle(style="parameters", parameters={"scale": 0}),
            "proj": ModuleStyle(style="packed", sizes=[8, 8], output="shard"),
            "conv": ModuleStyle(style="parameters", parameters={"weight": 0, "bias": 0}),
            "out": ROW,
        },
    ),
}


def two_steps(rank: int, world: int, case: str) -> dict[str, Any]:
    """Worst relative error of outputs, gradients of two microbatches, and buffers against the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from tpplan.runtime.full_tensors import full_tensor_of
    from tpplan.runtime.placements import unwrap_activation
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    make, shapes, styles = CASES[case]
    torch.manual_seed(7)
    model = make().double()
    whole = copy.deepcopy(model)
    batches = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    for inputs in batches:
        if len(inputs) == 3:
            inputs[2] = inputs[2] > 1  # padding
    section = TensorParallelSection(styles=styles)
    apply_tensor_parallel(model, section, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    errors: dict[str, float] = {}
    with step_context(section):
        for number, inputs in enumerate(batches):
            output, wanted = unwrap_activation(model(*inputs)), whole(*inputs)
            errors[f"output {number}"] = ((output - wanted).norm() / wanted.norm()).item()
            output.square().sum().backward()
            wanted.square().sum().backward()
    for name, parameter in whole.named_parameters():
        mine = model.get_parameter(name)
        assert mine.grad is not None, name
        assert parameter.grad is not None, name
        found = full_tensor_of(mine.grad, name, section)
        errors[name] = ((found - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-3)).item()
    for name, buffer in whole.named_buffers():
        found = full_tensor_of(model.get_buffer(name), name, section)
        errors[name] = (found - buffer).abs().max().item()
    sharded = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    return {"errors": errors, "held": sharded, "whole": sum(p.numel() for p in whole.parameters())}


@pytest.mark.parametrize("case", CASES)
def test_local_styles_equal_one_process(pool, case: str) -> None:
    for result in pool.run(two_steps, world=2, case=case):
        worst = max(result["errors"], key=result["errors"].get)
        assert result["errors"][worst] < 1e-9, (worst, result["errors"][worst])
        assert result["held"] < 0.85 * result["whole"]
