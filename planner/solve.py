"""The exact optimum of one problem: integer programme and simulator in turn until they agree.

    rows = critical paths of synthetic stage times
    repeat on the LP relaxation: solve, simulate the fractional stage times, add the critical path
    repeat on the ILP:           solve, simulate the pick, add the critical path
    until bound >= best simulated step x (1 - gap)

A pick's step time is always the simulator's, and its memory is checked again in bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf

from ..costmodels.schedules import CriticalPath, StageTimes, Timeline, simulate
from .engine import ENGINES, Outcome, remaining
from .evaluate import Evaluation, evaluate
from .ilp import Programme, Scale, add_row, build, path_row
from .problem import Assignment, Problem, Solution
from .runs import Run, fold

# Relative tolerance of the solver itself: a bound this close to the best step proves it.
EXACT = 1e-9
LP_ROUNDS = 40
# Stages of a pipeline that are slow in turn for the paths to begin with, at most.
MOST_SEEDS = 32
# By how much the limit is tightened when rounding in the solver let a pick exceed it [B].
TIGHTEN_BYTES = 2048


def solve(
    problem: Problem,
    upper_bound_s: float = inf,
    gap: float = 0.005,
    time_limit_s: float | None = None,
    *,
    windows: Sequence[tuple[int, int]] | None = None,
    engine: str = "highs",
    lower_bound_s: float = 0.0,
    paths: Sequence[CriticalPath] = (),
    cutoff_gap: float | None = None,
) -> Solution:
    """The assignment with the least simulated step time, and the proof.

    Parameters
    ----------
    problem : Problem
    upper_bound_s : float
        A step time already in hand [s]: only assignments below upper_bound_s (1 - gap) are of interest.
    gap : float
        Relative gap at which to stop; 0 goes to the solver's tolerance (1e-9).
    time_limit_s : float, optional
        Limit of the whole call [s].
    windows : sequence of (lo, hi), optional
        For each chunk the positions at which it may end; default: all.
    engine : str
        "highs" or "cbc".
    lower_bound_s : float
        A proven bound of the step time [s].
    paths : sequence of CriticalPath
        More paths to begin with.
    cutoff_gap : float, optional
        Only assignments below the step in hand x (1 - cutoff_gap) are of interest; default: `gap`.

    Returns
    -------
    Solution
        "optimal": `assignment` is within `gap` of the optimum. "cutoff": nothing below
        upper_bound_s (1 - gap) exists, or below the solution's `lower_bound_s`. "infeasible": no assignment fits
        in memory; `shortfall_bytes` is the least excess and `shortfall_stage` its stage (0 and -1 if there are
        fewer legal pieces than stages).
        "feasible": the time limit came first; `assignment` may be None.
    """
    deadline_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    allowed = tuple(windows) if windows is not None else open_windows(problem)
    if not allowed:
        return Solution("infeasible", None, inf, inf)
    cut = gap if cutoff_gap is None else min(gap, cutoff_gap)
    rounds = _Rounds(
        problem,
        fold(problem),
        allowed,
        engine,
        max(gap, EXACT),
        deadline_s,
        upper_bound_s,
        lower_bound_s,
        max(cut, EXACT),
    )
    for path in paths:
        rounds.add_path(path)
    status = rounds.relaxations() or rounds.integers()
    if status == "infeasible":
        short = _shortfall(rounds)
        if short.assignment is None:
            return short
        # The programme's rounding refused what fits in bytes: search just above the limit, picks are checked.
        rounds.rebuild(replace(problem, memory_bytes=problem.memory_bytes + TIGHTEN_BYTES))
        rounds.take(short.assignment)
        status = rounds.integers()
    return Solution(status, rounds.assignment, rounds.objective_s, min(rounds.bound_s, rounds.limit_s))


def open_windows(problem: Problem) -> tuple[tuple[int, int], ...]:
    """For each chunk the positions at which it may end, by legal cuts or as given; empty if there are too few cuts.

    >>> from tpplan.planner.problem import Choice, Layer
    >>> layer = Layer(0, (Choice("none", 1.0, 2.0),))
    >>> open_windows(Problem((layer,) * 5, 3, 4, "1f1b", 1))
    ((1, 3), (2, 4), (5, 5))
    """
    if problem.ends is not None:
        return tuple((end, end) for end in problem.ends)
    n, pp = len(problem.layers), problem.stages
    cuts = [i + 1 for i, layer in enumerate(problem.layers[:-1]) if layer.cut_after]
    if len(cuts) < pp - 1:
        return ()
    return (*((cuts[s], cuts[len(cuts) - (pp - 1) + s]) for s in range(pp - 1)), (n, n))


def scale_of(problem: Problem, runs: Sequence[Run]) -> Scale:
    """Units in which a step is about 1000."""
    work = sum(run.count * min(c.forward_s + c.backward_s for c in run.layer.choices) for run in runs) * (
        problem.microbatches + problem.stages - 1
    )
    step_s = work / problem.stages
    return Scale(1000.0 / step_s if step_s > 0 else 1.0)


def seed_paths(problem: Problem) -> list[CriticalPath]:
    """Critical paths to begin with: of equal stages, and of one stage slower than the others (little, much).

    Any path is a valid row; these are those of the usual bottlenecks, and save rounds.
    """
    return list(_seed_paths(problem.schedule, problem.stages, problem.microbatches, problem.virtual))


@lru_cache(maxsize=64)
def _seed_paths(schedule: str, stages: int, microbatches: int, virtual: int) -> tuple[CriticalPath, ...]:
    """The paths of a pipeline, whatever its layers; of a long one every second, fourth, ... stage is slow in turn."""
    chunks = stages * virtual
    paths = []
    for slow in (1.001, 4.0):
        for s in range(0, chunks, -(-chunks // MOST_SEEDS)) if virtual == 1 else (0, chunks - 1):
            times = [_one_slow(slow if s == t else 1.0) for t in range(chunks)]
            paths.append(simulate(schedule, times, microbatches, virtual=virtual).critical_path)
    return tuple(dict.fromkeys(paths))


def _one_slow(factor: float) -> StageTimes:
    """Forward 1, backward 2 (of which 1 for weights), times a factor."""
    return StageTimes(factor, 2 * factor, weight_s=factor)


def _simulate(problem: Problem, times: Sequence[StageTimes]) -> Timeline:
    return simulate(problem.schedule, times, problem.microbatches, virtual=problem.virtual)


@dataclass(slots=True)
class _Rounds:
    """The state of one solve; all seconds include `step_fixed_s`."""

    problem: Problem
    runs: tuple[Run, ...]
    windows: tuple[tuple[int, int], ...]
    engine: str
    gap: float
    deadline_s: float | None
    limit_s: float
    bound_s: float = 0.0
    cut: float = EXACT
    objective_s: float = inf
    assignment: Assignment | None = None
    paths: dict[CriticalPath, None] = field(default_factory=dict)
    programme: Programme = field(init=False)
    mip_rounds: int = 0
    exact: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.paths = dict.fromkeys(seed_paths(self.problem))
        self.rebuild(self.problem)

    def rebuild(self, problem: Problem) -> None:
        """A fresh model with all the paths so far."""
        scale = scale_of(self.problem, self.runs)
        programme = build(problem, self.runs, self.windows, scale, exact=self.exact)
        self.programme = programme
        for k, path in enumerate(self.paths):
            add_row(programme.model, path_row(programme, path, f"path_{k}"))
        self.cut_off()

    def cut_off(self) -> None:
        """T <= best (1 - cut): what is not better is of no interest."""
        if self.limit_s < inf:
            target_s = self.limit_s * (1 - self.cut) - self.problem.step_fixed_s
            self.programme.step.upBound = max(0.0, target_s * self.programme.scale.time)

    def add_path(self, path: CriticalPath) -> bool:
        """Add a row; False if the model has it."""
        if path in self.paths:
            return False
        add_row(self.programme.model, path_row(self.programme, path, f"path_{len(self.paths)}"))
        self.paths[path] = None
        return True

    def raise_bound(self, model_bound: float) -> None:
        """A dual bound of the model, in its units, proves this much."""
        bound_s = model_bound / self.programme.scale.time + self.problem.step_fixed_s
        self.bound_s = max(self.bound_s, bound_s)

    def proven(self) -> bool:
        """Whether the bound is within the gap of the best step."""
        return self.bound_s >= self.limit_s * (1 - self.gap)

    def ended(self) -> str:
        """The status once the gap is closed."""
        return "cutoff" if self.assignment is None else "optimal"

    def out_of_reach(self) -> str:
        """The status of a model without a point: the cut-off is proven, or without one memory is short."""
        if self.limit_s == inf:
            return "infeasible"
        self.bound_s = max(self.bound_s, self.limit_s * (1 - self.cut))
        return self.ended()

    def relaxations(self) -> str | None:
        """Paths from the LP relaxation; a status if that decides, else None."""
        for _ in range(LP_ROUNDS):
            left = remaining(self.deadline_s)
            if left == 0.0:
                return "feasible"
            outcome = ENGINES[self.engine](self.programme.model, relax=True, time_limit_s=left)
            if outcome.status == "infeasible":
                return self.out_of_reach()
            if outcome.status != "optimal":
                return None
            self.raise_bound(outcome.bound * (1 - EXACT))
            if self.proven():
                return self.ended()
            times = self.programme.stage_times()
            timeline = _simulate(self.problem, times)
            model_s = (self.programme.step.value() or 0.0) / self.programme.scale.time
            if timeline.step_time_s <= model_s * (1 + 1e-4) or not self.add_path(timeline.critical_path):
                return None
        return None

    def integers(self) -> str:
        """Rounds of the ILP until its bound meets the best simulated step."""
        errors = 0
        tightened = 0
        while True:
            left = remaining(self.deadline_s)
            if left == 0.0:
                return "feasible"
            self.mip_rounds += 1
            outcome = ENGINES["cbc" if errors > 1 else self.engine](
                self.programme.model, gap=self.gap / 4 if self.gap > EXACT else 0.0, time_limit_s=left
            )
            if outcome.status == "error":
                errors += 1
                if errors > 3:
                    return "feasible"
                self.rebuild(replace(self.problem, memory_bytes=self.problem.memory_bytes - tightened))
                continue
            if outcome.status == "infeasible":
                return "feasible" if tightened else self.out_of_reach()
            if not tightened:
                self.raise_bound(outcome.bound * (1 - EXACT))
            if outcome.has_pick:
                evaluation = self.take(self.programme.pick())
                if self.proven():
                    return self.ended()
                over = {s for s, size in enumerate(evaluation.stage_bytes) if size > self.problem.memory_bytes}
                if over - self.exact:
                    self.exact |= over
                    self.rebuild(replace(self.problem, memory_bytes=self.problem.memory_bytes - tightened))
                elif over:
                    tightened += max(TIGHTEN_BYTES, 2 * evaluation.shortfall[0])
                    self.rebuild(replace(self.problem, memory_bytes=self.problem.memory_bytes - tightened))
                elif not self.add_path(evaluation.timeline.critical_path) and outcome.status == "optimal":
                    # Model and simulator agree to rounding: the pick is the model's optimum.
                    return "optimal" if self.bound_s >= self.limit_s * (1 - 1e-6) else "feasible"
                self.cut_off()
            elif outcome.status == "limit":
                return "feasible"

    def take(self, assignment: Assignment) -> Evaluation:
        """Simulate a pick and keep it if it fits and is the best."""
        evaluation = evaluate(self.problem, assignment)
        if evaluation.fits and evaluation.step_time_s < self.limit_s:
            self.limit_s = self.objective_s = evaluation.step_time_s
            self.assignment = assignment
        return evaluation


def _shortfall(rounds: _Rounds) -> Solution:
    """The same model with slack on memory, minimised: by how much it cannot fit, and where."""
    programme = build(rounds.problem, rounds.runs, rounds.windows, rounds.programme.scale, slack=True)
    outcome = Outcome("error", -inf, False)
    for engine in (rounds.engine, "highs", "cbc"):
        outcome = ENGINES[engine](programme.model, gap=1e-6, time_limit_s=remaining(rounds.deadline_s))
        if outcome.has_pick:
            break
    if not outcome.has_pick:
        return Solution("infeasible", None, inf, inf)
    assignment = programme.pick()
    short, stage = evaluate(rounds.problem, assignment).shortfall
    return Solution("infeasible", None if short else assignment, inf, inf, short, stage)


def solved_programme(problem: Problem, gap: float = 0.005) -> Programme:
    """The integer programme of a problem with every path that its solution needed, and without a cut-off.

    Its optimum is a lower bound of the step time, within `gap` of the best simulated step.
    """
    gap = max(gap, EXACT)
    rounds = _Rounds(problem, fold(problem), open_windows(problem), "highs", gap, None, inf, cut=gap)
    if rounds.relaxations() is None:
        rounds.integers()
    rounds.programme.step.upBound = None
    return rounds.programme
