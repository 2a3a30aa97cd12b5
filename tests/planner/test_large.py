"""Exactness beyond brute force: large problems by two engines, and what a proven optimum must obey."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from brute_force import answer, every_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import known, random_limit, random_problem, with_kinds
from large_oracle import large_given, large_problem, optimum, optimum_given
from tpplan.costmodels.schedules import SCHEDULES
from tpplan.planner.chunk_bounds import fixed_bound
from tpplan.planner.intervals import chain_arrays
from tpplan.planner.problem import Choice, Layer, Problem
from tpplan.planner.relaxation import relax
from tpplan.planner.runs import fold
from tpplan.planner.solve import solve


def recomputable(problem: Problem) -> Problem:
    """The problem with those choices alone that differ from a layer's first one in backward time and bytes."""

    def alike(a: Choice, b: Choice) -> bool:
        names = ("forward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s", "weight_s")
        return all(getattr(a, name) == getattr(b, name) for name in names)

    layers = [
        replace(layer, choices=tuple(c for c in layer.choices if alike(c, layer.choices[0])))
        for layer in problem.layers
    ]
    return replace(problem, layers=with_kinds(layers))


def test_the_second_engine_is_brute_force_on_small_problems() -> None:
    bound = infeasible = 0
    for seed in range(120):
        rng = random.Random(30_000 + seed)
        problem = recomputable(random_problem(rng, 6, SCHEDULES))
        plans = list(every_plan(problem))
        if not plans:
            continue
        peaks = sorted(int(peak) for p in plans for peak in p.peak_bytes.max(0))
        problem = replace(problem, memory_bytes=random_limit(rng, peaks))
        expected = answer(problem, plans)
        best, _ = optimum(problem) if problem.ends is None else optimum_given(problem)
        assert best == pytest.approx(expected.optimum_s, rel=1e-12)
        bound += expected.unlimited_s < expected.optimum_s < inf
        infeasible += expected.optimum_s == inf
    assert bound >= 36
    assert infeasible >= 12


@pytest.mark.parametrize("seed", [18, 19])
def test_two_exact_engines_agree_on_a_large_problem(seed: int) -> None:
    """benchmarks/exactness.py has thirty of these."""
    problem = large_problem(seed)
    best, _ = optimum(problem)
    relaxation = relax(problem, chain_arrays(problem.layers))
    first = solve(problem, gap=0.02, windows=relaxation.windows(inf))
    windows = relaxation.windows(first.objective_s * (1 + 1e-9))
    solution = solve(problem, gap=1e-6, windows=windows)
    assert relaxation.lb2_s <= best
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.lower_bound_s <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", [5, 9, 11])
def test_two_exact_engines_agree_on_given_chunks(seed: int) -> None:
    problem = large_given(seed)
    best, _ = optimum_given(problem)
    solution = solve(problem, gap=1e-6)
    assert fixed_bound(problem) <= best
    assert solution.objective_s == pytest.approx(best, rel=1e-6)
    assert solution.lower_bound_s <= best * (1 + 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_folded_equals_unfolded(schedule: str) -> None:
    """A run of equal layers against the same layers, each of a kind of its own."""
    folded = 0
    for seed in range(25):
        k = known(40_000 + seed, (schedule,), 5)
        alone = replace(k.problem, layers=tuple(replace(layer, kind=i) for i, layer in enumerate(k.problem.layers)))
        folded += any(run.count > 1 for run in fold(k.problem))
        assert all(run.count == 1 for run in fold(alone))
        together, apart = solve(k.problem, gap=0.0), solve(alone, gap=0.0)
        assert together.status == apart.status
        assert together.objective_s == pytest.approx(apart.objective_s, rel=1e-9)
        assert together.shortfall_bytes == apart.shortfall_bytes
    assert folded >= 5


def least_limit(problem: Problem) -> int:
    """The least limit under which a plan fits [B]; 0 without a legal split."""
    plans = list(every_plan(problem))
    return answer(problem, plans).least_bytes if plans else 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), schedule=st.sampled_from(SCHEDULES), room=st.integers(0, 40), more=st.integers(1, 40)
)
def test_more_memory_is_never_worse(seed: int, schedule: str, room: int, more: int) -> None:
    problem = random_problem(random.Random(seed), 5, (schedule,))
    if limit := least_limit(problem):
        small = solve(replace(problem, memory_bytes=limit + room), gap=0.0)
        large = solve(replace(problem, memory_bytes=limit + room + more), gap=0.0)
        assert small.status == large.status == "optimal"
        assert large.objective_s <= small.objective_s * (1 + 1e-9)


def faster_links(layer: Layer, factor: float) -> Layer:
    """The layer with transfers and once-a-step communication that take `factor` of their time."""
    choices = tuple(
        replace(
            c,
            first_forward_extra_s=factor * c.first_forward_extra_s,
            last_backward_extra_s=factor * c.last_backward_extra_s,
        )
        for c in layer.choices
    )
    return replace(layer, choices=choices, send_s=factor * layer.send_s)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), schedule=st.sampled_from(SCHEDULES), room=st.integers(0, 40), factor=st.floats(0, 1))
def test_more_bandwidth_is_never_worse(seed: int, schedule: str, room: int, factor: float) -> None:
    problem = random_problem(random.Random(seed), 5, (schedule,))
    if limit := least_limit(problem):
        slow = replace(problem, memory_bytes=limit + room)
        fast = replace(slow, layers=with_kinds([faster_links(layer, factor) for layer in slow.layers]))
        assert solve(fast, gap=0.0).objective_s <= solve(slow, gap=0.0).objective_s * (1 + 1e-9)
