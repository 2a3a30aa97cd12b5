"""Proven lower bounds of a problem's step time, cheap enough for every candidate of the search.

    lb0   mixture of schedule paths, layer by layer, memory ignored                    `lb0`
    lb1   the same mixture by dynamic programming over boundaries, memory priced       `relax`
    lb2   the worst single path by dynamic programming over boundaries, memory priced  `relax`

Notation: w_s = F_s + B_s of stage s; W_<s, W_>s the sums of w over the stages before and after; M microbatches;
u_s = pp - s warm-up forwards of stage s under 1F1B. Every bound counts events along chains of the schedule's
fixed order (`costmodels.schedules`), so it holds for all stage times, however the layers are split. Paths:

    A(s)   1F1B           W_<s + M w_s                          (stage s works M times in turn)
    Z(s)   1F1B, M > u_s  W_<s + (M - u_s + 1) w_s + 2 W_>s     (zigzag: down and back before and after)
    G(s)   GPipe          W_<s + M w_s + W_>s

A and G hold the first forward and last backward of stages 0..s; Z holds those of all stages. A crosses each cut
before s twice, G every cut twice, Z the cuts before s twice and those behind four times. All end in tail_0; A and
G can end in tail_s instead, without the backwards of W_<s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ..costmodels.schedules import in_flight_microbatches
from .problem import Layer, Problem

# Relative slack for rounding in the sums below: a bound must never exceed the optimum by a rounding error.
ROUNDING = 1e-9
MULTIPLIERS = 8


def mixture(schedule: str, stages: int, microbatches: int) -> float:
    """The factor a with step >= a sum_s w_s for every split of the layers.

    GPipe: the mean of G(s) over s has the factor (M + pp - 1)/pp on every w.
    1F1B with M > pp: weights p_s >= 0 on Z(s) with sum 1 give w_t the factor
    1 + sum_{s<t} p_s + (M - u_t) p_t; setting all equal to a gives a = (M + pp - 1)/pp (p rises from
    p_0 = (a - 1)/(M - pp), which is positive because M > pp).
    1F1B with M <= pp: weights on A(s) give w_t the factor M p_t + sum_{s>t} p_s = a; with R_t = sum_{s>=t} p_s,
    R_t = a/M + (1 - 1/M) R_{t+1} and R_0 = 1 give a = 1/(1 - (1 - 1/M)^pp). The textbook bubble is no bound
    here: uneven stages beat it.

    >>> mixture("gpipe", 4, 8), mixture("1f1b", 4, 13), mixture("1f1b", 2, 2)
    (2.75, 4.0, 1.3333333333333333)
    """
    if schedule == "gpipe" or stages == 1 or microbatches > stages:
        return (microbatches + stages - 1) / stages
    return 1 / (1 - (1 - 1 / microbatches) ** stages)


def lb0(problem: Problem) -> float:
    """Lower bound of the step time without memory [s].

    With one stage the step is sum over layers of M (f + v) + first + last + tail: each layer takes its cheapest
    choice. With more, a sum_s w_s (see `mixture`) with each layer's least f + v.
    """
    m, pp = problem.microbatches, problem.stages
    a = mixture(problem.schedule, pp, m)
    price = _layer_step if pp == 1 else _layer_work
    known: dict[int, float] = {}
    total = 0.0
    for layer in problem.layers:
        value = known.get(id(layer.choices))
        if value is None:
            value = known[id(layer.choices)] = price(layer, m)
        total += value
    return (total if pp == 1 else a * total) * (1 - ROUNDING) + problem.step_fixed_s


def _layer_step(layer: Layer, m: int) -> float:
    """The least of M (f + v) + once-a-step times over the choices."""
    return min(
        m * (c.forward_s + c.backward_s) + c.first_forward_extra_s + c.last_backward_extra_s + c.tail_s
        for c in layer.choices
    )


def _layer_work(layer: Layer, m: int) -> float:
    """The least f + v over the choices."""
    return min(c.forward_s + c.backward_s for c in layer.choices)


def memory_floor(problem: Problem) -> float:
    """Lower bound of the least limit under which anything fits [B].

    Every stage keeps at least min_s x_s microbatches, so the pp stages together hold at least
    sum over layers of min over choices of static + min_s x_s saved; the largest stage holds at least the mean.
    """
    x = min(in_flight_microbatches(problem.schedule, problem.stages, problem.microbatches))
    known: dict[int, int] = {}
    total = 0
    for layer in problem.layers:
        value = known.get(id(layer.choices))
        if value is None:
            value = known[id(layer.choices)] = min(c.static_bytes + x * c.saved_bytes for c in layer.choices)
        total += value
    return total / problem.stages + problem.stage_fixed_bytes


@dataclass(frozen=True, slots=True)
class Chain:
    """A problem's layers as arrays.

    n layers with d distinct sets of k choices (short ones repeat their first), p legal positions.

    index : (n,) which set of choices
    positions : (p,) 0, the positions behind legal cuts, n
    work, once, static, saved, transient : (d, k) f + v and first + last + tail [s]; bytes
    extra, tail, forward : (p,) prefix sums over layers of the least first + last, tail and f at each position
    send, cut : (p,) transfer [s] and kept bytes of a cut at each position
    peak : (p, p) largest over layers i..j of the least transient
    """

    index: np.ndarray
    positions: np.ndarray
    work: np.ndarray
    once: np.ndarray
    static: np.ndarray
    saved: np.ndarray
    transient: np.ndarray
    extra: np.ndarray
    tail: np.ndarray
    forward: np.ndarray
    send: np.ndarray
    cut: np.ndarray
    peak: np.ndarray


def chain_arrays(layers: Sequence[Layer]) -> Chain:
    """The arrays of a chain; they depend on the layers alone, so candidates with equal layers share them."""
    distinct: dict[int, int] = {}
    unique: list[Layer] = []
    index = []
    for layer in layers:
        if id(layer.choices) not in distinct:
            distinct[id(layer.choices)] = len(unique)
            unique.append(layer)
        index.append(distinct[id(layer.choices)])
    width = max(len(layer.choices) for layer in unique)
    numbers = np.array(
        [
            [
                (
                    c.forward_s,
                    c.backward_s,
                    c.first_forward_extra_s,
                    c.last_backward_extra_s,
                    c.tail_s,
                    c.static_bytes,
                    c.saved_bytes,
                    c.transient_bytes,
                )
                for c in layer.choices + layer.choices[:1] * (width - len(layer.choices))
            ]
            for layer in unique
        ],
        dtype=np.float64,
    )
    n = len(layers)
    positions = np.array([0, *(i + 1 for i in range(n - 1) if layers[i].cut_after), n])
    f, v, first, last, tail, static, saved, transient = np.moveaxis(numbers, 2, 0)
    inner = [layers[p - 1] for p in positions[1:-1]]
    chain = np.array(index)
    least = np.maximum.reduceat(transient.min(1)[chain], positions[:-1])
    peak = np.zeros((len(positions), len(positions)))
    peak[:-1, 1:] = np.maximum.accumulate(np.triu(np.broadcast_to(least, (len(least), len(least)))), axis=1)
    return Chain(
        index=chain,
        positions=positions,
        work=f + v,
        once=first + last + tail,
        static=static,
        saved=saved,
        transient=transient,
        extra=_prefix((first + last).min(1)[chain], positions),
        tail=_prefix(tail.min(1)[chain], positions),
        forward=_prefix(f.min(1)[chain], positions),
        send=np.array([0.0, *(layer.send_s for layer in inner), 0.0]),
        cut=np.array([0.0, *(float(layer.cut_bytes) for layer in inner), 0.0]),
        peak=peak,
    )


def _prefix(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Sums of the values before each position."""
    return np.concatenate(([0.0], np.cumsum(values)))[positions]


