"""Bounds of a problem whose chunks are given (interleaved): of its step time, and of the memory its ranks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from ..costmodels.schedules import CriticalPath, StageTimes, Timeline, in_flight_vectors, simulate
from .bounds import ROUNDING
from .front import convex_front
from .problem import Choice, Problem

# Longer schedules are not simulated for a bound.
MOST_EVENTS = 40_000
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")


def fixed_bound(problem: Problem) -> float:
    """Lower bound of a problem with given chunks [s]; inf where a rank cannot hold its chunks.

    The step when each layer takes its least forward, backward, ...: the step never falls when a time rises. And the
    bounds by single paths (`_path_bound`) that are critical when each rank is as fast as its memory allows.
    """
    assert problem.ends is not None
    least, fitted = [], []
    known: Fronts = {}
    quickest: dict[int, list[float]] = {}
    steps = Weights(problem.microbatches, problem.microbatches, 1, 1, 1)
    fills = {
        s: _fill_rank(problem, s, dict.fromkeys(chunks_of(problem, s), steps), known) for s in range(problem.stages)
    }
    for c, (begin, end) in enumerate(zip((0, *problem.ends), problem.ends, strict=False)):
        send = problem.layers[end - 1].send_s if end < len(problem.layers) else 0.0
        fastest = [0.0] * (len(TIMES) + 1)
        for layer in problem.layers[begin:end]:
            values = quickest.get(id(layer.choices))
            if values is None:
                names = (*TIMES, "weight_s")
                values = quickest[id(layer.choices)] = [min(getattr(o, n) for o in layer.choices) for n in names]
            fastest = [a + b for a, b in zip(fastest, values, strict=True)]
        least.append(_times(fastest[:-1], send, fastest[-1]))
        fitted.append(_times(fills[c % problem.stages][1][c], send))
    if max(fill[0] for fill in fills.values()) == inf:
        return inf

    def play(times: Sequence[StageTimes]) -> Timeline:
        return simulate(problem.schedule, times, problem.microbatches, virtual=problem.virtual)

    if 2 * problem.chunks * problem.microbatches > MOST_EVENTS:
        step = path_bound(problem, _longest_rank_path(problem, fitted))
    else:
        step = max(play(least).step_time_s, path_bound(problem, play(fitted).critical_path))
    return step * (1 - ROUNDING) + problem.step_fixed_s


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
    for slope, size, c, change in sorted(moves):
        if room >= 0:
            break
        moved = min(size, -room)
        total += slope * moved
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
