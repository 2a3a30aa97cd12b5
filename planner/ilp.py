"""The integer programme of one problem: stage boundaries and recomputation counts, minimising the step time.

Sets
    s in 0..S-1     pipeline stages
    r in 0..R-1     runs: n_r adjacent equal layers (`runs.fold`)
    o in O_r        choices of a layer of run r that no other choice dominates

Given
    f, v, first, last, tail [r, o]   seconds; static, saved, transient [r, o]   bytes
    send_r, cut_r                    seconds and bytes of a cut behind a layer of run r
    x_s                              in-flight microbatches of stage s, from the simulated order
    cap                              memory limit minus the bytes fixed on every stage
    P                                critical paths (`CriticalPath`): each one bounds every step from below
    [lo_s, hi_s]                     windows: boundaries outside are proven to be no better, or impossible

Decide
    q[s, r, o]   integer, layers of run r that stage s holds with choice o
    c[s, r]      integer, layers of run r in stages 0..s
    g[s, r]      binary, stages 0..s hold at least one layer of run r (for n_r = 1 it is c[s, r] itself)
    b[s]         integer, position behind the last layer of stage s
    y[s, k]      binary, stage s holds a layer whose transient is at least the k-th smallest one
    F, V, first, last, tail, P [s]   seconds of stage s (V: backward, P: transfer to the next stage)
    T            step time without what is fixed

Objective        minimise T                                                                  `build`
                 (when memory is short: minimise the slack z added to cap, same rows)

Subject to
    assign       c[s, r] = c[s-1, r] + sum_o q[s, r, o],  c[S-1, r] = n_r                    `assign_rows`
    position     b[s] = sum_r c[s, r],  b[s] >= b[s-1] + 1,  lo_s <= b[s] <= hi_s            `position_rows`
    order        c[s, r] <= n_r g[s, r],  n_r g[s, r+1] <= c[s, r]                           `order_rows`
    cut          l[s, r] := g[s, r] - g[s, r+1] = 1 where stage s ends in run r;
                 l[s, r] = 0 where no cut is legal                                           `cut_rows`
    transient    y[s, k] = 1 if stage s holds a transient of t_k or more                     `transient_rows`
    memory       sum (static + x_s saved) q + x_s sum_r cut_r l[s-1, r]
                 + sum_k (t_k - t_k-1) y[s, k] <= cap                                        `memory_rows`
    stage time   F[s] = sum f q, V[s] = sum v q, ..., P[s] = sum_r send_r l[s, r]            `time_rows`
    path         T >= sum_s of the path's counts times the stage's seconds, for p in P       `path_row`

The paths are added lazily: solve, simulate the pick, add its critical path, until model and simulator agree
(`solve.solve`). A path counts events of a fixed order, so it is a valid row for all assignments: the
programme is always a relaxation, and its dual bound a proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pulp

from ..costmodels.schedules import CriticalPath, StageTimes, in_flight_microbatches
from .problem import Assignment, Choice, Problem
from .runs import Run

Terms = dict[pulp.LpVariable, float]
Row = tuple[str, Terms, int, float]

LE, EQ, GE = pulp.LpConstraintLE, pulp.LpConstraintEQ, pulp.LpConstraintGE
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s", "send_s")


@dataclass(frozen=True, slots=True)
class Scale:
    """Model units: `time` per second (steps near 1000), `memory` per byte (limits near 100).

    HiGHS accepts violations of 1e-6 or so; in these units that is 1e-9 of a step and 1e-8 of the memory.
    """

    time: float
    memory: float


@dataclass(frozen=True, slots=True)
class Programme:
    """The model and the variables by which its answers are read."""

    problem: Problem
    runs: tuple[Run, ...]
    scale: Scale
    model: pulp.LpProblem
    step: pulp.LpVariable
    counts: Mapping[tuple[int, int, int], pulp.LpVariable]
    times: Mapping[tuple[int, str], pulp.LpVariable]

    def pick(self) -> Assignment:
        """The assignment of the model's present values; layers of a run take its choices in index order."""
        boundaries, choices = [], [-1] * len(self.problem.layers)
        filled = [run.start for run in self.runs]
        for s in range(self.problem.stages):
            for r, run in enumerate(self.runs):
                for o in run.options:
                    variable = self.counts.get((s, r, o))
                    for _ in range(round(variable.value() or 0) if variable is not None else 0):
                        choices[filled[r]] = o
                        filled[r] += 1
            boundaries.append(max(f for f, run in zip(filled, self.runs, strict=True) if f > run.start))
        return Assignment(tuple(boundaries), tuple(choices))

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Seconds of each stage at the model's present values, fractional ones included."""
        return tuple(
            StageTimes(*(max(0.0, (self.times[s, name].value() or 0) / self.scale.time) for name in TIMES))
            for s in range(self.problem.stages)
        )


