"""Dynamic programmes over stage boundaries: lower bounds of the step time, windows, and the least memory.

The paths A, Z and G are those of `bounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np

from ..costmodels.schedules import StageTimes, in_flight_microbatches, in_flight_vectors, simulate
from .bounds import ROUNDING, mixture
from .intervals import Chain, stage_work
from .problem import Problem

TIMES = ("forward_s", "backward_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")


@dataclass(frozen=True, slots=True)
class Relaxation:
    """What the dynamic programmes prove.

    lb1_s, lb2_s : lower bounds [s]; inf when no split fits in memory
    costs : per stage, its longest path plus `step_fixed_s` for each (start, end) position; the first stage has
        one row, the last one column
    positions : legal positions
    """

    lb1_s: float
    lb2_s: float
    costs: tuple[np.ndarray, ...]
    positions: np.ndarray

    def windows(self, target_s: float) -> tuple[tuple[int, int], ...]:
        """For each stage, where it may end if the step is to take at most `target_s`; empty if nowhere.

        A boundary stays when some split through it keeps lb2's cost of every stage within the target.
        """
        pp = len(self.costs)
        before = _worst(self.costs)
        behind = _worst([cost.T for cost in reversed(self.costs)])
        out = []
        for s in range(pp - 1):
            ends = self.positions[np.maximum(before[s], behind[pp - 2 - s]) <= target_s]
            if not len(ends):
                return ()
            out.append((int(ends[0]), int(ends[-1])))
        last = int(self.positions[-1])
        return (*out, (last, last)) if before[-1][0] <= target_s else ()

    def boundaries(self, slack: float = 0.002) -> tuple[int, ...]:
        """A balanced split whose stages cost at most lb2 (1 + slack): the least sum of squares; empty if none."""
        if self.lb2_s == inf:
            return ()
        limit = self.lb2_s * (1 + slack)
        squares = [np.where(cost <= limit, (cost / limit) ** 2, inf) for cost in self.costs]
        best, choice = squares[0][0], []
        for square in squares[1:]:
            totals = best[:, None] + square
            choice.append(totals.argmin(0))
            best = totals.min(0)
        ends = [0]
        for came in reversed(choice):
            ends.append(int(came[ends[-1]]))
        ends = [len(self.positions) - 1, *ends[1:]]
        return tuple(int(self.positions[j]) for j in reversed(ends))


def _worst(costs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """best[s][j] = min over splits of the first s + 1 stages that end at j of the largest cost."""
    best = [costs[0][0]]
    for cost in costs[1:]:
        best.append(np.maximum(best[-1][:, None], cost).min(0))
    return best


def relax(problem: Problem, chain: Chain) -> Relaxation:
    """lb1 and lb2 by dynamic programming over boundaries.

    Every stage's own work is bounded by `stage_work` for each interval. Then

    lb1 = min over splits of a sum_s w_s, plus the transfers and once-a-step times that all paths of the mixture
    share (with M > pp: every cut twice, all first forwards and last backwards, the tail of the first layers);

    lb2 = min over splits of max_s max(A(s), Z(s)) or G(s), where W_<s and W_>s are replaced by their least
    values over splits of the layers before and after. A split attains at least its own worst path, and each
    path at least this cost, so the minimum over splits is a bound.

    With one stage both are M (f + v) + first + last + tail with memory priced. Zero-bubble: H(s) in place of A and Z.
    Interleaved problems, whose chunks are given, have `fixed_bound` instead.
    """
    m, pp = problem.microbatches, problem.stages
    in_flight = in_flight_microbatches(problem.schedule, pp, m)
    capacity = problem.memory_bytes - problem.stage_fixed_bytes
    if pp == 1:
        total = stage_work(chain, m * chain.work + chain.once, in_flight[0], capacity, slice(0, 1), slice(-1, None))
        cost = total * (1 - ROUNDING) + problem.step_fixed_s
        return Relaxation(float(cost[0, 0]), float(cost[0, 0]), (cost,), chain.positions)
    if len(chain.positions) <= pp:
        return Relaxation(inf, inf, (np.full((1, 1), inf),) * pp, chain.positions)
    works = []
    for s, x in enumerate(in_flight):
        rows = slice(0, 1) if s == 0 else slice(None)
        cols = slice(-1, None) if s == pp - 1 else slice(None)
        works.append(stage_work(chain, chain.work, x, capacity, rows, cols))
    before, behind = _least_before(works, chain.send), _least_behind(works, chain.send)
    costs = tuple(
        _path_costs(problem, chain, s, works[s], before[s], behind[s]) * (1 - ROUNDING) + problem.step_fixed_s
        for s in range(pp)
    )
    total = float((before[-1][:, None] + works[-1]).min())
    bare = _least_before(works, np.zeros_like(chain.send))
    lb1 = _mixture_bound(problem, chain, float((bare[-1][:, None] + works[-1]).min()), total)
    return Relaxation(
        float(lb1) * (1 - ROUNDING) + problem.step_fixed_s, float(_worst(costs)[-1][0]), costs, chain.positions
    )


def _mixture_bound(problem: Problem, chain: Chain, bare: float, total: float) -> float:
    """a sum w + what all paths share; `bare` = least sum of w, `total` = the same with two transfers a cut."""
    m, pp = problem.microbatches, problem.stages
    a = mixture(problem.schedule, pp, m)
    if problem.schedule == "gpipe":
        return (a - 1) * bare + total + chain.extra[1] + chain.tail[1]
    if problem.schedule == "zb":
        return a * bare
    if m > pp:
        return (a - 1) * bare + total + chain.extra[-1] + chain.tail[1]
    return a * bare + chain.extra[1] + chain.tail[1]


def _least_before(works: Sequence[np.ndarray], send: np.ndarray) -> list[np.ndarray]:
    """before[s][i] = least sum over stages < s of w, and of two transfers a cut, when stage s starts at i."""
    out = [np.zeros(1)]
    for work in works[:-1]:
        out.append((out[-1][:, None] + work).min(0) + 2 * send)
    return out


def _least_behind(works: Sequence[np.ndarray], send: np.ndarray) -> list[np.ndarray]:
    """behind[s][j] = least sum over stages > s of w, and of two transfers a cut, when stage s ends at j."""
    out = [np.zeros(1)]
    for work in reversed(works[1:]):
        out.append((work + out[-1][None, :]).min(1) + 2 * send)
    return out[::-1]


def _path_costs(
    problem: Problem, chain: Chain, s: int, work: np.ndarray, before: np.ndarray, behind: np.ndarray
) -> np.ndarray:
    """The longest of the paths through stage s for each (start, end): A, Z or G, ending in tail_0 or tail_s."""
    m, pp = problem.microbatches, problem.stages
    rows = slice(0, 1) if s == 0 else slice(None)
    cols = slice(-1, None) if s == pp - 1 else slice(None)
    before, behind = before[:, None], behind[None, :]
    extra, tail = chain.extra[None, cols], chain.tail[None, cols]
    own = (extra - chain.extra[rows, None]) + (tail - chain.tail[rows, None])
    arrive = chain.forward[rows, None] + chain.send[rows, None] + own
    if problem.schedule == "zb":
        return m * work + arrive
    home = tail if s == 0 else chain.tail[1]
    if problem.schedule == "gpipe":
        body = m * work + behind
        return body + np.maximum(before + extra + home, arrive)
    cost = m * work + np.maximum(before + extra + home, arrive)
    warm_up = pp - s
    if m > warm_up:
        zigzag = (m - warm_up + 1) * work + 2 * behind
        np.maximum(cost, zigzag + np.maximum(before + chain.extra[-1] + home, arrive), out=cost)
    return cost


def fixed_bound(problem: Problem) -> float:
    """Lower bound of a problem with given chunks [s]; inf where a rank cannot hold its chunks.

    The step when each layer takes its least forward, backward, ...: the step never falls when a time rises. And R(s)
    of every rank (`bounds`) with memory priced (`_rank_work`).
    """
    assert problem.ends is not None
    chunks = []
    known: dict[int, list[float]] = {}
    for begin, end in zip((0, *problem.ends), problem.ends, strict=False):
        least = [0.0] * (len(TIMES) + 1)
        for layer in problem.layers[begin:end]:
            values = known.get(id(layer.choices))
            if values is None:
                names = (*TIMES, "weight_s")
                values = known[id(layer.choices)] = [min(getattr(c, name) for c in layer.choices) for name in names]
            least = [a + b for a, b in zip(least, values, strict=True)]
        send = problem.layers[end - 1].send_s if end < len(problem.layers) else 0.0
        chunks.append(StageTimes(*least[:-1], send, least[-1]))
    step = simulate(problem.schedule, chunks, problem.microbatches, virtual=problem.virtual).step_time_s
    vectors = in_flight_vectors(problem.schedule, problem.stages, problem.microbatches, problem.virtual)
    before = 0.0
    for s in range(problem.stages):
        step = max(step, before + _rank_work(problem, s, max(vectors[s], key=sum)))
        before += chunks[s].forward_s + chunks[s].backward_s
    return step * (1 - ROUNDING) + problem.step_fixed_s


def _rank_work(problem: Problem, s: int, vector: Sequence[int]) -> float:
    """Least time of all microbatches on a rank with given chunks, in its memory; layers may mix choices [s].

    The linear relaxation of one choice a layer: every layer's fastest, then fractions of layers move along their
    convex fronts of (bytes, seconds), fewest seconds per byte first, until `vector` microbatches in flight fit.
    """
    assert problem.ends is not None
    room = float(problem.memory_bytes - problem.stage_fixed_bytes)
    together: dict[tuple[int, int], list] = {}
    for c, x in zip(range(s, problem.chunks, problem.stages), vector, strict=True):
        begin = problem.ends[c - 1] if c else 0
        room -= x * problem.layers[begin - 1].cut_bytes if c else 0
        for layer in problem.layers[begin : problem.ends[c]]:
            together.setdefault((id(layer.choices), x), [layer.choices, 0])[1] += 1
    total = peak = 0.0
    moves = []
    for (_, x), (choices, count) in together.items():
        points = [
            (
                problem.microbatches * (c.forward_s + c.backward_s) + c.first_forward_extra_s + c.last_backward_extra_s,
                c.static_bytes + x * c.saved_bytes,
            )
            for c in choices
        ]
        front = convex_front(points)
        total += count * front[0][0]
        room -= count * front[0][1]
        peak = max(peak, min(c.transient_bytes for c in choices))
        moves += [((b[0] - a[0]) / (a[1] - b[1]), count * (a[1] - b[1])) for a, b in pairwise(front)]
    room -= peak
    for slope, size in sorted(moves):
        if room >= 0:
            break
        moved = min(size, -room)
        total += slope * moved
        room += moved
    return total if room >= -1 else inf


def convex_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex front of (seconds, bytes), from the fastest to the smallest.

    >>> convex_front([(1.0, 10.0), (2.0, 9.0), (3.0, 2.0)])
    [(1.0, 10.0), (3.0, 2.0)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if front and point[1] >= front[-1][1]:
            continue
        while len(front) > 1 and _slope(front[-2], front[-1]) >= _slope(front[-1], point):
            front.pop()
        front.append(point)
    return front


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
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
    split = Relaxation(0.0, float(least), tuple(n.astype(np.float64) for n in needs), chain.positions)
    ends = split.boundaries(0.0)
    at = [int(np.searchsorted(chain.positions, e)) for e in (0, *ends)]
    sizes = [int(n[at[s] if s else 0, at[s + 1] if s < pp - 1 else 0]) for s, n in enumerate(needs)]
    return least + problem.stage_fixed_bytes, sizes.index(max(sizes))
