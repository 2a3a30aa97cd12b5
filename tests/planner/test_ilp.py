"""The integer programme against brute force on small problems."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from math import inf

import pytest
from brute_force import price_one, splits
from instances import Known, known, near_tie, random_problem
from tpplan.costmodels.schedules import SCHEDULES
from tpplan.planner import solve as solve_module
from tpplan.planner.engine import ENGINES, Outcome
from tpplan.planner.problem import Choice, Layer, Problem, Solution
from tpplan.planner.runs import fold
from tpplan.planner.solve import solve

INSTANCES = 500
BY_CBC = 15


@pytest.fixture(scope="module")
def instances() -> list[Known]:
    return [known(seed, SCHEDULES) for seed in range(INSTANCES)]


def check_solution(k: Known, solution: Solution, message: str) -> None:
    """An exact solution is brute force's optimum, in time and bytes; an infeasible one has the least shortfall."""
    if not k.feasible:
        assert solution.status == "infeasible", message
        assert solution.shortfall_bytes == k.answer.least_bytes - k.problem.memory_bytes, message
        assert 0 <= solution.shortfall_stage < k.problem.stages, message
        return
    assert solution.status == "optimal", message
    assert solution.assignment is not None, message
    assert solution.assignment.boundaries in splits(k.problem), message
    step_s, peaks = price_one(k.problem, solution.assignment)
    assert max(peaks) <= k.problem.memory_bytes, message
    assert solution.objective_s == pytest.approx(step_s, rel=1e-12), message
    assert solution.objective_s == pytest.approx(k.answer.optimum_s, rel=1e-9), message
    assert solution.lower_bound_s <= k.answer.optimum_s * (1 + 1e-9), message


def test_the_instances_are_hard_enough(instances: list[Known]) -> None:
    """At least 30 % memory-bound, 10 % infeasible, and a greedy baseline wrong in 30 % of the feasible ones."""
    feasible = [k for k in instances if k.feasible]
    assert sum(k.memory_bound for k in instances) >= 0.3 * len(instances)
    assert len(instances) - len(feasible) >= 0.1 * len(instances)
    assert sum(k.greedy_wrong for k in feasible) >= 0.3 * len(feasible)
    for schedule in SCHEDULES:
        assert sum(k.problem.schedule == schedule for k in instances) >= 0.15 * len(instances)


def test_the_optimum_is_that_of_brute_force(instances: list[Known]) -> None:
    for seed, k in enumerate(instances):
        solution = solve(k.problem, gap=0.0)
        check_solution(k, solution, f"instance {seed}")
        if k.feasible:
            assert k.answer.optimum_s * (1 - 1e-7) <= solution.lower_bound_s


def test_cbc_agrees(instances: list[Known]) -> None:
    for seed, k in enumerate(instances[:BY_CBC]):
        check_solution(k, solve(k.problem, gap=0.0, engine="cbc"), f"instance {seed}")


@pytest.mark.parametrize("grain", [1, 512])
def test_plans_a_few_bytes_apart_are_told_apart(grain: int) -> None:
    """In 100 GB, where real coefficients let HiGHS prove a wrong plan: some plans exceed the limit by a grain."""
    close = 0
    for seed in range(40):
        k = near_tie(seed, grain)
        check_solution(k, solve(k.problem, gap=0.0), f"near tie {seed}")
        over = [plans.peak_bytes.max(0) - k.problem.memory_bytes for plans in k.plans]
        close += any(((excess > 0) & (excess <= 20 * grain)).any() for excess in over)
    assert close >= 10


def test_a_gap_is_kept(instances: list[Known]) -> None:
    for k in instances[:60]:
        if k.feasible:
            solution = solve(k.problem, gap=0.05)
            assert solution.status == "optimal"
            assert solution.objective_s * (1 - 0.05) <= solution.lower_bound_s <= k.answer.optimum_s * (1 + 1e-9)