@dataclass(frozen=True, slots=True)
class _Variables:
    """Decisions by index; windows leave some of them out, and those are constants in the `Terms` helpers."""

    q: dict[tuple[int, int, int], pulp.LpVariable]
    c: dict[tuple[int, int], pulp.LpVariable | int]
    g: dict[tuple[int, int], pulp.LpVariable | int]
    b: dict[int, pulp.LpVariable | int]
    windows: tuple[tuple[int, int], ...]

    def surely_held(self, s: int, run: Run) -> bool:
        """Whether stage s holds a layer of `run` wherever its boundaries fall in their windows."""
        latest_start = self.windows[s - 1][1] if s else 0
        return max(run.start, latest_start) < min(run.end, self.windows[s][0])


def build(
    problem: Problem,
    runs: tuple[Run, ...],
    windows: Sequence[tuple[int, int]],
    scale: Scale,
    *,
    slack: bool = False,
) -> Programme:
    """The programme without paths; `slack` minimises the memory shortfall instead of the step time.

    Parameters
    ----------
    windows : sequence of (lo, hi)
        For each stage the range of positions at which it may end; the last is (n, n).
    """
    model = pulp.LpProblem("tpplan", pulp.LpMinimize)
    step = model.add_variable("T", lowBound=0)
    variables = _variables(model, runs, windows)
    times = {(s, name): model.add_variable(f"{name}_{s}", lowBound=0) for s in range(problem.stages) for name in TIMES}
    short = model.add_variable("shortfall", lowBound=0) if slack else None
    model.setObjective(pulp.LpAffineExpression({short if short is not None else step: 1.0}))
    rows = [
        assign_rows(problem, runs, variables),
        position_rows(problem, runs, variables),
        order_rows(problem, runs, variables),
        cut_rows(problem, runs, variables),
        memory_rows(problem, model, runs, variables, scale, short),
        time_rows(problem, runs, variables, times, scale),
    ]
    for family in rows:
        for row in family:
            add_row(model, row)
    return Programme(problem, runs, scale, model, step, variables.q, times)


def add_row(model: pulp.LpProblem, row: Row) -> None:
    """One named row into the model."""
    name, terms, sense, rhs = row
    model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, name, rhs))


def _variables(model: pulp.LpProblem, runs: tuple[Run, ...], windows: Sequence[tuple[int, int]]) -> _Variables:
    """Variables where the windows leave something to decide, constants elsewhere."""
    out = _Variables({}, {}, {}, {}, tuple(windows))
    for s, (low, high) in enumerate(windows):
        out.b[s] = low if low == high else model.add_variable(f"b_{s}", low, high, pulp.LpInteger)
        before = windows[s - 1][0] if s else 0
        for r, run in enumerate(runs):
            if high <= run.start or low >= run.end:
                out.c[s, r] = 0 if high <= run.start else run.count
            else:
                most = min(run.count, high - run.start)
                least = max(0, low - run.start)
                out.c[s, r] = model.add_variable(f"c_{s}_{r}", least, most, pulp.LpInteger)
            if low > run.start or high <= run.start:
                out.g[s, r] = int(low > run.start)
            elif run.count == 1:
                out.g[s, r] = out.c[s, r]
            else:
                out.g[s, r] = model.add_variable(f"g_{s}_{r}", 0, 1, pulp.LpInteger)
            if high > run.start and before < run.end:
                for o in run.options:
                    out.q[s, r, o] = model.add_variable(f"q_{s}_{r}_{o}", 0, run.count, pulp.LpInteger)
    return out


