"""The integer programme of one problem: chunk boundaries and choices of layers, minimising the step time.

Sets
    c in 0..C-1     chunks of the pipeline, C = pp v; chunk c runs on rank c mod pp (v = 1: the stages)
    r in 0..R-1     runs: n_r adjacent equal layers (`runs.fold`)
    o in O_r        choices of a layer of run r that no other choice dominates (recomputation, ZeRO level, tp or whole)

Given
    f, v, first, last, tail, w [r, o]   seconds; static, saved, transient [r, o]   bytes
    send_r, cut_r                       seconds and bytes of a cut behind a layer of run r
    X_s                                 largest vectors x of microbatches in flight in rank s's chunks, from its order
    cap                                 memory limit minus the bytes fixed on every rank
    P                                   critical paths (`CriticalPath`): each one bounds every step from below
    [lo_c, hi_c]                        windows: boundaries outside are proven to be no better, or impossible

Decide
    q[c, r, o]   integer, layers of run r that chunk c holds with choice o
    c[c, r]      integer, layers of run r in chunks 0..c
    g[c, r]      binary, chunks 0..c hold at least one layer of run r (for n_r = 1 it is c[c, r] itself)
    b[c]         integer, position behind the last layer of chunk c
    y[s, k]      binary, rank s holds a layer whose transient is at least the k-th smallest one
    h[s, x]      integer, grains of G bytes that the rests of the sizes fill (exact ranks alone)
    F, V, first, last, tail, P, W [c]   seconds of chunk c (V: backward, P: transfer to the next; W: "zb" alone)
    T            step time without what is fixed

Objective        minimise T                                                                  `build`
                 (when memory is short: minimise the slack z added to cap, same rows)

Subject to
    assign       c[c, r] = c[c-1, r] + sum_o q[c, r, o],  c[C-1, r] = n_r                    `assign_rows`
    position     b[c] = sum_r c[c, r],  b[c] >= b[c-1] + 1,  lo_c <= b[c] <= hi_c            `position_rows`
    order        c[c, r] <= n_r g[c, r],  n_r g[c, r+1] <= c[c, r]                           `order_rows`
    cut          l[c, r] := g[c, r] - g[c, r+1] = 1 where chunk c ends in run r;
                 l[c, r] = 0 where no cut is legal                                           `cut_rows`
    transient    y[s, k] = 1 if rank s holds a transient of t_k or more                      `transient_rows`
    memory       sum over chunks c of rank s of sum (static + x_c saved) q + x_c sum_r cut_r l[c-1, r]
                 + sum_k (t_k - t_k-1) y[s, k] <= cap,  for x in X_s                         `memory_rows`
                 in whole units of G bytes, rounded down; on ranks where a pick abused that, exactly
    stage time   F[c] = sum f q, V[c] = sum v q, ..., P[c] = sum_r send_r l[c, r]            `time_rows`
    path         T >= sum_c of the path's counts times the chunk's seconds, for p in P       `path_row`

The paths are added lazily: solve, simulate the pick, add its critical path, until model and simulator agree
(`solve.solve`). A path counts events of a fixed order, so it is a valid row for all assignments: the
programme is always a relaxation, and its dual bound a proof. `write_lp` writes all of it as a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pulp

from ..costmodels.schedules import CriticalPath, StageTimes, in_flight_vectors
from .problem import Assignment, Choice, Problem
from .runs import Run

Terms = dict[pulp.LpVariable, float]
Row = tuple[str, Terms, int, float]

LE, EQ, GE = pulp.LpConstraintLE, pulp.LpConstraintEQ, pulp.LpConstraintGE
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s", "send_s", "weight_s")


def times_of(problem: Problem) -> tuple[str, ...]:
    """The seconds that the schedule tells apart: weights' gradients by themselves under "zb" alone."""
    return TIMES if problem.schedule == "zb" else TIMES[:-1]


