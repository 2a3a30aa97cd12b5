"""Sequence parallelism equals one process: loss, every gradient and what is communicated, as the planner says."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import pytest
import torch
from numeric import check_gradients, run_plan
from test_numeric import LAYOUTS, plan_of
from test_tensor_parallel import SEQ, TARGETS, check, one_step
from tpplan.planner.graph import ModelGraph
from tpplan.planner.plan import ModuleStyle, TensorParallelSection
from tpplan.planner.sharding import Sharding, analyse, with_sequence_parallel
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace
from tpplan.runtime.sequence import split_wire
from tpplan.runtime.stubs import Wire
from tpplan.runtime.unit_outputs import Leaf


@cache
def planned(target: str, args: tuple[tuple[str, str], ...] = ()) -> tuple[ModelGraph, Sharding]:
    graph = trace(load_target(target, model_args=dict(args)), sequence_length=SEQ, precision="fp32")
    sharding = with_sequence_parallel(graph, analyse(graph))
    assert sharding is not None
    return graph, sharding


def section_of(sharding: Sharding) -> TensorParallelSection:
    return TensorParallelSection(
        styles={
            fqn: ModuleStyle(
                style=cast(Any, s.style),
                sizes=list(s.sizes),
                output=cast(Any, s.output),
                parameters=dict(s.parameters),
                packed={name: list(sizes) for name, sizes in s.packed},
                shared=list(s.shared),
            )
            for fqn, s in sharding.styles.items()
        },
        attention=sorted(sharding.attention),
        loss_parallel=sharding.loss_parallel,
        sequence_parallel=True,
        sequence_modules=list(sharding.sequence.modules),
        sequence_ends=list(sharding.sequence.ends),
    )


@pytest.mark.parametrize("name", ["unbound", "adapters", "llama", "bert", "nanogpt"])
def test_gradients_and_collectives(pool, name: str) -> None:
    target, args = TARGETS[name]
    graph, sharding = planned(target, tuple(args.items()))
    phases = [c.phase for u in graph.units for c in sharding.of_class(u.class_index).collectives]
    section = section_of(sharding)
    for result in pool.run(one_step, world=2, target=target, args=args, section=section, how="plain"):
        check(result)
        if name != "adapters":  # there whole and partial gradients meet, as without the split
            assert result["comm"] == (phases.count("forward"), phases.count("backward"))


@pytest.mark.parametrize(("model", "layout"), [("llama", "tp2xdp2"), ("nanogpt", "tp2xpp2"), ("bert", "tp2xpp2")])
def test_gradients_of_layouts(pool, model: str, layout: str) -> None:
    plan = plan_of(model, **LAYOUTS[layout])
    args = tuple(plan.model.model_args.items())
    section = section_of(planned(plan.model.target, args)[1])
    plan = plan.model_copy(update={"tensor_parallel": section})
    check_gradients(plan, pool.run(run_plan, plan=plan), torch.float64, 1e-9)


def test_a_border_inside_the_stretch_sends_each_ranks_tokens() -> None:
    section = section_of(planned(TARGETS["llama"][0])[1])

    def sent(fqn: str, shape: tuple[int, ...], degree: int = 2) -> tuple[int, ...]:
        return split_wire(Wire(fqn, 0, 0, Leaf(shape, torch.float32, True)), section, degree).meta.shape

    assert sent("model.layers.1", (3, 16, 64)) == (3, 8, 64)
    assert sent("model.layers.1", (3, 16, 64), degree=1) == (3, 16, 64)
    assert sent("model.layers.1", (3, 1, 16, 16)) == (3, 1, 16, 16)
    assert sent("model.layers.3", (3, 16, 64)) == (3, 16, 64)  # the end of the stretch: gathered
    assert sent("model.embed_tokens", (3, 16, 64)) == (3, 16, 64)
