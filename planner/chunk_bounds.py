"""Bounds of a problem whose chunks are given (interleaved): of its step time, and of the memory its ranks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from ..costmodels.schedules import CriticalPath, StageTimes, Timeline, in_flight_vectors, simulate
from .bounds import ROUNDING
from .front import convex_front, slope
from .problem import Choice, Problem

# Longer schedules are not simulated for a bound.
MOST_EVENTS = 40_000
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")


def fixed_bound(problem: Problem, limit_s: float = inf) -> float:
    """Lower bound of a problem with given chunks [s]; inf where a rank cannot hold its chunks.

    First the longest rank with its memory priced (`rank_bound`), which proves most. Then the bound by a single path
    (`path_bound`), the one that is critical when each rank is as fast as its memory allows. Then the step when each
    layer takes its least forward, backward, ...: the step never falls when a time rises. What reaches `limit_s` is
    returned at once.
    """
    assert problem.ends is not None
    best = rank_bound(problem)
    if best >= limit_s:
        return best
    known: Fronts = {}
    steps = Weights(problem.microbatches, problem.microbatches, 1, 1, 1)
    fills = {
        s: _fill_rank(problem, s, dict.fromkeys(chunks_of(problem, s), steps), known) for s in range(problem.stages)
    }
    if max(fill[0] for fill in fills.values()) == inf:
        return inf
    sends = [problem.layers[end - 1].send_s for end in problem.ends[:-1]] + [0.0]
    fitted = [_times(fills[c % problem.stages][1][c], send) for c, send in enumerate(sends)]

    def play(times: Sequence[StageTimes]) -> Timeline:
        return simulate(problem.schedule, times, problem.microbatches, virtual=problem.virtual)

    short = 2 * problem.chunks * problem.microbatches <= MOST_EVENTS
    path = play(fitted).critical_path if short else _longest_rank_path(problem, fitted)
    best = max(best, path_bound(problem, path) * (1 - ROUNDING) + problem.step_fixed_s)
    if short and best < limit_s:
        best = max(best, play(_fastest(problem, sends)).step_time_s * (1 - ROUNDING) + problem.step_fixed_s)
    return best


def rank_bound(problem: Problem) -> float:
    """The longest of the paths R(s) (see `bounds`), with the memory of rank s priced [s]; inf where it does not fit.

    R(s) is at least the least times of the chunks before, plus, for every price u >= 0 of a byte, the rank's sum over
    layers of min over choices of weighted time + u (static + x saved), minus u times its room: any u gives a bound, and
    those are tried at which the best choice of a layer changes.
    """
    assert problem.ends is not None
    pp, m = problem.stages, problem.microbatches
    x = _most_in_flight(problem.schedule, pp, m, problem.virtual)
    kinds: dict[int, int] = {}
    held = np.zeros((problem.chunks, len({id(layer.choices) for layer in problem.layers})))
    tables, least_w, least_transient = [], [], []
    cuts = np.zeros(problem.chunks)
    transient = np.zeros(pp)
    for c, (begin, end) in enumerate(zip((0, *problem.ends), problem.ends, strict=False)):
        cuts[c] = problem.layers[begin - 1].cut_bytes if c else 0.0
        for layer in problem.layers[begin:end]:
            k = kinds.get(id(layer.choices))
            if k is None:
                k = kinds[id(layer.choices)] = len(tables)
                table = np.array([_row(choice, m) for choice in layer.choices])
                tables.append(table)
                least_w.append(table[:, 3].min())
                least_transient.append(table[:, 4].min())
            held[c, k] += 1
            transient[c % pp] = max(transient[c % pp], least_transient[k])
    prices = _prices(tables, x)
    places, where = np.unique(x, return_inverse=True)
    room = problem.memory_bytes - problem.stage_fixed_bytes - transient - (x * cuts).reshape(-1, pp).sum(0)
    priced, needed = np.zeros((problem.chunks, len(prices))), np.zeros(problem.chunks)
    for k, table in enumerate(tables):
        size = table[:, 1, None] + table[:, 2, None] * places
        needed += held[:, k] * size.min(0)[where]
        cost = (table[:, 0, None, None] + prices * size[:, :, None]).min(0)
        priced += held[:, k, None] * cost[where]
    if (needed.reshape(-1, pp).sum(0) > room + 1).any():
        return inf
    ranks = (priced.reshape(-1, pp, len(prices)).sum(0) - prices * room[:, None]).max(1)
    before = np.concatenate(([0.0], np.cumsum(held[: pp - 1] @ np.array(least_w))))
    return float((before + ranks).max()) * (1 - ROUNDING) + problem.step_fixed_s


def _row(choice: Choice, m: int) -> tuple[float, ...]:
    """Time in R(s) on the rank itself, static, saved, time in the chunks before it, transient."""
    work = choice.forward_s + choice.backward_s
    once = choice.first_forward_extra_s + choice.last_backward_extra_s
    return m * work + once, choice.static_bytes, choice.saved_bytes, work + once, choice.transient_bytes


@lru_cache(maxsize=1024)
def _most_in_flight(schedule: str, pp: int, m: int, virtual: int) -> np.ndarray:
    """Microbatches in flight in each chunk, of every rank's vectors the one with most of them."""
    vectors = in_flight_vectors(schedule, pp, m, virtual)
    return np.array([max(some, key=sum) for some in vectors]).T.reshape(-1)