@dataclass(frozen=True, slots=True)
class Scale:
    """Model units: `time` per second (steps near 1000).

    HiGHS accepts violations of 1e-6 or so; in these units that is 1e-9 of a step. Memory rows have units of their own.
    """

    time: float


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
        for c in range(self.problem.chunks):
            for r, run in enumerate(self.runs):
                for o in run.options:
                    variable = self.counts.get((c, r, o))
                    for _ in range(round(variable.value() or 0) if variable is not None else 0):
                        choices[filled[r]] = o
                        filled[r] += 1
            boundaries.append(max(f for f, run in zip(filled, self.runs, strict=True) if f > run.start))
        return Assignment(tuple(boundaries), tuple(choices))

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Seconds of each chunk at the model's present values, fractional ones included."""
        names = times_of(self.problem)
        return tuple(
            StageTimes(*(max(0.0, (self.times[c, name].value() or 0) / self.scale.time) for name in names))
            for c in range(self.problem.chunks)
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
    exact: Collection[int] = (),
) -> Programme:
    """The programme without paths; `slack` minimises the memory shortfall instead of the step time.

    Parameters
    ----------
    windows : sequence of (lo, hi)
        For each chunk the range of positions at which it may end; the last is (n, n).
    exact : collection of int
        Ranks whose memory is counted to the byte.
    """
    model = pulp.LpProblem("tpplan", pulp.LpMinimize)
    step = model.add_variable("T", lowBound=0)
    variables = _variables(model, runs, windows)
    names = times_of(problem)
    times = {(c, name): model.add_variable(f"{name}_{c}", lowBound=0) for c in range(problem.chunks) for name in names}
    short = model.add_variable("shortfall", lowBound=0) if slack else None
    model.setObjective(pulp.LpAffineExpression({short if short is not None else step: 1.0}))
    rows = [
        assign_rows(problem, runs, variables),
        position_rows(problem, runs, variables),
        order_rows(problem, runs, variables),
        cut_rows(problem, runs, variables),
        memory_rows(problem, model, runs, variables, short, exact),
        time_rows(problem, runs, variables, times, scale),
    ]
    for family in rows:
        for row in family:
            add_row(model, row)
    return Programme(problem, runs, scale, model, step, variables.q, times)


def add_row(model: pulp.LpProblem, row: Row) -> None:
    """One named row into the model."""
    name, terms, sense, rhs = row
    if not terms and {LE: rhs >= 0, EQ: rhs == 0, GE: rhs <= 0}[sense]:
        return  # all of it is given, and holds
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
    """c[c, r] - c[c-1, r] - sum_o q[c, r, o] = 0; c[C-1, r] = n_r comes with the last window."""
    for s in range(problem.chunks):
        for r, run in enumerate(runs):
            taken = [(v.q[s, r, o], -1.0) for o in run.options if (s, r, o) in v.q]
            yield _row(f"assign_{s}_{r}", [(v.c[s, r], 1.0), (v.c.get((s - 1, r), 0), -1.0), *taken], EQ, 0)


def position_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """b[c] = sum_r c[c, r] and b[c] >= b[c-1] + 1."""
    for s in range(problem.chunks):
        held = [(v.c[s, r], -1.0) for r in range(len(runs))]
        yield _row(f"position_{s}", [(v.b[s], 1.0), *held], EQ, 0)
        yield _row(f"filled_{s}", [(v.b[s], 1.0), (v.b.get(s - 1, 0), -1.0)], GE, 1)


def order_rows(problem: Problem, runs: tuple[Run, ...], v: _Variables) -> Iterator[Row]:
    """c[c, r] <= n_r g[c, r] and n_r g[c, r+1] <= c[c, r]: a run begins when the one before is complete."""
    for s in range(problem.chunks):
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
    """l[c, r] = 0 where no chunk may end behind a layer of run r (the last chunk ends at the end)."""
    for s in range(problem.chunks - 1):
        for r, run in enumerate(runs):
            if not run.layer.cut_after:
                yield _row(f"cut_{s}_{r}", _ends_in(v, s, r, runs, 1.0), EQ, 0)


