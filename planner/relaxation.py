"""Dynamic programmes over stage boundaries: lower bounds of the step time, windows, and the least memory.

The paths A, Z and G are those of `bounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from ..costmodels.schedules import (
    CriticalPath,
    StageTimes,
    Timeline,
    in_flight_microbatches,
    in_flight_vectors,
    simulate,
)
from .bounds import ROUNDING, mixture
from .intervals import Band, Chain, band_of, stage_work
from .problem import Choice, Problem

# Longer schedules are not simulated for a bound.
MOST_EVENTS = 40_000
TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")


@dataclass(frozen=True, slots=True)
class Relaxation:
    """What the dynamic programmes prove.

    lb1_s, lb2_s : lower bounds [s]; inf when no split fits in memory
    costs : (stages, p - 1, w) longest path plus `step_fixed_s` of each stage for each interval of the band
    band : the intervals
    positions : (p,) legal positions
    """

    lb1_s: float
    lb2_s: float
    costs: np.ndarray
    band: Band | None
    positions: np.ndarray

    def windows(self, target_s: float) -> tuple[tuple[int, int], ...]:
        """For each stage, where it may end if the step is to take at most `target_s`; empty if nowhere.

        A boundary stays when some split through it keeps lb2's cost of every stage within the target.
        """
        if self.band is None:
            return ()
        pp = len(self.costs)
        before = _worst_before(self.costs, self.band)
        behind = _worst_behind(self.costs, self.band)
        out = []
        for s in range(pp - 1):
            ends = self.positions[np.maximum(before[s], behind[s]) <= target_s]
            if not len(ends):
                return ()
            out.append((int(ends[0]), int(ends[-1])))
        last = int(self.positions[-1])
        return (*out, (last, last)) if before[-1][-1] <= target_s else ()

    def boundaries(self, slack: float = 0.002) -> tuple[int, ...]:
        """A balanced split whose stages cost at most lb2 (1 + slack): the least sum of squares; empty if none."""
        if self.lb2_s == inf or self.band is None:
            return ()
        limit = self.lb2_s * (1 + slack)
        squares = np.where(self.costs <= limit, (self.costs / limit) ** 2, inf)
        best, came = _start(len(self.positions)), []
        for square in squares:
            totals = self.band.by_end(best[:-1, None] + square)
            lengths = totals.argmin(1)
            best = totals[np.arange(len(totals)), lengths]
            came.append(lengths)
        if best[-1] == inf:
            return ()
        ends = [len(self.positions) - 1]
        for lengths in reversed(came[1:]):
            ends.append(ends[-1] - int(lengths[ends[-1]]) - 1)
        return tuple(int(self.positions[j]) for j in reversed(ends))


def _start(positions: int) -> np.ndarray:
    """0 at the first position, inf behind it."""
    return np.concatenate((np.zeros(1), np.full(positions - 1, inf)))


def _worst_before(costs: np.ndarray, band: Band) -> list[np.ndarray]:
    """[s][j] = min over splits of the first s + 1 stages that end at j of the largest cost."""
    out, last = [], _start(costs.shape[1] + 1)
    last[0] = -inf
    for cost in costs:
        last = band.by_end(np.maximum(last[:-1, None], cost)).min(1)
        out.append(last)
    return out


def _worst_behind(costs: np.ndarray, band: Band) -> list[np.ndarray]:
    """[s][j] = min over splits of the stages behind s, which start at j, of the largest cost."""
    last = np.full(costs.shape[1] + 1, inf)
    last[-1] = -inf
    out = [last]
    for cost in costs[:0:-1]:
        inside = np.maximum(cost, last[band.ends]).min(1)
        last = np.concatenate((inside, np.full(1, inf)))
        out.append(last)
    return out[::-1]


def relax(problem: Problem, chain: Chain, limit_s: float = inf) -> Relaxation:
    """lb1 and lb2 by dynamic programming over boundaries.

    Every stage's own work is bounded by `stage_work` for each interval. Then

    lb1 = min over splits of a sum_s w_s, plus the transfers and once-a-step times that all paths of the mixture
    share (with M > pp: every cut twice, all first forwards and last backwards, the tail of the first layers);

    lb2 = min over splits of max_s max(A(s), Z(s)) or G(s), where W_<s and W_>s are replaced by their least
    values over splits of the layers before and after. A split attains at least its own worst path, and each
    path at least this cost, so the minimum over splits is a bound.

    With one stage both are M (f + v) + first + last + tail with memory priced. Zero-bubble: H(s) in place of A and Z.
    Interleaved problems, whose chunks are given, have `fixed_bound` instead.

    Parameters
    ----------
    limit_s : float
        Only steps below it are of interest [s]: stages whose M w alone reaches it are left out, and bounds end there.
    """
    m, pp = problem.microbatches, problem.stages
    in_flight = in_flight_microbatches(problem.schedule, pp, m)
    capacity = problem.memory_bytes - problem.stage_fixed_bytes
    pieces = len(chain.positions) - 1
    if pieces < pp:
        return Relaxation(inf, inf, np.full((pp, 1, 1), inf), None, chain.positions)
    if pp == 1:
        band = band_of(chain, inf)
        total = stage_work(chain, band, m * chain.work + chain.once, in_flight, capacity)
        cost = total * (1 - ROUNDING) + problem.step_fixed_s
        whole = float(cost[0, 0, -1])
        return Relaxation(whole, whole, cost, band, chain.positions)
    band = band_of(chain, (limit_s - problem.step_fixed_s) / m)
    works = stage_work(chain, band, chain.work, in_flight, capacity)
    before, behind = _least_before(works, band, chain.send), _least_behind(works, band, chain.send)
    costs = _path_costs(problem, chain, band, works, before, behind) * (1 - ROUNDING) + problem.step_fixed_s
    total = _last(before[-1], works[-1], band)
    bare = _last(_least_before(works, band, np.zeros_like(chain.send))[-1], works[-1], band)
    lb1 = _mixture_bound(problem, chain, bare, total) * (1 - ROUNDING) + problem.step_fixed_s
    lb2 = float(_worst_before(costs, band)[-1][-1])
    if band.ends.shape[1] < pieces:  # a split with a longer stage takes the limit at least
        lb1, lb2 = min(lb1, limit_s), min(lb2, limit_s)
    return Relaxation(float(lb1), lb2, costs, band, chain.positions)


def _last(before: np.ndarray, work: np.ndarray, band: Band) -> float:
    """The least sum over all stages."""
    return float(band.by_end(before[:-1, None] + work)[-1].min())


def _mixture_bound(problem: Problem, chain: Chain, bare: float, total: float) -> float:
    """a sum w + what all paths share; `bare` = least sum of w, `total` = the same with two transfers a cut."""
    if bare == inf:
        return inf  # with a = 1 the products below would be no numbers
    m, pp = problem.microbatches, problem.stages
    a = mixture(problem.schedule, pp, m)
    if bare == inf:
        return inf
    if problem.schedule == "gpipe":
        return (a - 1) * bare + total + chain.extra[1] + chain.tail[1]
    if problem.schedule == "zb":
        return a * bare
    if m > pp:
        return (a - 1) * bare + total + chain.extra[-1] + chain.tail[1]
    return a * bare + chain.extra[1] + chain.tail[1]


def _least_before(works: np.ndarray, band: Band, send: np.ndarray) -> np.ndarray:
    """[s, i] = least sum over stages < s of w, and of two transfers a cut, when stage s starts at i."""
    out = [_start(works.shape[1] + 1)]
    for work in works[:-1]:
        out.append(band.by_end(out[-1][:-1, None] + work).min(1) + 2 * send)
    return np.array(out)


def _least_behind(works: np.ndarray, band: Band, send: np.ndarray) -> np.ndarray:
    """[s, j] = least sum over stages > s of w, and of two transfers a cut, when stage s ends at j."""
    out = [_start(works.shape[1] + 1)[::-1]]
    for work in works[:0:-1]:
        inside = (work + out[-1][band.ends]).min(1)
        out.append(np.concatenate((inside, np.full(1, inf))) + 2 * send)
    return np.array(out[::-1])


def _path_costs(
    problem: Problem, chain: Chain, band: Band, works: np.ndarray, before: np.ndarray, behind: np.ndarray
) -> np.ndarray:
    """The longest of the paths through each stage for each interval: A, Z or G, ending in tail_0 or tail_s."""
    m, pp = problem.microbatches, problem.stages
    before, behind = before[:, :-1, None], behind[:, band.ends]
    extra, tail = chain.extra[band.ends], chain.tail[band.ends]
    own = (extra - chain.extra[:-1, None]) + (tail - chain.tail[:-1, None])
    arrive = chain.forward[:-1, None] + chain.send[:-1, None] + own
    if problem.schedule == "zb":
        return m * works + arrive
    home = np.full((pp, *tail.shape), chain.tail[1])
    home[0] = tail
    if problem.schedule == "gpipe":
        return m * works + behind + np.maximum(before + extra + home, arrive)
    cost = m * works + np.maximum(before + extra + home, arrive)
    warm_up = pp - np.arange(pp)[:, None, None]
    zigzag = np.maximum(m - warm_up + 1, 1) * works + 2 * behind
    zigzag = zigzag + np.maximum(before + chain.extra[-1] + home, arrive)
    return np.where(m > warm_up, np.maximum(cost, zigzag), cost)


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
    fills = {s: _fill_rank(problem, s, dict.fromkeys(_chunks(problem, s), steps), known) for s in range(problem.stages)}
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
        total += _fill_rank(problem, s, {c: weights[c] for c in _chunks(problem, s)}, known)[0]
    return total


class Weights(NamedTuple):
    """How often each of a chunk's times counts."""

    forward: int
    backward: int
    first_forward: int
    last_backward: int
    tail: int