def _prices(tables: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Seconds a byte at which the best choice of some layer changes, for some of the numbers in flight."""
    found = {0.0}
    for at in np.unique(np.quantile(x, (0, 0.25, 0.5, 0.75, 1), method="nearest")):
        for table in tables:
            if len(table) > 1:
                points = [(row[0], row[1] + at * row[2], k) for k, row in enumerate(table.tolist())]
                found |= {slope(a, b) for a, b in pairwise(convex_front(points))}
    return np.array(sorted(found))


def _fastest(problem: Problem, sends: Sequence[float]) -> list[StageTimes]:
    """Each chunk's times when every layer takes its least forward, its least backward, ..."""
    assert problem.ends is not None
    least = []
    quickest: dict[int, list[float]] = {}
    for (begin, end), send in zip(pairwise((0, *problem.ends)), sends, strict=True):
        fastest = [0.0] * (len(TIMES) + 1)
        for layer in problem.layers[begin:end]:
            values = quickest.get(id(layer.choices))
            if values is None:
                names = (*TIMES, "weight_s")
                values = quickest[id(layer.choices)] = [min(getattr(o, n) for o in layer.choices) for n in names]
            fastest = [a + b for a, b in zip(fastest, values, strict=True)]
        least.append(_times(fastest[:-1], send, fastest[-1]))
    return least


def _longest_rank_path(problem: Problem, chunks: Sequence[StageTimes]) -> CriticalPath:
    """The longest of the paths R(s) (see `bounds`) under these times."""
    pp, m, n = problem.stages, problem.microbatches, problem.chunks
    work = [t.forward_s + t.backward_s for t in chunks]
    s = max(range(pp), key=lambda s: sum(work[:s]) + m * sum(work[s::pp]))
    counts = [m if c % pp == s else int(c < s) for c in range(n)]
    once = [int(count > 0) for count in counts]
    nothing = (0,) * n
    return CriticalPath(tuple(counts), tuple(counts), tuple(once), tuple(once), nothing, nothing)


def _times(values: Sequence[float], send_s: float, weight_s: float = 0.0) -> StageTimes:
    """Seconds of a chunk from its `TIMES`."""
    forward, backward, first, last, tail = values
    return StageTimes(forward, backward, first, last, tail, send_s, weight_s)


def path_bound(problem: Problem, path: CriticalPath) -> float:
    """Lower bound from one path for given chunks: its length when every rank fits in memory, layers mixing choices [s].

    A path bounds every step, and no rank's memory depends on another's choices: so each rank by itself minimises its
    part of the path's length.
    """
    assert problem.ends is not None
    counts = (path.forward, path.backward, path.first_forward, path.last_backward, path.tail)
    weights = {c: Weights(*(per_chunk[c] for per_chunk in counts)) for c in range(problem.chunks)}
    total = sum(
        count * problem.layers[end - 1].send_s for count, end in zip(path.send, problem.ends[:-1], strict=False)
    )
    known: Fronts = {}
    for s in range(problem.stages):
        total += _fill_rank(problem, s, {c: weights[c] for c in chunks_of(problem, s)}, known)[0]
    return total


class Weights(NamedTuple):
    """How often each of a chunk's times counts."""

    forward: int
    backward: int
    first_forward: int
    last_backward: int
    tail: int


def chunks_of(problem: Problem, s: int) -> range:
    """The chunks of rank s."""
    return range(s, problem.chunks, problem.stages)


Fronts = dict[tuple[object, ...], tuple[list[tuple[float, float, int]], list[list[float]], int]]


def _front_of(choices: Sequence[Choice], x: int, weights: Weights, known: Fronts) -> tuple[list, list, int]:
    """The convex front of (weighted seconds, bytes, which), all choices' `TIMES`, and their least transient."""
    key = (id(choices), x, weights)
    if key not in known:
        numbers = [[getattr(o, name) for name in TIMES] for o in choices]
        values = [sum(w * n for w, n in zip(weights, row, strict=True)) for row in numbers]
        points = [
            (value, o.static_bytes + x * o.saved_bytes, k)
            for k, (value, o) in enumerate(zip(values, choices, strict=True))
        ]
        known[key] = convex_front(points), numbers, min(o.transient_bytes for o in choices)
    return known[key]


def _fill_rank(
    problem: Problem, s: int, weights: Mapping[int, Weights], known: Fronts
) -> tuple[float, dict[int, list[float]]]:
    """The least weighted time of a rank with given chunks that fits in its memory, and each chunk's `TIMES` then.

    The linear relaxation of one choice a layer: every layer's least, then fractions of layers move along their
    convex fronts of (bytes, weighted seconds), fewest seconds per byte first, until what is in flight fits. Of the
    vectors in flight the one with most microbatches counts.
    """
    assert problem.ends is not None
    vectors = in_flight_vectors(problem.schedule, problem.stages, problem.microbatches, problem.virtual)
    room = float(problem.memory_bytes - problem.stage_fixed_bytes)
    times = {c: [0.0] * len(TIMES) for c in chunks_of(problem, s)}
    total = peak = 0.0
    moves = []
    for c, x in zip(chunks_of(problem, s), max(vectors[s], key=sum), strict=True):
        begin = problem.ends[c - 1] if c else 0
        room -= x * problem.layers[begin - 1].cut_bytes if c else 0
        together: dict[int, list] = {}
        for layer in problem.layers[begin : problem.ends[c]]:
            together.setdefault(id(layer.choices), [layer.choices, 0])[1] += 1
        for choices, count in together.values():
            front, numbers, transient = _front_of(choices, x, weights[c], known)
            total += count * front[0][0]
            room -= count * front[0][1]
            peak = max(peak, transient)
            times[c] = [t + count * n for t, n in zip(times[c], numbers[front[0][2]], strict=True)]
            for a, b in pairwise(front):
                change = [(n - o) / (a[1] - b[1]) for n, o in zip(numbers[b[2]], numbers[a[2]], strict=True)]
                moves.append(((b[0] - a[0]) / (a[1] - b[1]), count * (a[1] - b[1]), c, change))
    room -= peak
    for price, size, c, change in sorted(moves):
        if room >= 0:
            break
        moved = min(size, -room)
        total += price * moved
        room += moved
        times[c] = [t + moved * d for t, d in zip(times[c], change, strict=True)]
    return (total if room >= -1 else inf), times


def fixed_memory(problem: Problem) -> tuple[int, int]:
    """Lower bound of the bytes that the given chunks need, and the rank that needs them.

    For each vector x of microbatches in flight: sum over the rank's chunks of the least static + x_c saved of each
    layer, what its cuts keep, and the largest of the layers' least transients.
    """
    assert problem.ends is not None
    pp = problem.stages
    vectors = in_flight_vectors(problem.schedule, pp, problem.microbatches, problem.virtual)
    needs = []
    for s in range(pp):
        need = 0
        for vector in vectors[s]:
            total = transient = 0
            for c, x in zip(range(s, problem.chunks, pp), vector, strict=True):
                begin = problem.ends[c - 1] if c else 0
                total += x * problem.layers[begin - 1].cut_bytes if c else 0
                for layer in problem.layers[begin : problem.ends[c]]:
                    total += min(o.static_bytes + x * o.saved_bytes for o in layer.choices)
                    transient = max(transient, min(o.transient_bytes for o in layer.choices))
            need = max(need, total + transient)
        needs.append(need + problem.stage_fixed_bytes)
    return max(needs), needs.index(max(needs))
