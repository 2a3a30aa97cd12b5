"""Bounds are bounds: against brute force with tight, loose and infinite targets, and against the simulator."""

from __future__ import annotations

import random
from math import inf

import numpy as np
import pytest
from instances import Known, known
from tpplan.costmodels.schedules import StageTimes, simulate
from tpplan.planner.bounds import lb0, longest_rank, memory_floor, mixture
from tpplan.planner.chunk_bounds import fixed_bound
from tpplan.planner.intervals import chain_arrays
from tpplan.planner.problem import Choice, Layer, Problem
from tpplan.planner.relaxation import least_memory, relax

OPEN = ("1f1b", "gpipe", "zb")
"""Schedules whose boundaries are open; interleaved chunks are given."""


@pytest.fixture(scope="module")
def instances() -> list[Known]:
    return [known(10_000 + seed, OPEN, 5) for seed in range(300)]


@pytest.fixture(scope="module")
def chunked() -> list[Known]:
    return [known(20_000 + seed, ("interleaved",), 6) for seed in range(120)]


def test_no_bound_exceeds_the_optimum_and_lb2_is_close(instances: list[Known]) -> None:
    ratios: dict[str, list[float]] = {schedule: [] for schedule in OPEN}
    for k in instances:
        relaxation = relax(k.problem, chain_arrays(k.problem.layers))
        for bound in (lb0(k.problem), relaxation.lb1_s, relaxation.lb2_s):
            assert bound <= k.answer.optimum_s
        if not k.feasible:
            continue
        ratios[k.problem.schedule].append(relaxation.lb2_s / k.answer.optimum_s)
    for schedule, least in (("1f1b", 0.95), ("gpipe", 0.95), ("zb", 0.88)):
        assert len(ratios[schedule]) > 60
        assert sum(ratios[schedule]) / len(ratios[schedule]) > least


def test_no_bound_of_given_chunks_exceeds_the_optimum(chunked: list[Known]) -> None:
    ratios, infeasible = [], 0
    for k in chunked:
        bounds = lb0(k.problem), fixed_bound(k.problem)
        assert memory_floor(k.problem) <= k.answer.least_bytes
        assert least_memory(k.problem, chain_arrays(k.problem.layers))[0] <= k.answer.least_bytes
        if k.feasible:
            assert max(bounds) <= k.answer.optimum_s
            ratios.append(bounds[1] / k.answer.optimum_s)
        infeasible += bounds[1] == inf
    assert len(ratios) > 60
    assert sum(ratios) / len(ratios) > 0.95
    assert infeasible >= 3


@pytest.mark.parametrize("limit", [0.8, 1.0, 1.0 + 1e-9, 1.3, inf])
@pytest.mark.parametrize("looseness", [1.0, 1.1, inf])
def test_windows_keep_every_plan_within_the_target(instances: list[Known], looseness: float, limit: float) -> None:
    """Whatever step time (`limit` x optimum) the relaxation may leave out, below it nothing is lost."""
    for k in instances[:150]:
        if not k.feasible:
            continue
        target, limit_s = k.answer.optimum_s * looseness, k.answer.optimum_s * limit
        relaxation = relax(k.problem, chain_arrays(k.problem.layers), limit_s)
        assert max(relaxation.lb1_s, relaxation.lb2_s) <= k.answer.optimum_s
        windows = relaxation.windows(target)
        for plans in k.plans:
            steps = plans.step_s[plans.peak_bytes.max(0) <= k.problem.memory_bytes]
            wanted = (steps <= target) & (steps < limit_s)
            inside = bool(windows) and all(lo <= b <= hi for b, (lo, hi) in zip(plans.boundaries, windows, strict=True))
            assert inside or not wanted.any()


def test_windows_close_below_the_bound(instances: list[Known]) -> None:
    for k in instances:
        if k.feasible:
            relaxation = relax(k.problem, chain_arrays(k.problem.layers))
            assert relaxation.windows(relaxation.lb2_s * 0.999) == ()


def test_infinite_means_infeasible(instances: list[Known]) -> None:
    seen = 0
    for k in instances:
        if relax(k.problem, chain_arrays(k.problem.layers)).lb2_s == inf:
            assert not k.feasible
            seen += 1
        assert memory_floor(k.problem) <= k.answer.least_bytes
    assert seen >= 10


def test_least_memory_is_exact(instances: list[Known]) -> None:
    for k in instances:
        least, stage = least_memory(k.problem, chain_arrays(k.problem.layers))
        assert least == k.answer.least_bytes
        attained = (
            ((plans.peak_bytes.max(0) == least) & (plans.peak_bytes[stage] == least)).any() for plans in k.plans
        )
        assert any(attained)


@pytest.mark.parametrize("schedule", OPEN)
def test_the_mixture_bounds_every_split(schedule: str) -> None:
    rng = random.Random(schedule)
    for _ in range(400):
        pp, m = rng.randint(1, 6), rng.randint(1, 12)
        backward = [rng.expovariate(0.5) for _ in range(pp)]
        times = [StageTimes(rng.expovariate(1), b, weight_s=rng.random() * b) for b in backward]
        work = sum(t.forward_s + t.backward_s for t in times)
        step = simulate(schedule, times, m).step_time_s
        assert mixture(schedule, pp, m) * work <= step * (1 + 1e-12)


def test_the_longest_rank_bounds_every_interleaved_step() -> None:
    rng = random.Random(11)
    for _ in range(300):
        pp, v, m = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 12)
        if m % max(1, m // pp):
            continue
        times = [StageTimes(rng.expovariate(1), rng.expovariate(0.5), send_s=rng.random()) for _ in range(pp * v)]
        work = np.array([[t.forward_s + t.backward_s] for t in times])
        bound = float(longest_rank(work, pp, np.array([m]))[0])
        assert bound <= simulate("interleaved", times, m, virtual=v).step_time_s * (1 + 1e-12)


def test_the_textbook_bubble_is_no_bound_with_few_microbatches() -> None:
    """1F1B with M = pp = 2: stages of 2 and 1 units of work take 4 < (M + pp - 1)/pp x 3 = 4.5."""
    step = simulate("1f1b", [StageTimes(2 / 3, 4 / 3), StageTimes(1 / 3, 2 / 3)], 2).step_time_s
    assert mixture("1f1b", 2, 2) * 3 <= step + 1e-12 < (2 + 2 - 1) / 2 * 3


def test_one_stage_without_memory_pressure_is_exact() -> None:
    layer = Layer(0, (Choice("none", 1.0, 2.0, 0.5, 0.25, 0.125, saved_bytes=1),))
    problem = Problem((layer,) * 5, 1, 8, "1f1b", 10**6, step_fixed_s=0.5)
    expected = 5 * (8 * 3 + 0.875) + 0.5
    assert lb0(problem) == pytest.approx(expected, rel=1e-8)
    assert relax(problem, chain_arrays(problem.layers)).lb2_s == pytest.approx(expected, rel=1e-8)


def test_memory_is_priced() -> None:
    """Ten layers, room for four without recomputation: the other six each cost one second a microbatch."""
    layer = Layer(0, (Choice("none", 1.0, 2.0, saved_bytes=11), Choice("full", 1.0, 3.0, saved_bytes=1)))
    problem = Problem((layer,) * 10, 1, 2, "1f1b", memory_bytes=50)
    assert relax(problem, chain_arrays(problem.layers)).lb2_s == pytest.approx(2 * (30 + 6), rel=1e-8)
