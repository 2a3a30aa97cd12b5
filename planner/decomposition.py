"""Dantzig-Wolfe decomposition by rank: a strong lower bound for given chunks (interleaved), and plans on the way.

Every critical path bounds the step, and so does every mixture of paths with weights that sum to 1. In a mixture each
chunk's times count with the mixture's weights, and no rank's memory depends on another's choices: every rank by itself
takes the choices of its whole layers that fit and weigh least. So

    L(mixture) = transfers + sum over ranks s of min over choices of s's layers that fit of their weighted times

never exceeds the optimum. Its maximum over mixtures is found by columns and rows in turn: a linear programme (the
master) mixes the ranks' choices found so far against the paths found so far; its duals are the next mixture, the
choices that are best for it are new columns, and the critical path of its mixed times is a new row. The relaxation of
the integer programme (`ilp`) also mixes choices that only fit in part, so its bound is lower: where memory is tight and
chunks are short, by some percent. With open boundaries little is won over `relaxation`, so they are left to the ILP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import highspy
import numpy as np

from ..costmodels.schedules import CriticalPath, StageTimes, in_flight_vectors, simulate
from .bounds import ROUNDING
from .chunk_bounds import chunks_of
from .evaluate import evaluate
from .knapsack import Front
from .problem import Assignment, Choice, Problem
from .runs import undominated

# The numbers of a choice that paths count, and then a cut's transfer.
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s", "weight_s")
# In turn: mixtures, until so many rounds together close less than a twentieth of what is left; then so many rounds
# of whole columns, of at most so many nodes of HiGHS's tree (not seconds: results are the same on every machine).
TURNS = ((10, 3), (30, 8))
WHOLE_NODES = 20


@dataclass(frozen=True, slots=True)
class Decomposed:
    """What the decomposition proved and found.

    lower_bound_s : proven bound of the step [s]
    step_s, assignment : the best plan that fits, inf and None without any
    paths : the critical paths that it met, rows for the integer programme
    """

    lower_bound_s: float
    step_s: float
    assignment: Assignment | None
    paths: tuple[CriticalPath, ...]


def decompose(
    problem: Problem,
    limit_s: float,
    gap: float,
    *,
    paths: Sequence[CriticalPath],
    start: Assignment | None = None,
    time_limit_s: float | None = None,
    turns: Sequence[tuple[int, int]] = TURNS,
) -> Decomposed:
    """Raise the bound until it is within `gap` of the best plan in hand, or it rises no more.

    Parameters
    ----------
    problem : Problem
        With given chunks.
    limit_s : float
        A step time in hand [s]; inf without any.
    gap : float
        Relative gap at which to stop.
    paths : sequence of CriticalPath
        At least one, to begin with.
    start : Assignment, optional
        A plan that fits.
    time_limit_s : float, optional
        Seconds after which to stop.
    turns : sequence of (patience, rounds)
        How long to go on (see `TURNS`).
    """
    deadline_s = inf if time_limit_s is None else time.monotonic() + time_limit_s
    state = _State(problem, limit_s)
    for path in paths:
        state.add_path(path)
    if start is not None:
        state.add_plan(start)
    mixture = np.full(len(state.paths), 1 / len(state.paths))
    for patience, rounds in turns:
        mixture = state.raise_bound(mixture, gap, deadline_s, patience)
        if state.bound_s >= state.limit_s * (1 - gap) or time.monotonic() > deadline_s:
            break
        state.combine(gap, deadline_s, rounds)
    return Decomposed(state.bound_s, state.step_s, state.assignment, tuple(state.paths))


@dataclass(slots=True)
class _Options:
    """The choices of a layer that no other dominates: `numbers` (options, TIMES), bytes, and their indices."""

    index: np.ndarray
    numbers: np.ndarray
    static: np.ndarray
    saved: np.ndarray
    transient: np.ndarray

    @staticmethod
    def of(choices: Sequence[Choice]) -> _Options:
        index = undominated(tuple(choices))
        kept = [choices[o] for o in index]
        return _Options(
            np.array(index),
            np.array([[getattr(c, name) for name in TIMES] for c in kept]),
            np.array([c.static_bytes for c in kept], float),
            np.array([c.saved_bytes for c in kept], float),
            np.array([c.transient_bytes for c in kept], float),
        )


@dataclass(slots=True)
class _State:
    """Paths, columns, the best plan and the bound; all seconds include `step_fixed_s`."""

    problem: Problem
    limit_s: float
    bound_s: float = 0.0
    step_s: float = inf
    assignment: Assignment | None = None
    paths: dict[CriticalPath, None] = field(default_factory=dict)
    columns: dict[tuple[int, tuple[int, ...]], None] = field(default_factory=dict)
    options: dict[int, _Options] = field(default_factory=dict)
    in_flight: list[tuple[int, ...]] = field(default_factory=list)
    master: _Master = field(init=False)

    def __post_init__(self) -> None:
        p = self.problem
        for layer in p.layers:
            if id(layer.choices) not in self.options:
                self.options[id(layer.choices)] = _Options.of(layer.choices)
        # Of a rank's vectors of microbatches in flight the one with most of them counts: a relaxation.
        vectors = in_flight_vectors(p.schedule, p.stages, p.microbatches, p.virtual)
        self.in_flight = [max(some, key=sum) for some in vectors]
        self.master = _Master(p)

    def positions(self, c: int) -> range:
        """The layers of chunk c."""
        assert self.problem.ends is not None
        return range(self.problem.ends[c - 1] if c else 0, self.problem.ends[c])

    def send_s(self, c: int) -> float:
        """The transfer behind chunk c."""
        end = self.positions(c).stop
        return self.problem.layers[end - 1].send_s if end < len(self.problem.layers) else 0.0

    def add_path(self, path: CriticalPath) -> None:
        """A row of the master, if it is new."""
        if path not in self.paths:
            self.paths[path] = None
            self.master.add_path(_counts(self.problem, path))

    def add_plan(self, assignment: Assignment) -> int:
        """The columns of a plan; how many of them are new."""
        before = len(self.columns)
        for s in range(self.problem.stages):
            chunks = chunks_of(self.problem, s)
            choices = tuple(assignment.choices[i] for c in chunks for i in self.positions(c))
            if (s, choices) not in self.columns:
                self.columns[s, choices] = None
                self.master.add_column(s, np.array([self.times(c, assignment.choices) for c in chunks]))
        return len(self.columns) - before

    def times(self, c: int, choices: Sequence[int]) -> list[float]:
        """Seconds of one chunk under the choices of all layers: `TIMES`, and its transfer."""
        out = [0.0] * len(TIMES)
        for i in self.positions(c):
            choice = self.problem.layers[i].choices[choices[i]]
            out = [x + getattr(choice, name) for x, name in zip(out, TIMES, strict=True)]
        return [*out, self.send_s(c)]

    def play(self, times: np.ndarray) -> CriticalPath:
        """The critical path when the chunks take `times` (chunks, TIMES and transfer)."""
        chunks = [StageTimes(*row[:5], send_s=row[6], weight_s=row[5]) for row in times.tolist()]
        p = self.problem
        return simulate(p.schedule, chunks, p.microbatches, virtual=p.virtual).critical_path

    def raise_bound(self, mixture: np.ndarray, gap: float, deadline_s: float, patience: int) -> np.ndarray:
        """Rounds of pricing and the master, until the gap is closed or the bound rises no more; the last mixture."""
        bounds: list[float] = []
        while True:
            mixture = np.concatenate((mixture, np.zeros(len(self.paths) - len(mixture))))
            news = self.price(mixture)
            target_s = self.limit_s * (1 - gap)
            if self.bound_s == inf or self.bound_s >= target_s or time.monotonic() > deadline_s:
                return mixture
            bounds.append(self.bound_s)
            if len(bounds) > patience:
                left_s = (target_s if target_s < inf else 2 * self.bound_s) - bounds[-patience]
                if self.bound_s - bounds[-patience] < left_s / 20:
                    return mixture
            mixture, times = self.master.solve()
            rows = len(self.paths)
            self.add_path(self.play(times))
            if not news and len(self.paths) == rows:
                return mixture

    def combine(self, gap: float, deadline_s: float, rounds: int) -> None:
        """Plans from whole columns: the best combination against the paths so far, its path added, and again."""
        known = list(self.columns)
        for _ in range(rounds):
            enough_s = self.bound_s / (1 - gap) - self.problem.step_fixed_s
            taken = self.master.solve_whole(enough_s, max(0.1, deadline_s - time.monotonic()))
            rows = len(self.paths)
            if taken is not None:
                self.take(self.joined([known[k][1] for k in taken]))
            if len(self.paths) == rows or self.bound_s >= self.limit_s * (1 - gap) or time.monotonic() > deadline_s:
                return

    def joined(self, picks: Sequence[Sequence[int]]) -> Assignment:
        """The plan in which rank s's layers take the choices picks[s]."""
        assert self.problem.ends is not None
        choices = [0] * len(self.problem.layers)
        for s, taken in enumerate(picks):
            for i, o in zip((i for c in chunks_of(self.problem, s) for i in self.positions(c)), taken, strict=True):
                choices[i] = o
        return Assignment(self.problem.ends, tuple(choices))

    def take(self, plan: Assignment) -> None:
        """Simulate a plan: its critical path is a row, and it is kept if it fits and is the best."""
        evaluation = evaluate(self.problem, plan)
        self.add_path(evaluation.timeline.critical_path)
        if evaluation.fits and evaluation.step_time_s < self.limit_s:
            self.limit_s = self.step_s = evaluation.step_time_s
            self.assignment = plan

    def price(self, mixture: np.ndarray) -> int:
        """The bound of one mixture of the paths, and its plan; how many of the plan's columns are new."""
        p = self.problem
        weights = np.tensordot(mixture, self.master.counts(), 1)
        total = sum(weights[c, len(TIMES)] * self.send_s(c) for c in range(p.chunks))
        picks = []
        for s in range(p.stages):
            value, taken = self.lightest(s, weights)
            total += value
            picks.append(taken)
        if total == inf:
            self.bound_s = inf
            return 0
        self.bound_s = max(self.bound_s, total * (1 - ROUNDING) + p.step_fixed_s)
        plan = self.joined(picks)
        news = self.add_plan(plan)
        self.take(plan)
        return news

    def lightest(self, s: int, weights: np.ndarray) -> tuple[float, list[int]]:
        """The least weighted time of rank s's layers that fit, and their choices in order; inf if nothing fits.

        For each largest transient among the choices, those with no larger one fill the room that it leaves.
        """
        p, best, best_front = self.problem, inf, None
        row, room = [], float(p.memory_bytes - p.stage_fixed_bytes)
        for c, x in zip(chunks_of(p, s), self.in_flight[s], strict=True):
            room -= x * p.layers[self.positions(c).start - 1].cut_bytes if c else 0
            by_kind = {}
            for i in self.positions(c):
                key = id(p.layers[i].choices)
                if key not in by_kind:
                    options = self.options[key]
                    by_kind[key] = options, options.static + x * options.saved, options.numbers @ weights[c, :-1]
                row.append(by_kind[key])
        for level in np.unique(np.concatenate([options.transient for options, _, _ in row])):
            front = Front.empty()
            for options, sizes, values in row:
                some = options.transient <= level
                front = front.extended(sizes[some], values[some], options.index[some], room - level)
                if not len(front.size):
                    break
            else:
                if front.value[-1] < best:
                    best, best_front = float(front.value[-1]), front
        return best, best_front.choices() if best_front is not None else []


