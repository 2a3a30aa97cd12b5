"""Infeasible requests, repairs, objectives and rankings, each checked by searches of their own on a small GPT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tpplan.errors import InfeasibleError, UsageError
from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner.alternatives import in_order
from tpplan.planner.infeasible import no_plan
from tpplan.planner.mesh import Mesh
from tpplan.planner.objectives import Goal, gpu_counts, reach
from tpplan.planner.pins import parse_pins
from tpplan.planner.plan import Alternative, MeshSection
from tpplan.planner.planning import SearchOptions, Subject, layout_key, solve_for
from tpplan.planner.repairs import GAP, find_repairs
from tpplan.planner.request import Request
from tpplan.planner.shortfall import least_limit, shortfall

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
ONE = SearchOptions(workers=1)


def quiet(_name: str, _text: str) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A GPT of four blocks on devices where nothing but tensors takes memory."""
    from tpplan.planner.suggest import traced
    from tpplan.planner.target import load_target

    sizes = {"n_layer": "4", "n_embd": "256", "n_head": "4", "vocab_size": "512", "block_size": "128"}
    loaded = load_target(str(ROOT / "examples/nanogpt.py"), model_args=sizes, inputs=(), precision="bf16")
    profile = load_profile("h100-sxm")
    bare = replace(profile.device, context_bytes=0, nccl_base_bytes=0, nccl_communicator_bytes=0)
    return traced(loaded, replace(profile, device=bare), 128, "bf16")


@pytest.fixture
def small() -> Request:
    return Request(
        gpus=2, gpus_per_node=8, sequence_length=128, global_batch=4, precision="bf16", optimizer="adamw",
        memory_limit_bytes=2**30, gap=1e-4,
    )  # fmt: skip


def fits(subject: Subject, request: Request) -> bool:
    solved = solve_for(subject, request, ONE)
    assert solved.best is not None or solved.result.status == "infeasible"
    return solved.best is not None


def test_the_least_limit_is_least(subject: Subject, small: Request) -> None:
    least = least_limit(subject, small)
    assert least is not None
    assert fits(subject, replace(small, memory_limit_bytes=least))
    assert not fits(subject, replace(small, memory_limit_bytes=least - 64))


def test_what_is_missing_is_that_of_a_plan_that_just_fits(subject: Subject, small: Request) -> None:
    tight = replace(small, memory_limit_bytes=4 * MIB)
    short = shortfall(subject, solve_for(subject, tight, ONE))
    assert short.limit_bytes == pytest.approx(least_limit(subject, small), abs=64)
    assert short.missing_bytes == short.limit_bytes - 4 * MIB
    assert sum(size for _, size in short.parts) == pytest.approx(short.limit_bytes, abs=64)
    assert [size for _, size in short.parts] == sorted((size for _, size in short.parts), reverse=True)