def _chunks(problem: Problem, s: int) -> range:
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
    times = {c: [0.0] * len(TIMES) for c in _chunks(problem, s)}
    total = peak = 0.0
    moves = []
    for c, x in zip(_chunks(problem, s), max(vectors[s], key=sum), strict=True):
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


def convex_front(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The lower convex front of (seconds, bytes, which), from the fastest to the smallest.

    >>> convex_front([(1.0, 10.0, 0), (2.0, 9.0, 1), (3.0, 2.0, 2)])
    [(1.0, 10.0, 0), (3.0, 2.0, 2)]
    """
    front: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if front and point[1] >= front[-1][1]:
            continue
        while len(front) > 1 and _slope(front[-2], front[-1]) >= _slope(front[-1], point):
            front.pop()
        front.append(point)
    return front


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Seconds paid per byte saved from a to b."""
    return (b[0] - a[0]) / (a[1] - b[1])


def _fixed_memory(problem: Problem) -> tuple[int, int]:
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


def least_memory(problem: Problem, chain: Chain) -> tuple[int, int]:
    """The least limit under which some assignment fits, exactly, and the stage that needs it [B].

    min over splits of max_s of min over choices of static + x_s saved + x_s cut + transient + fixed; the
    largest transient is tried at every value that occurs. Needs as many legal pieces as stages. For given chunks it
    is a lower bound (`solve` has the exact figure).
    """
    if problem.ends is not None:
        return _fixed_memory(problem)
    pp = problem.stages
    far = np.int64(2**50)
    levels = np.unique(chain.transient)
    order = np.arange(len(chain.positions))
    best = None
    needs = []
    for s, x in enumerate(in_flight_microbatches(problem.schedule, pp, problem.microbatches)):
        rows = slice(0, 1) if s == 0 else slice(None)
        cols = slice(-1, None) if s == pp - 1 else slice(None)
        memory = (chain.static + x * chain.saved).astype(np.int64)
        need = np.full((len(order[rows]), len(order[cols])), far)
        for level in levels:
            cheapest = np.where(chain.transient <= level, memory, far).min(1)[chain.index]
            sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(cheapest)))[chain.positions]
            np.minimum(need, sums[None, cols] - sums[rows, None] + np.int64(level), out=need)
        need += (x * chain.cut[rows, None]).astype(np.int64)
        need[order[rows, None] >= order[None, cols]] = far
        needs.append(need)
        best = need[0] if best is None else np.maximum(best[:, None], need).min(0)
    assert best is not None
    least = int(best[0])
    return least + problem.stage_fixed_bytes, _tight_stage(needs, least)


def _tight_stage(needs: Sequence[np.ndarray], least: int) -> int:
    """The fullest stage of the first split that needs no more than `least` (it needs that much)."""
    reach: list[np.ndarray] = [np.ones(1, dtype=bool)]
    for need in needs:
        reach.append(np.any(reach[-1][:, None] & (need <= least), axis=0))
    at, sizes = 0, []
    for s in range(len(needs) - 1, -1, -1):
        column = needs[s][:, at if s < len(needs) - 1 else 0]
        start = int(np.flatnonzero(reach[s] & (column <= least))[0])
        sizes.append(int(column[start]))
        at = start
    sizes.reverse()
    return sizes.index(max(sizes))