def _row(name: str, terms: Sequence[tuple[pulp.LpVariable | int, float]], sense: int, rhs: float) -> Row:
    """A row whose constants move to the right-hand side."""
    collected: Terms = {}
    for variable, coefficient in terms:
        if isinstance(variable, int):
            rhs -= variable * coefficient
        else:
            collected[variable] = collected.get(variable, 0.0) + coefficient
    return name, collected, sense, rhs


def assign_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """c[s, r] - c[s-1, r] - sum_o q[s, r, o] = 0; c[S-1, r] = n_r comes with the last window."""
    for s in range(problem.stages):
        for r, run in enumerate(runs):
            taken = [(v.q[s, r, o], -1.0) for o in run.options if (s, r, o) in v.q]
            yield _row(f"assign_{s}_{r}", [(v.c[s, r], 1.0), (v.c.get((s - 1, r), 0), -1.0), *taken], EQ, 0)


def position_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """b[s] = sum_r c[s, r] and b[s] >= b[s-1] + 1."""
    for s in range(problem.stages):
        held = [(v.c[s, r], -1.0) for r in range(len(runs))]
        yield _row(f"position_{s}", [(v.b[s], 1.0), *held], EQ, 0)
        yield _row(f"filled_{s}", [(v.b[s], 1.0), (v.b.get(s - 1, 0), -1.0)], GE, 1)


def order_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """c[s, r] <= n_r g[s, r] and n_r g[s, r+1] <= c[s, r]: a run begins when the one before is complete."""
    for s in range(problem.stages):
        for r, run in enumerate(runs):
            if run.count > 1:
                yield _row(f"begun_{s}_{r}", [(v.c[s, r], 1.0), (v.g[s, r], -run.count)], LE, 0)
                yield _row(f"begins_{s}_{r}", [(v.c[s, r], 1.0), (v.g[s, r], -1.0)], GE, 0)
            if r + 1 < len(runs):
                yield _row(f"order_{s}_{r}", [(v.g[s, r + 1], run.count), (v.c[s, r], -1.0)], LE, 0)


def _ends_in(v: _Variables, s: int, r: int, runs: tuple[Run, ...], factor: float) -> list:
    """Terms of factor * l[s, r], with l[s, r] = g[s, r] - g[s, r+1]."""
    behind = v.g[s, r + 1] if r + 1 < len(runs) else 0
    return [(v.g[s, r], factor), (behind, -factor)]


def cut_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """l[s, r] = 0 where no stage may end behind a layer of run r (the last stage ends at the end)."""
    for s in range(problem.stages - 1):
        for r, run in enumerate(runs):
            if not run.layer.cut_after:
                yield _row(f"cut_{s}_{r}", _ends_in(v, s, r, runs, 1.0), EQ, 0)


def memory_rows(
    problem: Problem,
    model: pulp.LpProblem,
    runs: tuple[Run, ...],
    v: _Variables,
    scale: Scale,
    short: pulp.LpVariable | None,
) -> Iterator[Row]:
    """sum (static + x_s saved) q + x_s sum_r cut_r l[s-1, r] + transient_s <= cap (+ shortfall)."""
    in_flight = in_flight_microbatches(problem.schedule, problem.stages, problem.microbatches)
    cap = (problem.memory_bytes - problem.stage_fixed_bytes) * scale.memory
    for s, x in enumerate(in_flight):
        terms: list[tuple[pulp.LpVariable | int, float]] = []
        for r, run in enumerate(runs):
            for o, choice in _held(v, s, r, run):
                size = choice.static_bytes + x * choice.saved_bytes
                terms.append((v.q[s, r, o], size * scale.memory))
            if s and run.layer.cut_bytes:
                terms += _ends_in(v, s - 1, r, runs, x * run.layer.cut_bytes * scale.memory)
        lowest, steps, rows = transient_rows(model, runs, v, s, scale)
        yield from rows
        if short is not None:
            terms.append((short, -1.0))
        yield _row(f"memory_{s}", [*terms, *steps], LE, cap - lowest)