def test_repairs_work_and_what_is_tried_in_vain_does_not(
    subject: Subject, small: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpplan.planner.repairs.SHORTEST", 2)
    least = least_limit(subject, small)
    assert least is not None
    pinned = replace(small, memory_limit_bytes=round(least * 0.9), pins=parse_pins(fix=["tp=1", "recompute=none"]))
    limit = shortfall(subject, solve_for(subject, pinned, ONE)).limit_bytes
    found = find_repairs(subject, pinned, limit, 60)
    working, in_vain = found.working, found.in_vain
    assert not found.undecided
    changes = {
        "without any pin": {"pins": parse_pins()},
        "without --fix tp=1": {"pins": parse_pins(fix=["recompute=none"])},
        "without --fix recompute=none": {"pins": parse_pins(fix=["tp=1"])},
        "--memory-limit 1": {"memory_limit_bytes": 2**30},
        "--optimizer sgd": {"optimizer": "sgd"},
        **{f"--gpus {n}": {"gpus": n} for n in (4, 8, 16, 32)},
    }
    assert "--memory-limit 1" in {r.text for r in working}
    assert any("--seq-len 64" in text for text in [*(r.text for r in working), *in_vain])
    assert "without any pin" in in_vain  # 10 % below what any plan needs
    for repair in working:
        if repair.text in changes:
            exact = solve_for(subject, replace(pinned, **changes[repair.text]), ONE)
            assert exact.best is not None
            assert repair.step_time_s <= exact.best.evaluation.step_time_s / (1 - GAP)
            assert repair.device_bytes <= exact.request.memory_limit_bytes
    for text in in_vain:
        if text in changes:
            assert not fits(subject, replace(pinned, **changes[text])), text


def test_what_time_does_not_allow_is_undecided(subject: Subject, small: Request) -> None:
    found = find_repairs(subject, replace(small, memory_limit_bytes=4 * MIB), 2**30, 0.0)
    assert found.working == ()
    assert "--memory-limit 1" in found.undecided


def test_a_pin_that_is_in_the_way_is_found(subject: Subject, small: Request) -> None:
    free = least_limit(subject, small)
    assert free is not None
    pinned = replace(small, memory_limit_bytes=free + MIB, pins=parse_pins(fix=["recompute=none"]))
    error = no_plan(replace(subject, retrace=None), solve_for(subject, pinned, ONE), 30, quiet)
    assert isinstance(error, InfeasibleError)
    assert "GiB in stage" in error.message
    assert "  without --fix recompute=none  " in error.remedy


def test_least_memory_is_the_fastest_plan_of_those_that_need_least(subject: Subject, small: Request) -> None:
    reached = reach(subject, small, Goal("memory"), ONE, quiet)
    solved, least = reached.solved, least_limit(subject, small)
    assert solved.best is not None
    assert solved.device_bytes(solved.best) <= least
    assert solved.request.memory_limit_bytes == small.memory_limit_bytes
    fastest = solve_for(subject, replace(small, memory_limit_bytes=least), ONE)
    assert fastest.best is not None
    assert solved.best.evaluation.step_time_s == fastest.best.evaluation.step_time_s


def test_fewest_gpus_and_least_cost_agree_with_every_count(subject: Subject, small: Request) -> None:
    steps = {}
    for count in gpu_counts(2, 8):
        best = solve_for(subject, replace(small, gpus=count), ONE).best
        assert best is not None
        steps[count] = best.evaluation.step_time_s
    cheapest = min(steps, key=lambda n: (n * steps[n], n))
    cost = reach(subject, small, Goal("cost", price_per_gpu_hour=2.0), ONE, quiet)
    assert cost.solved.request.gpus == cheapest
    fastest = min(steps, key=lambda n: (steps[n], n))
    wanted = steps[fastest] * 1.001
    few = reach(subject, small, Goal("gpus", target_step_time_s=wanted), ONE, quiet)
    assert few.solved.request.gpus == min(n for n, step in steps.items() if step <= wanted)
    with pytest.raises(InfeasibleError, match="No number of GPUs up to 2"):
        reach(subject, small, Goal("gpus", target_step_time_s=steps[fastest] / 2), ONE, quiet)


@pytest.mark.parametrize(
    ("objective", "target", "price", "said"),
    [("gpus", None, None, "--target-step-time"), ("time", 1.0, None, "--target-step-time"),
     ("cost", None, None, "--price"), ("cost", None, -1.0, "--price"), ("memory", None, 2.0, "--price")],
)  # fmt: skip
def test_a_goal_without_its_number_is_a_usage_error(objective: str, target, price, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Goal(objective, target, price)


def test_a_ranking_holds_different_layouts(subject: Subject, small: Request) -> None:
    result = solve_for(subject, small, SearchOptions(top=3, workers=1)).result
    layouts = [layout_key(ranked.key) for ranked in result.ranking]
    assert len(set(layouts)) == len(layouts) == 3
    steps = [ranked.evaluation.step_time_s for ranked in result.ranking]
    assert steps == sorted(steps)
    alone = solve_for(subject, small, ONE).best
    assert alone is not None
    assert steps[0] == pytest.approx(alone.evaluation.step_time_s, rel=1e-4)


def row(step_s: float, device_gib: float, tied: bool, **degrees: int) -> Alternative:
    mesh = MeshSection(**{f"{name}_degree": degree for name, degree in degrees.items()})  # type: ignore[arg-type]
    return Alternative(mesh=mesh, microbatch_size=1, microbatches=4, schedule="1f1b", recompute="none", zero_stage=3,
                       step_time_s=step_s, device_bytes=round(device_gib * 2**30), tied=tied)  # fmt: skip


def test_tied_layouts_go_by_memory_left_then_by_simplicity() -> None:
    full = row(1.0, 78, True, data_parallel_shard=8)
    roomy = row(1.02, 40, True, data_parallel_shard=4, tensor_parallel=2)
    simple = row(1.025, 40.5, True, data_parallel_shard=8)
    slow, slower = row(1.1, 10, False, tensor_parallel=8), row(1.2, 5, False, pipeline_parallel=8)
    assert in_order([slower, slow, full, roomy, simple], 80 * 2**30) == [simple, roomy, full, slow, slower]


def test_pins_of_layers_hold_in_the_plan(subject: Subject, small: Request) -> None:
    pins = parse_pins(fix=["tp=2", "layer:*.h.1=full", "layer:*.h.2=replicate", "layer:*.h.3=row"])
    free = solve_for(subject, replace(small, gpus=4, pins=parse_pins(fix=["tp=2"])), ONE)
    solved = solve_for(subject, replace(small, gpus=4, pins=pins), ONE)
    assert solved.best is not None
    assert free.best is not None
    assert solved.best.evaluation.step_time_s > free.best.evaluation.step_time_s
    problem = solved.model.problem(Mesh(*solved.best.key))
    names = [unit.fqn for unit in subject.graph.units]
    chosen = {
        name: layer.choices[choice]
        for name, layer, choice in zip(names, problem.layers, solved.best.assignment.choices, strict=True)
    }
    assert chosen["transformer.h.1"].name == "full"
    assert chosen["transformer.h.2"].sharding == "replicate"
    assert chosen["transformer.h.3"].sharding == "tp"