def stage_work(
    chain: Chain,
    times: np.ndarray,
    in_flight: int,
    capacity: float,
    rows: slice = slice(None),
    cols: slice = slice(None),
) -> np.ndarray:
    """Least time of one stage that holds the layers between two positions, memory priced [s].

    For every multiplier mu >= 0 and all choices that fit in `room`:
    sum t >= sum t + mu (sum m - room) >= sum_layers min_o (t_o + mu m_o) - mu room. The largest over mu is
    taken; slopes between two choices are where the maximum lies. Intervals whose least memory exceeds the room,
    and empty ones, are inf.

    Parameters
    ----------
    times : (d, k) array
        Seconds of each choice that the bound sums up.
    in_flight : int
        x: memory of a choice is static + x saved.
    capacity : float
        Limit minus fixed bytes [B].
    rows, cols : slice
        Start and end positions wanted.
    """
    memory = chain.static + in_flight * chain.saved
    room = capacity - in_flight * chain.cut[rows, None] - chain.peak[rows, cols]

    def between(values: np.ndarray) -> np.ndarray:
        sums = _prefix(values[chain.index], chain.positions)
        return sums[None, cols] - sums[rows, None]

    bound = between(times.min(1))
    least = between(memory.min(1))
    if (between(memory[np.arange(len(times)), times.argmin(1)]) > room).any():
        for mu in _multipliers(times, memory):
            np.maximum(bound, between((times + mu * memory).min(1)) - mu * room, out=bound)
    order = np.arange(len(chain.positions))
    bound[(least > room) | (order[rows, None] >= order[None, cols])] = inf
    return bound


def _multipliers(times: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Seconds per byte at which some layer changes its choice, at most `MULTIPLIERS` of them."""
    slower = times[:, None, :] - times[:, :, None]
    smaller = memory[:, :, None] - memory[:, None, :]
    mask = (slower > 0) & (smaller > 0)
    slopes = np.unique(slower[mask] / smaller[mask])
    if len(slopes) > MULTIPLIERS:
        slopes = slopes[np.linspace(0, len(slopes) - 1, MULTIPLIERS).round().astype(int)]
    return slopes


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

    With one stage both are M (f + v) + first + last + tail with memory priced.
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


def least_memory(problem: Problem, chain: Chain) -> tuple[int, int]:
    """The least limit under which some assignment fits, exactly, and the stage that needs it [B].

    min over splits of max_s of min over choices of static + x_s saved + x_s cut + transient + fixed; the
    largest transient is tried at every value that occurs. Needs as many legal pieces as stages.
    """
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
