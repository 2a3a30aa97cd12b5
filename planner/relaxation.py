"""Dynamic programmes over stage boundaries: lower bounds of the step time, windows, and the least memory.

The paths A, Z and G are those of `bounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ..costmodels.schedules import (
    in_flight_microbatches,
)
from .bounds import ROUNDING, mixture
from .chunk_bounds import fixed_memory
from .intervals import Band, Chain, band_of, stage_work
from .problem import Problem


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
    Interleaved problems, whose chunks are given, have `chunk_bounds.fixed_bound` instead.

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


def least_memory(problem: Problem, chain: Chain) -> tuple[int, int]:
    """The least limit under which some assignment fits, exactly, and the stage that needs it [B].

    min over splits of max_s of min over choices of static + x_s saved + x_s cut + transient + fixed; the
    largest transient is tried at every value that occurs. Needs as many legal pieces as stages. For given chunks it
    is a lower bound (`solve` has the exact figure).
    """
    if problem.ends is not None:
        return fixed_memory(problem)
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
