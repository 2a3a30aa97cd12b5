"""The search over candidates against exhaustive enumeration, its certificate, and its speed."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf

import pytest
from instances import LLAMA_8B, LLAMA_70B, every, random_limit, random_problem, transformer_space
from tpplan.planner.problem import Choice, Layer, Problem
from tpplan.planner.search import Candidate, Progress, search
from tpplan.planner.solve import solve


def random_space(seed: int, count: int = 5) -> tuple[list[Candidate], dict[tuple, float], dict[tuple, int]]:
    """Random candidates, the optimum of each (inf: infeasible) and its least limit minus the limit."""
    rng = random.Random(20_000 + seed)
    candidates, optima, short = [], {}, {}
    for k in range(count):
        problem = random_problem(rng, 4)
        evaluations = [e for _, e in every(problem)]
        peaks = sorted(max(e.stage_bytes) for e in evaluations) or [0]
        problem = replace(problem, memory_bytes=random_limit(rng, peaks) if seed % 5 else peaks[0] - 1 - k)
        candidates.append(Candidate((k,), partial(replace, problem)))
        fits = [e.step_time_s for e in evaluations if max(e.stage_bytes) <= problem.memory_bytes]
        optima[(k,)] = min(fits, default=inf)
        if evaluations:
            short[(k,)] = peaks[0] - problem.memory_bytes
    return candidates, optima, short


def test_the_best_candidate_is_the_exhaustive_one() -> None:
    infeasible = solved = 0
    for seed in range(60):
        candidates, optima, short = random_space(seed)
        result = search(candidates, gap=0.0)
        best = min(optima.values())
        if best == inf:
            infeasible += 1
            assert result.status == "infeasible"
            assert result.shortfall_bytes == min(short.values())
            assert short[result.shortfall_key] == result.shortfall_bytes
            assert result.shortfall_stage >= 0
            continue
        solved += result.solved
        assert result.best is not None
        assert result.status == "optimal"
        assert result.best.evaluation.step_time_s == pytest.approx(best, rel=1e-9)
        assert result.lower_bound_s == pytest.approx(best, rel=1e-6)
        for key, bound in result.bounds.items():
            assert bound <= optima[key] * (1 + 1e-9)
    assert infeasible >= 6
    assert solved >= 30  # the others are proven by bounds alone


def test_the_top_k_are_ranked() -> None:
    for seed in (1, 2, 3, 4, 6, 7):
        candidates, optima, _ = random_space(seed, 6)
        result = search(candidates, gap=0.0, top=3)
        expected = sorted(value for value in optima.values() if value < inf)[:3]
        assert [r.evaluation.step_time_s for r in result.ranking] == pytest.approx(expected, rel=1e-9)


def test_equal_steps_go_to_the_smaller_key() -> None:
    layer = Layer(0, (Choice("none", 1.0, 2.0, saved_bytes=1),))
    problem = Problem((layer,) * 4, 1, 2, "1f1b", memory_bytes=100)
    result = search([Candidate((key,), lambda: problem) for key in (3, 1, 2)])
    assert result.best is not None
    assert result.best.key == (1,)


def test_no_legal_split_anywhere() -> None:
    layer = Layer(0, (Choice("none", 1.0, 2.0, saved_bytes=1),), cut_after=False)
    result = search([Candidate((0,), lambda: Problem((layer,) * 4, 2, 2, "1f1b", memory_bytes=100))])
    assert (result.status, result.shortfall_bytes, result.shortfall_stage) == ("infeasible", 0, -1)


def test_a_transformer_space_is_proven() -> None:
    """8B on 16 GPUs with 30 GiB: every candidate solved by itself, without bounds or windows, is no better."""
    candidates = transformer_space(LLAMA_8B, 16, memory_bytes=30 * 2**30)
    result = search(candidates)
    assert result.best is not None
    assert result.status == "optimal"
    assert result.gap <= 0.005
    assert sum(result.pruned.values()) + result.infeasible <= result.candidates == len(candidates)
    best = result.best.evaluation.step_time_s
    checked = 0
    for candidate in candidates:
        problem = candidate.build()
        if problem.stages <= 4 and candidate.key[2] == 1:
            solution = solve(problem, best, gap=0.005, time_limit_s=20)
            assert solution.status == "cutoff", candidate.key
            assert result.bounds[candidate.key] == inf or result.bounds[candidate.key] >= best * 0.994
            checked += 1
    assert checked >= 100


def test_the_search_is_deterministic() -> None:
    candidates = transformer_space(LLAMA_8B, 16, memory_bytes=30 * 2**30)
    first, second = search(candidates), search(list(reversed(candidates)))
    assert first == second


def test_an_interrupt_returns_the_best_so_far() -> None:
    candidates = transformer_space(LLAMA_70B, 64)
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if progress.incumbent_s < inf:
            raise KeyboardInterrupt

    result = search(candidates, gap=0.0, on_progress=stop)
    assert result.status == "feasible"
    assert result.best is not None
    assert seen[-1].incumbent_s == result.best.evaluation.step_time_s
    assert 0 < result.gap == pytest.approx(1 - result.lower_bound_s / result.best.evaluation.step_time_s)
    assert result.lower_bound_s <= search(candidates).lower_bound_s * (1 + 1e-9)


def test_no_time_is_no_claim() -> None:
    result = search(transformer_space(LLAMA_8B, 16), time_limit_s=0.0)
    assert (result.status, result.best, result.lower_bound_s, result.gap) == ("unknown", None, 0.0, inf)


def test_progress_only_gets_better() -> None:
    seen: list[Progress] = []
    search(transformer_space(LLAMA_70B, 64), on_progress=seen.append)
    assert len(seen) >= 3
    for before, after in pairwise(seen):
        assert after.incumbent_s <= before.incumbent_s
        assert after.bound_s >= before.bound_s
    assert seen[-1].done == seen[-1].total


@pytest.mark.parametrize("memory_gib", [15, 40, 79])
def test_a_thousand_candidates_take_seconds(memory_gib: int) -> None:
    """951 candidates of 82 layers, also when nothing fits; the bound leaves room for a slow, shared machine."""
    candidates = transformer_space(LLAMA_70B, 64, memory_bytes=memory_gib * 2**30)
    start = time.process_time()
    result = search(candidates)
    assert time.process_time() - start < 10
    assert result.status == ("infeasible" if memory_gib == 15 else "optimal")
    assert (result.shortfall_bytes > 0) == (memory_gib == 15)


def test_the_number_of_workers_changes_nothing() -> None:
    candidates = transformer_space(LLAMA_8B, 16, memory_bytes=30 * 2**30)
    alone, together = search(candidates, workers=1), search(candidates, workers=2)
    assert alone == together
    assert alone.best is not None


def test_of_a_group_only_the_best_is_ranked() -> None:
    candidates, optima, _ = random_space(3, 6)
    result = search(candidates, gap=0.0, top=2, group=lambda key: key[0] % 2)
    best = [min(v for (k,), v in optima.items() if k % 2 == parity) for parity in (0, 1)]
    assert [r.evaluation.step_time_s for r in result.ranking] == pytest.approx(sorted(best), rel=1e-9)
