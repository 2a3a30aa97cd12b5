"""Loops over time steps: figures extended from short lengths equal those of a trace of every step."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tpplan.planner import budget
from tpplan.planner.graph import Affine, ModelGraph
from tpplan.planner.lengths import Curves
from tpplan.planner.rnn import reserve_elements
from tpplan.planner.target import Target, load_target
from tpplan.planner.time_loops import NotExtendable, collapse
from tpplan.planner.trace import trace

MODELS = Path(__file__).with_name("time_loop_models.py")


def target(name: str, **args: object) -> Target:
    return load_target(f"{MODELS}:{name}", model_args=args)


def traced(name: str, length: int, full: bool = False, **args: object) -> ModelGraph:
    return trace(target(name, **args), sequence_length=length, precision="fp32", full=full).verify()


def totals(graph: ModelGraph) -> dict[str, Affine | int]:
    """Figures of the whole model: FLOPs, least bytes and launches of all kernels, bytes saved."""
    found: dict[str, Affine | int] = {"saved": graph.saved_bytes, "bytes": Affine(), "launches": 0}
    for unit in graph.units:
        for op in graph.classes[unit.class_index].ops:
            for kernel in (op.forward, *op.backward):
                found["bytes"] += kernel.bytes_moved.scaled(op.repeat)
                found["launches"] += op.repeat if kernel.kind != "free" else 0
    return {**found, "forward": graph.flops_forward, "backward": graph.flops_backward}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_OPERATORS", 60)
    monkeypatch.setattr(budget, "MOST_CALLS", 12)


@pytest.mark.parametrize("name", ["OwnCell", "CellModule"])
@pytest.mark.usefixtures("small_budget")
def test_extended_figures_are_those_of_every_step(name: str) -> None:
    extended = traced(name, 24)
    assert any("extended to 24" in note for note in extended.notes)
    every = traced(name, 24, full=True)
    assert totals(extended) == totals(every)
    assert sum(len(c.ops) for c in extended.classes) < 80 < totals(every)["launches"]


@pytest.mark.usefixtures("small_budget")
def test_extended_operators_are_those_of_every_step() -> None:
    """Shrunk from all 24 steps, or extended from 5 to 9: one operator after the other is equal."""
    extended = traced("OwnCell", 24).classes[-1]
    shrunk = collapse([traced("OwnCell", n, full=True).classes[-1] for n in (24, 25)])[0]
    assert extended.ops == shrunk.ops
    assert extended.tensors == shrunk.tensors
    assert (extended.saved, extended.outputs) == (shrunk.saved, shrunk.outputs)


@pytest.mark.usefixtures("small_budget")
def test_steps_of_growing_size_are_all_traced() -> None:
    graph = traced("Growing", 24)
    assert any("every step of the loop" in note for note in graph.notes)
    assert totals(graph) == totals(traced("Growing", 24, full=True))


def test_a_long_loop_costs_no_more_than_a_short_one() -> None:
    graph = traced("OwnCell", 4_096)
    assert graph.flops_forward == Affine(0, 4_096 * 2 * 48 * (32 + 48 + 50))
    assert totals(graph)["launches"] > 10 * 4_096


def test_a_curve_that_meets_no_further_length_is_refused() -> None:
    assert Curves((5, 6, 7, 9), 100).number([2 * n * n + 1 for n in (5, 6, 7, 9)]) == 20_001
    with pytest.raises(NotExtendable):
        Curves((5, 6, 7, 9), 100).number([8, 8, 8, 16])


def loss_of(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), ids.flatten())


KINDS = [
    dict(kind=kind, bidirectional=both, **more)
    for kind, both in itertools.product(("LSTM", "GRU", "RNN"), (False, True))
    for more in ([{}, {"proj_size": 16}] if kind == "LSTM" else [{}])
]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_recurrent_layers_count_as_torch_counts_their_products(options: dict[str, object]) -> None:
    graph, model = traced("Recurrent", 7, **options), target("Recurrent", **options).build("cpu").double()
    ids = torch.randint(0, 50, (3, 7))  # in float64, where the CPU runs every product by itself
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model(ids), ids)
        forward = counter.get_total_flops()
        loss.backward()
    assert graph.flops_forward.at(3) == forward
    assert graph.flops_backward.at(3) == counter.get_total_flops() - forward


def test_recurrent_layers_keep_cudnns_reserve() -> None:
    cls = next(c for c in traced("Recurrent", 7).classes if c.module_type == "LSTM")
    kernel = next(op for op in cls.ops if op.name == "tpplan._rnn.default")
    assert cls.tensors[kernel.outputs[-1]].shape == (Affine(0, 7 * reserve_elements("lstm", 2, 1, 48, 48)),)
    assert [k.wrt for k in kernel.backward[:2]] == ["input", "weight"]


def test_packed_sequences_count_at_full_length() -> None:
    packed, plain = traced("Recurrent", 7, packed=True), traced("Recurrent", 7)
    assert packed.flops_forward == plain.flops_forward
    assert packed.flops_backward == plain.flops_backward