def _counts(problem: Problem, path: CriticalPath) -> np.ndarray:
    """How often a path counts each time of each chunk: (chunks, TIMES and transfer)."""
    nothing = (0,) * problem.chunks
    rows = (path.forward, path.backward, path.first_forward, path.last_backward, path.tail, path.weight or nothing)
    return np.array([*rows, path.send], float).T


class _Master:
    """The linear programme over columns (the choices of one rank) and paths.

    min T; each rank's columns have weights that sum to 1; T >= every path's length, sum over columns of weight x path
    counts x times.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.scale = 0.0
        self.rows: list[np.ndarray] = []
        self.columns: list[tuple[int, np.ndarray]] = []
        self.highs = highspy.Highs()
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", 1)
        self.highs.addCol(1.0, 0.0, highspy.kHighsInf, 0, [], [])
        for _ in range(problem.stages):
            self.highs.addRow(1.0, 1.0, 0, [], [])

    def counts(self) -> np.ndarray:
        """(paths, chunks, TIMES and transfer)."""
        return np.array(self.rows)

    def add_path(self, counts: np.ndarray) -> None:
        """T - sum over columns >= 0."""
        self.rows.append(counts)
        lengths = [-self._length(counts, s, times) for s, times in self.columns]
        index = [0, *(k + 1 for k, length in enumerate(lengths) if length)]
        values = [1.0, *(length for length in lengths if length)]
        self.highs.addRow(0.0, highspy.kHighsInf, len(index), np.array(index), np.array(values))

    def add_column(self, s: int, times: np.ndarray) -> None:
        """A column of rank s: `times` of its chunks (chunks of the rank, TIMES and transfer)."""
        if not self.scale:
            self.scale = 1000 / max(1e-12, float(times[:, :2].sum()) * self.problem.microbatches)
        self.columns.append((s, times))
        lengths = [-self._length(counts, s, times) for counts in self.rows]
        index = [s, *(self.problem.stages + k for k, length in enumerate(lengths) if length)]
        values = [1.0, *(length for length in lengths if length)]
        self.highs.addCol(0.0, 0.0, highspy.kHighsInf, len(index), np.array(index), np.array(values))

    def _length(self, counts: np.ndarray, s: int, times: np.ndarray) -> float:
        """A column's part of a path, in units in which a step is about 1000."""
        return float((counts[s :: self.problem.stages] * times).sum()) * self.scale

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """The mixture of paths (its duals), and the chunks' mixed times."""
        self.highs.run()
        solution = self.highs.getSolution()
        dual = np.maximum(np.array(solution.row_dual)[self.problem.stages :], 0.0)
        times = np.zeros((self.problem.chunks, len(TIMES) + 1))
        for share, (s, own) in zip(np.array(solution.col_value)[1:], self.columns, strict=True):
            times[s :: self.problem.stages] += max(share, 0.0) * own
        return dual / max(dual.sum(), 1e-300), times

    def solve_whole(self, enough_s: float, time_limit_s: float) -> list[int] | None:
        """One whole column for each rank, the best against the paths, or one whose paths all end by `enough_s`.

        The columns' numbers; None if none was found.
        """
        highs, n = self.highs, len(self.columns)
        those = np.arange(1, n + 1)
        highs.setOptionValue("objective_target", enough_s * self.scale)
        highs.setOptionValue("mip_max_nodes", WHOLE_NODES)
        highs.setOptionValue("time_limit", highs.getRunTime() + time_limit_s)
        highs.changeColsIntegrality(n, those, np.full(n, highspy.HighsVarType.kInteger))
        highs.run()
        values = np.array(highs.getSolution().col_value)[1:]
        found = highs.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        highs.changeColsIntegrality(n, those, np.full(n, highspy.HighsVarType.kContinuous))
        highs.setOptionValue("objective_target", -highspy.kHighsInf)
        highs.setOptionValue("time_limit", highspy.kHighsInf)
        if not found:
            return None
        best: dict[int, int] = {}
        for k, (s, _) in enumerate(self.columns):
            if s not in best or values[k] > values[best[s]]:
                best[s] = k
        return [best[s] for s in range(self.problem.stages)]