def test_a_cut_off_is_proven_or_beaten(instances: list[Known]) -> None:
    for k in instances[:60]:
        if k.feasible:
            optimum_s = k.answer.optimum_s
            above = solve(k.problem, optimum_s * 1.01, gap=0.0)
            assert above.objective_s == pytest.approx(optimum_s, rel=1e-9)
            below = solve(k.problem, optimum_s * 0.999, gap=0.0)
            assert (below.status, below.assignment) == ("cutoff", None)
            assert below.lower_bound_s == pytest.approx(optimum_s * 0.999)


def test_one_stage_is_a_knapsack() -> None:
    """Room for three layers without recomputation out of ten: seven pay for it."""
    layer = Layer(0, (Choice("none", 1.0, 2.0, saved_bytes=10), Choice("full", 1.0, 3.0, saved_bytes=1)))
    solution = solve(Problem((layer,) * 10, 1, 4, "1f1b", memory_bytes=37), gap=0.0)
    assert solution.assignment is not None
    assert sorted(solution.assignment.choices) == [0] * 3 + [1] * 7
    assert solution.objective_s == 4 * (30 + 7)


def test_runs_end_where_a_number_or_a_cut_changes() -> None:
    one = Layer(0, (Choice("none", 1.0, 2.0),))
    other = replace(one, cut_after=False)
    runs = fold(Problem((one, one, other, one, one, one), 1, 1, "1f1b", 1))
    assert [(r.start, r.count) for r in runs] == [(0, 2), (2, 1), (3, 3)]


def test_too_few_cuts_are_infeasible_without_a_shortfall() -> None:
    layer = Layer(0, (Choice("none", 1.0, 2.0),), cut_after=False)
    solution = solve(Problem((layer,) * 4, 2, 4, "1f1b", memory_bytes=1))
    assert (solution.status, solution.shortfall_bytes, solution.shortfall_stage) == ("infeasible", 0, -1)


def test_a_time_limit_ends_with_a_true_bound() -> None:
    rng = random.Random(5)
    problem = replace(random_problem(rng, 6, ("1f1b",)), stages=1)
    solution = solve(problem, time_limit_s=0.0)
    assert solution.status == "feasible"
    assert solution.lower_bound_s <= solve(problem, gap=0.0).objective_s


def test_a_solver_error_means_rebuild(monkeypatch: pytest.MonkeyPatch, instances: list[Known]) -> None:
    k = next(k for k in instances if k.feasible)
    calls = []

    def failing(model: object, *, relax: bool = False, **options: object) -> Outcome:
        calls.append(relax)
        if len(calls) <= 2:
            return Outcome("error", -inf, False)
        return ENGINES["highs"](model, relax=relax, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(solve_module.ENGINES, "failing", failing)
    solution = solve(k.problem, gap=0.0, engine="failing")
    assert len(calls) >= 3
    assert solution.objective_s == pytest.approx(k.answer.optimum_s, rel=1e-9)


def test_a_pick_that_rounding_let_through_is_tightened_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit 100 bytes short in 80 GiB is invisible to the solver; the byte check is not fooled."""
    gib = 2**30
    layer = Layer(0, (Choice("none", 1.0, 2.0, saved_bytes=10 * gib), Choice("full", 1.0, 3.0, saved_bytes=gib)))
    solution = solve(Problem((layer,) * 8, 1, 4, "1f1b", memory_bytes=80 * gib - 1), gap=0.0)
    assert solution.assignment is not None
    assert sum(solution.assignment.choices) == 1
    assert solution.lower_bound_s <= solution.objective_s == 4 * 25


def test_a_real_size_is_quick() -> None:
    """34 layers on 4 stages: well under a second of processor time, as nothing here should ever take minutes."""
    block = Layer(
        1,
        (
            Choice("none", 2.0, 4.0, static_bytes=50, saved_bytes=30),
            Choice("full", 2.0, 6.0, static_bytes=50, saved_bytes=3),
        ),
        send_s=0.01,
        cut_bytes=2,
    )
    head = Layer(2, (Choice("none", 3.0, 6.0, static_bytes=150, saved_bytes=40),))
    start = time.process_time()
    solution = solve(Problem((head, *(block,) * 32, head), 4, 32, "1f1b", 1400, 100), gap=0.001)
    assert solution.status == "optimal"
    assert solution.objective_s * 0.999 <= solution.lower_bound_s
    assert time.process_time() - start < 20
