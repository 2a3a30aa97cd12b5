"""The decomposition by rank: its bound never exceeds the optimum, its plans are plans, it decides large problems."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from brute_force import answer, every_plan
from instances import random_limit, random_problem
from large_oracle import large_given
from tpplan.planner.bounds import lb0
from tpplan.planner.chunk_bounds import fixed_bound, rank_bound
from tpplan.planner.decomposition import decompose
from tpplan.planner.evaluate import evaluate
from tpplan.planner.front import convex_front
from tpplan.planner.greedy import fill
from tpplan.planner.problem import Choice, Layer, Problem
from tpplan.planner.solve import seed_paths, solve


def limited(seed: int) -> tuple[Problem, float]:
    """A small random problem with given chunks and a memory limit, and its optimum (inf: nothing fits)."""
    rng = random.Random(70_000 + seed)
    while True:
        problem = random_problem(rng, 6, ("interleaved",))
        plans = list(every_plan(problem))
        if plans:
            break
    peaks = sorted(int(peak) for p in plans for peak in p.peak_bytes.max(0))
    problem = replace(problem, memory_bytes=random_limit(rng, peaks))
    return problem, answer(problem, plans).optimum_s


def test_bounds_and_plans_against_brute_force() -> None:
    met = infeasible = 0
    for seed in range(80):
        problem, optimum_s = limited(seed)
        for limit_s in (inf, optimum_s * 1.01, optimum_s * 0.99):
            found = decompose(problem, limit_s, 1e-6, paths=seed_paths(problem))
            assert found.lower_bound_s <= optimum_s * (1 + 1e-9)
            if found.assignment is not None:
                evaluation = evaluate(problem, found.assignment)
                assert evaluation.fits
                assert evaluation.step_time_s == found.step_s < limit_s
                assert found.step_s >= optimum_s * (1 - 1e-9)
        assert rank_bound(problem) <= optimum_s * (1 + 1e-9)
        assert fixed_bound(problem, 0.9 * optimum_s if optimum_s < inf else inf) <= optimum_s * (1 + 1e-9)
        infeasible += optimum_s == inf
        found = decompose(problem, inf, 1e-6, paths=seed_paths(problem))
        met += optimum_s < inf and found.lower_bound_s >= found.step_s * (1 - 1e-6)
    assert infeasible >= 5
    assert met >= 40  # where it proves the optimum by itself


def test_its_bound_is_above_those_of_single_paths() -> None:
    """Large problems with tight memory: this is what it is for."""
    better = 0
    for seed in range(4):
        problem = large_given(seed)
        greedy = fill(problem, problem.ends or ())
        if greedy is None:
            continue
        step_s = evaluate(problem, greedy).step_time_s
        found = decompose(problem, step_s, 1e-3, paths=seed_paths(problem), start=greedy)
        simple = max(lb0(problem), fixed_bound(problem))
        assert found.lower_bound_s >= simple * (1 - 1e-9) or found.lower_bound_s >= step_s * (1 - 1e-3)
        better += found.lower_bound_s > simple * (1 + 1e-6)
        exact = solve(problem, gap=1e-6, time_limit_s=30)
        assert found.lower_bound_s <= exact.objective_s * (1 + 1e-9)
    assert better >= 1


def test_long_fronts_are_merged_downwards() -> None:
    """Thousands of distinct sums are merged to a bound that is still one (and near)."""
    rng = random.Random(5)
    layers = []
    for k in range(24):
        choices = [Choice("none", 1.0, 2.0, saved_bytes=1000 + rng.randint(0, 10**6))]
        for _ in range(3):
            slower = choices[0].backward_s + rng.random()
            choices.append(Choice("full", 1.0, slower, saved_bytes=rng.randint(0, choices[0].saved_bytes)))
        layers.append(Layer(k, tuple(choices)))
    problem = Problem(tuple(layers), 2, 4, "interleaved", 10**7, virtual=2, ends=(6, 12, 18, 24))
    need = sum(min(c.saved_bytes for c in layer.choices) for layer in layers)
    problem = replace(problem, memory_bytes=int(need * 2.2))
    found = decompose(problem, inf, 1e-4, paths=seed_paths(problem))
    exact = solve(problem, gap=1e-6, time_limit_s=60)
    assert exact.status == "optimal"
    assert found.lower_bound_s <= exact.objective_s * (1 + 1e-9)
    assert found.lower_bound_s >= exact.objective_s * 0.97


def test_nothing_fits() -> None:
    layer = Layer(0, (Choice("none", 1.0, 2.0, static_bytes=10),))
    problem = Problem((layer,) * 4, 2, 2, "interleaved", 18, virtual=2, ends=(1, 2, 3, 4))
    assert decompose(problem, inf, 0.01, paths=seed_paths(problem)).lower_bound_s == inf
    assert rank_bound(problem) == inf
    assert decompose(replace(problem, memory_bytes=20), inf, 0.01, paths=seed_paths(problem)).step_s == pytest.approx(
        solve(replace(problem, memory_bytes=20)).objective_s
    )


def test_convex_fronts_leave_out_what_is_dominated() -> None:
    assert convex_front([(1.0, 5.0, 0), (1.5, 5.0, 1), (3.0, 1.0, 2), (2.9, 4.9, 3)]) == [(1.0, 5.0, 0), (3.0, 1.0, 2)]
