"""The space of a real model: bounds as arrays are those of its problems, and memory and links behave."""

from __future__ import annotations

import json
import random
from dataclasses import astuple, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tpplan.hardware_profiles.catalog import Profile, load_profile
from tpplan.planner.bounds import lb0, memory_floor
from tpplan.planner.chunk_bounds import fixed_bound
from tpplan.planner.intervals import chain_arrays
from tpplan.planner.pins import parse_pins
from tpplan.planner.planning import SearchOptions, Solved, Subject, prepare, solve_for
from tpplan.planner.problem import Problem
from tpplan.planner.relaxation import least_memory, relax
from tpplan.planner.request import Request
from tpplan.planner.solve import solve
from tpplan.planner.space_bounds import space_bounds

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A GPT of four blocks on devices where nothing but tensors takes memory."""
    from tpplan.planner.suggest import traced
    from tpplan.planner.target import load_target

    sizes = {"n_layer": "4", "n_embd": "512", "n_head": "8", "vocab_size": "2048", "block_size": "256"}
    loaded = load_target(str(ROOT / "examples/nanogpt.py"), model_args=sizes, inputs=(), precision="bf16")
    return traced(loaded, bare(load_profile("h100-sxm")), 256, "bf16")


def bare(profile: Profile) -> Profile:
    """A profile without context and communicators, so that small limits mean something."""
    device = replace(profile.device, context_bytes=0, nccl_base_bytes=0, nccl_communicator_bytes=0)
    return replace(profile, device=device)


def request(limit_mib: int = 2048, pins: tuple[str, ...] = ()) -> Request:
    return Request(
        gpus=4, gpus_per_node=2, sequence_length=256, global_batch=16, precision="bf16", optimizer="adamw",
        memory_limit_bytes=limit_mib * MIB, gap=0.0, pins=parse_pins(fix=pins),
    )  # fmt: skip


def solved_for(subject: Subject, limit_mib: int) -> Solved:
    return solve_for(subject, request(limit_mib), SearchOptions(workers=1))


def least_bytes(problem: Problem) -> int:
    """The least limit under which the problem has a plan, exactly [B]."""
    if problem.ends is None:
        return least_memory(problem, chain_arrays(problem.layers))[0]
    return 1 + solve(replace(problem, memory_bytes=1)).shortfall_bytes


def test_bounds_as_arrays_are_those_of_the_problems(subject: Subject) -> None:
    for pins in ((), ("schedule=zb",)):
        model, meshes = prepare(subject, request(pins=pins))
        bounds, floors = space_bounds(model, meshes)
        some = random.Random(1).sample(range(len(meshes)), min(150, len(meshes)))
        assert {meshes[i].schedule for i in some} >= ({"zb"} if pins else {"1f1b", "gpipe", "interleaved"})
        close = 0
        for i in some:
            problem = model.problem(meshes[i])
            assert bounds[i] == pytest.approx(lb0(problem), rel=1e-12)
            least = least_bytes(problem)
            assert max(floors[i], memory_floor(problem)) <= least
            close += floors[i] > 0.6 * least
        assert close > 0.5 * len(some)


def best_s(solved: Solved) -> float:
    assert solved.best is not None
    return solved.best.evaluation.step_time_s


def test_no_mesh_has_a_better_plan(subject: Subject) -> None:
    """A sample of all meshes, each solved by itself without windows or bounds; tight enough for recomputation."""
    solved = solved_for(subject, 150)
    found = best_s(solved)
    assert solved.best is not None
    assert any(solved.best.assignment.choices)
    feasible = 0
    for mesh in random.Random(2).sample(solved.meshes, 50):
        problem = solved.model.problem(mesh)
        alone = solve(problem, gap=0.0)
        assert alone.status in ("optimal", "infeasible")
        assert alone.objective_s >= found * (1 - 1e-9)
        assert solved.result.bounds[astuple(mesh)] <= alone.objective_s * (1 + 1e-9)
        if problem.ends is not None:
            assert fixed_bound(problem) <= alone.objective_s
        else:
            relaxation = relax(problem, chain_arrays(problem.layers))
            assert max(lb0(problem), relaxation.lb1_s, relaxation.lb2_s) <= alone.objective_s
        feasible += alone.status == "optimal"
    assert feasible >= 10


def test_more_memory_is_never_worse(subject: Subject) -> None:
    steps = [best_s(solved_for(subject, limit)) for limit in (100, 150, 300)]
    assert all(tight >= loose for tight, loose in pairwise(steps))
    assert steps[0] > steps[-1]


def with_links(factor: float) -> dict[str, Any]:
    """The profile h100-sxm with all links `factor` times as fast, latencies as they are."""
    profile = json.loads(resources.files("tpplan.hardware_profiles").joinpath("h100-sxm.json").read_text())
    for link in profile["links"]:
        link["bandwidth_bytes_per_s"]["value"] *= factor
        for collective in link["collectives"].values():
            collective["bandwidth_bytes_per_s"] *= factor
            collective["rows"] = [[group, size, seconds / factor] for group, size, seconds in collective["rows"]]
    return profile


def test_more_bandwidth_is_never_worse(subject: Subject, tmp_path: Path) -> None:
    steps = []
    for factor in (0.02, 0.5, 2.0):
        file = tmp_path / f"{factor}.json"
        file.write_text(json.dumps(with_links(factor)))
        steps.append(best_s(solved_for(replace(subject, profile=bare(load_profile(str(file)))), 150)))
    assert all(slow >= fast for slow, fast in pairwise(steps))
    assert steps[0] > steps[-1]