def memory_rows(
    problem: Problem,
    model: pulp.LpProblem,
    runs: tuple[Run, ...],
    v: _Variables,
    short: pulp.LpVariable | None,
    exact: Collection[int],
) -> Iterator[Row]:
    """sum (static + x_c saved) q + x_c sum_r cut_r l[c-1, r] + transient_s <= cap (+ shortfall), for x in X_s.

    Solvers decide between plans a few bytes apart by rounding, and were seen to prove the wrong one. So coefficients
    are small integers: with G = `grain_bytes` and sizes a = H G + L, 0 <= L < G,

        sum H q <= floor(cap / G)                                          a relaxation
        sum H q + h <= floor(cap / G),  sum L q - G h <= cap mod G,  h >= 0 integer      exact, on ranks in `exact`
    """
    vectors = in_flight_vectors(problem.schedule, problem.stages, problem.microbatches, problem.virtual)
    cap = problem.memory_bytes - problem.stage_fixed_bytes
    grain = grain_bytes(problem)
    for s in range(problem.stages):
        chunks = range(s, problem.chunks, problem.stages)
        lowest, steps, rows = transient_rows(model, runs, v, s, chunks)
        yield from rows
        for k, vector in enumerate(vectors[s]):
            terms: list[tuple[pulp.LpVariable | int, int]] = [*steps]
            for c, x in zip(chunks, vector, strict=True):
                for r, run in enumerate(runs):
                    for o, choice in _held(v, c, r, run):
                        terms.append((v.q[c, r, o], choice.static_bytes + x * choice.saved_bytes))
                    if c and run.layer.cut_bytes:
                        terms += _ends_in(v, c - 1, r, runs, x * run.layer.cut_bytes)
            name = f"memory_{s}_{k}" if k else f"memory_{s}"
            _, sizes, _, room = _row(name, terms, LE, cap - lowest)
            if short is not None:
                in_grains = {variable: size / grain for variable, size in sizes.items()}
                yield name, {**in_grains, short: -1.0}, LE, room / grain
                continue
            high: Terms = {variable: int(size) // grain for variable, size in sizes.items()}
            if s in exact:
                most = len(problem.layers) + len(sizes)  # no sum of rests fills more grains
                carry = model.add_variable(f"h_{s}_{k}", 0, most, pulp.LpInteger)
                high[carry] = 1
                low = {variable: int(size) % grain for variable, size in sizes.items()}
                yield f"{name}_rest", {**low, carry: -grain}, LE, int(room) % grain
            yield name, high, LE, int(room) // grain


def grain_bytes(problem: Problem) -> int:
    """The unit G of the memory rows [B]: a power of two, about 2**-19 of the limit."""
    cap = max(1, problem.memory_bytes - problem.stage_fixed_bytes)
    return 1 << max(0, cap.bit_length() - 19)


def _held(v: _Variables, c: int, r: int, run: Run) -> Iterator[tuple[int, Choice]]:
    """The choices of run r that chunk c may hold."""
    for o in run.options:
        if (c, r, o) in v.q:
            yield o, run.layer.choices[o]


def transient_rows(
    model: pulp.LpProblem, runs: tuple[Run, ...], v: _Variables, s: int, chunks: range
) -> tuple[int, list[tuple[pulp.LpVariable, int]], list[Row]]:
    """Rank s's largest transient as lowest + sum_k (t_k - t_k-1) y[s, k].

    The lowest is what layers that the rank surely holds need at least. Returns it, the terms of the sum, and the
    rows that set y[s, k] = 1 as soon as the rank holds a layer of transient t_k or more: y[s, k] >= y[s, k+1], and
    for each of its chunks, each run and each transient t_k of its own, sum_{o: t_o >= t_k} q[c, r, o] <= n_r y[s, k].
    """
    held = {
        (c, r): [(o, choice.transient_bytes) for o, choice in _held(v, c, r, run)]
        for c in chunks
        for r, run in enumerate(runs)
    }
    least = {at: min(transient for _, transient in options) for at, options in held.items() if options}
    surely = [least[c, r] for c, r in least if v.surely_held(c, runs[r])]
    lowest = max(surely, default=min(least.values()))
    levels = sorted({transient for options in held.values() for _, transient in options if transient > lowest})
    y = {level: model.add_variable(f"y_{s}_{level}", 0, 1, pulp.LpInteger) for level in levels}
    terms = [(y[level], level - below) for below, level in pairwise([lowest, *levels])]
    rows = [_row(f"nested_{s}_{b}", [(y[a], 1.0), (y[b], -1.0)], GE, 0) for a, b in pairwise(levels)]
    for (c, r), options in held.items():
        for level in sorted({transient for _, transient in options if transient > lowest}):
            large = [(v.q[c, r, o], 1.0) for o, transient in options if transient >= level]
            rows.append(_row(f"transient_{c}_{level}_{r}", [*large, (y[level], -runs[r].count)], LE, 0))
    return lowest, terms, rows


def time_rows(
    problem: Problem,
    runs: tuple[Run, ...],
    v: _Variables,
    times: Mapping[tuple[int, str], pulp.LpVariable],
    scale: Scale,
) -> Iterator[Row]:
    """Each chunk's seconds as sums over what it holds, and its transfer by where it ends."""
    for s in range(problem.chunks):
        for name in times_of(problem):
            if name == "send_s":
                continue
            terms: list[tuple[pulp.LpVariable | int, float]] = [(times[s, name], 1.0)]
            for r, run in enumerate(runs):
                for o, choice in _held(v, s, r, run):
                    terms.append((v.q[s, r, o], -getattr(choice, name) * scale.time))
            yield _row(f"{name}_row_{s}", terms, EQ, 0)
        sends: list[tuple[pulp.LpVariable | int, float]] = [(times[s, "send_s"], 1.0)]
        if s + 1 < problem.chunks:
            for r, run in enumerate(runs):
                sends += _ends_in(v, s, r, runs, -run.layer.send_s * scale.time)
        yield _row(f"send_row_{s}", sends, EQ, 0)


def path_row(programme: Programme, path: CriticalPath, name: str) -> Row:
    """T >= the length of one critical path, in the chunks' times."""
    terms: Terms = {programme.step: 1.0}
    counts = (path.forward, path.backward, path.first_forward, path.last_backward, path.tail, path.send, path.weight)
    for field, per_chunk in zip(times_of(programme.problem), counts, strict=False):
        for c, count in enumerate(per_chunk):
            if count:
                terms[programme.times[c, field]] = -float(count)
    return name, terms, GE, 0.0


def write_lp(programme: Programme, file: str) -> None:
    """Write the programme as a CPLEX LP file, with the names of this module's rows and variables."""
    programme.model.writeLP(file)
