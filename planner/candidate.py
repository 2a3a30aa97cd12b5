"""The two tasks of a search on one candidate: bound it (and guess a plan), or solve it exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from .bounds import ROUNDING
from .chunk_bounds import fixed_bound, path_bound
from .decomposition import TURNS, decompose
from .evaluate import evaluate
from .greedy import fill
from .intervals import chain_arrays
from .problem import Assignment, Problem
from .relaxation import Relaxation, relax
from .solve import seed_paths, solve


@dataclass(frozen=True, slots=True)
class Candidate:
    """One mesh: a sortable key, and a function that prices it.

    `bound_s` and `excess_bytes` are its lb0 and its memory floor minus the limit (`bounds`), where they are known.
    """

    key: tuple
    build: Callable[[], Problem]
    bound_s: float | None = None
    excess_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a task found out about a candidate.

    proof : where the bound comes from: lb0, lb1, lb2, fixed (given chunks), exact, memory, or limit (time ran out)
    bound_s : proven lower bound [s]; inf if nothing fits
    closed : solved, to the gap
    step_s, assignment : the best plan that fits, inf and None without any
    seconds : what it took, by part (bounds, ilps, simulation)
    """

    proof: str
    bound_s: float
    closed: bool = False
    step_s: float = inf
    assignment: Assignment | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    solves: int = 0


class Stopwatch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What passed since the last lap belongs to `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def bound(candidate: Candidate, bound_s: float, limit_s: float) -> Found:
    """lb1 and lb2 of a candidate (given chunks: their own bound), and a greedy plan where they are below `limit_s`."""
    watch = Stopwatch()
    problem = candidate.build()
    proof = "lb0"
    splits: list[tuple[int, ...]] = []
    relaxation = None
    if problem.ends is not None:
        bounds = {"fixed": fixed_bound(problem, limit_s)}
        splits.append(problem.ends)
    else:
        relaxation = relaxation_of(problem, limit_s)
        bounds = {"lb1": relaxation.lb1_s, "lb2": relaxation.lb2_s}
    for name, value in bounds.items():
        if value > bound_s:
            bound_s, proof = value, "memory" if value == inf else name
    if relaxation is not None and bound_s < limit_s:
        splits += [relaxation.boundaries(slack) for slack in (0.0, 0.01)]
    watch.lap("bounds")
    best, step_s = None, inf
    for split in dict.fromkeys(splits) if bound_s < limit_s else ():
        assignment = fill(problem, split)
        if assignment is not None:
            evaluation = evaluate(problem, assignment)
            if problem.ends is not None:
                value = path_bound(problem, evaluation.timeline.critical_path) * (1 - ROUNDING) + problem.step_fixed_s
                bound_s, proof = max((bound_s, proof), (value, "fixed"))
            if evaluation.fits and evaluation.step_time_s < step_s:
                best, step_s = assignment, evaluation.step_time_s
    watch.lap("simulation")
    return Found(proof, bound_s, False, step_s, best, watch.seconds)


def solve_exactly(
    candidate: Candidate,
    bound_s: float,
    limit_s: float,
    gap: float,
    time_limit_s: float | None,
    *,
    cutoff_gap: float | None = None,
    quickly: bool = False,
) -> Found:
    """A candidate below limit_s (1 - cutoff_gap), to the gap: given chunks by decomposition, then the programme.

    The programme looks within the windows that the bounds leave open. `quickly` leaves given chunks at what a
    short decomposition finds; the gap may stay open then.
    """
    watch = Stopwatch()
    problem = candidate.build()
    cut = gap if cutoff_gap is None else cutoff_gap
    target_s = limit_s * (1 - cut)
    windows = None
    if problem.ends is None:
        windows = relaxation_of(problem, limit_s).windows(target_s)
        if not windows:
            watch.lap("bounds")
            return Found("lb2", max(bound_s, target_s), True, seconds=watch.seconds)
    watch.lap("bounds")
    given = None
    if problem.ends is not None:
        start = fill(problem, problem.ends)
        turns = TURNS[:1] if quickly else TURNS
        paths = seed_paths(problem)
        given = decompose(problem, limit_s, gap, paths=paths, start=start, time_limit_s=time_limit_s, turns=turns)
        watch.lap("ilps")
        bound_s = max(bound_s, given.lower_bound_s)
        limit_s = min(limit_s, given.step_s)
        if quickly or bound_s >= limit_s * (1 - gap):
            solved = given.assignment is not None and bound_s >= given.step_s * (1 - gap)
            proof = "memory" if bound_s == inf else "exact" if solved else "fixed"
            return Found(proof, bound_s, True, given.step_s, given.assignment, watch.seconds, int(solved))
        time_limit_s = None if time_limit_s is None else max(0.0, time_limit_s - watch.seconds["ilps"])
    solution = solve(
        problem,
        limit_s,
        gap,
        time_limit_s,
        windows=windows,
        lower_bound_s=given.lower_bound_s if given else 0.0,
        paths=given.paths if given else (),
        cutoff_gap=cut,
    )
    watch.lap("ilps")
    if solution.status == "infeasible":
        return Found("memory", inf, True, seconds=watch.seconds, solves=1)
    bound_s = max(bound_s, solution.lower_bound_s)
    proof = "limit" if solution.status == "feasible" else "exact"
    step_s, assignment = solution.objective_s, solution.assignment
    if assignment is None and given is not None:
        step_s, assignment = given.step_s, given.assignment
    return Found(proof, bound_s, True, step_s, assignment, watch.seconds, 1)


def relaxation_of(problem: Problem, limit_s: float) -> Relaxation:
    """The dynamic programmes of a problem with open boundaries, for steps below `limit_s`."""
    return relax(problem, chain_arrays(problem.layers), limit_s)