def _held(v: _Variables, s: int, r: int, run: Run) -> Iterator[tuple[int, Choice]]:
    """The choices of run r that stage s may hold."""
    for o in run.options:
        if (s, r, o) in v.q:
            yield o, run.layer.choices[o]


def transient_rows(
    model: pulp.LpProblem, runs: tuple[Run, ...], v: _Variables, s: int, scale: Scale
) -> tuple[float, list[tuple[pulp.LpVariable, float]], list[Row]]:
    """The stage's largest transient as lowest + sum_k (t_k - t_k-1) y[s, k].

    The lowest is what layers that the stage surely holds need at least. Returns it, the terms of the sum, and the
    rows that set y[s, k] = 1 as soon as the stage holds a layer of transient t_k or more: y[s, k] >= y[s, k+1], and
    for each run and each transient t_k of its own, sum_{o: t_o >= t_k} q[s, r, o] <= n_r y[s, k].
    """
    held = {r: [(o, choice.transient_bytes) for o, choice in _held(v, s, r, run)] for r, run in enumerate(runs)}
    least = {r: min(transient for _, transient in options) for r, options in held.items() if options}
    lowest = max((least[r] for r in least if v.surely_held(s, runs[r])), default=min(least.values()))
    levels = sorted({transient for options in held.values() for _, transient in options if transient > lowest})
    y = {level: model.add_variable(f"y_{s}_{level}", 0, 1, pulp.LpInteger) for level in levels}
    terms = [(y[level], (level - below) * scale.memory) for below, level in pairwise([lowest, *levels])]
    rows = [_row(f"nested_{s}_{b}", [(y[a], 1.0), (y[b], -1.0)], GE, 0) for a, b in pairwise(levels)]
    for r, options in held.items():
        for level in sorted({transient for _, transient in options if transient > lowest}):
            large = [(v.q[s, r, o], 1.0) for o, transient in options if transient >= level]
            rows.append(_row(f"transient_{s}_{level}_{r}", [*large, (y[level], -runs[r].count)], LE, 0))
    return lowest * scale.memory, terms, rows


def time_rows(
    problem: Problem,
    runs: tuple[Run, ...],
    v: _Variables,
    times: Mapping[tuple[int, str], pulp.LpVariable],
    scale: Scale,
) -> Iterator[Row]:
    """Each stage's seconds as sums over what it holds, and its transfer by where it ends."""
    for s in range(problem.stages):
        for name in TIMES[:-1]:
            terms: list[tuple[pulp.LpVariable | int, float]] = [(times[s, name], 1.0)]
            for r, run in enumerate(runs):
                for o, choice in _held(v, s, r, run):
                    terms.append((v.q[s, r, o], -getattr(choice, name) * scale.time))
            yield _row(f"{name}_row_{s}", terms, EQ, 0)
        sends: list[tuple[pulp.LpVariable | int, float]] = [(times[s, "send_s"], 1.0)]
        if s + 1 < problem.stages:
            for r, run in enumerate(runs):
                sends += _ends_in(v, s, r, runs, -run.layer.send_s * scale.time)
        yield _row(f"send_row_{s}", sends, EQ, 0)


def path_row(programme: Programme, path: CriticalPath, name: str) -> Row:
    """T >= the length of one critical path, in the stages' times."""
    terms: Terms = {programme.step: 1.0}
    counts = (path.forward, path.backward, path.first_forward, path.last_backward, path.tail, path.send)
    for field, per_stage in zip(TIMES, counts, strict=True):
        for s, count in enumerate(per_stage):
            if count:
                terms[programme.times[s, field]] = -float(count)
    return name, terms, GE, 0.0
