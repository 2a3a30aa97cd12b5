"""Proven lower bounds of a problem in closed form: of its step time (lb0) and of the memory it needs.

    lb0   mixture of schedule paths, layer by layer, memory ignored                    `lb0`
    lb1   the same mixture by dynamic programming over boundaries, memory priced       `relaxation.relax`
    lb2   the worst single path by dynamic programming over boundaries, memory priced  `relaxation.relax`

Notation: w_s = F_s + B_s of stage s; W_<s, W_>s the sums of w over the stages before and after; M microbatches;
u_s = pp - s warm-up forwards of stage s under 1F1B. Every bound counts events along chains of the schedule's
fixed order (`costmodels.schedules`), so it holds for all stage times, however the layers are split. Paths:

    A(s)   1F1B           W_<s + M w_s                          (stage s works M times in turn)
    R(s)   interleaved    W_<s + M sum of w over s's chunks     (W_<s: the chunks before the rank's first one)
    H(s)   zero-bubble    F_<s + M w_s                          (weights' gradients may end the rank's work)
    Z(s)   1F1B, M > u_s  W_<s + (M - u_s + 1) w_s + 2 W_>s     (zigzag: down and back before and after)
    G(s)   GPipe          W_<s + M w_s + W_>s

A and G hold the first forward and last backward of stages 0..s; Z holds those of all stages. A crosses each cut
before s twice, G every cut twice, Z the cuts before s twice and those behind four times. All end in tail_0; A and
G can end in tail_s instead, without the backwards of W_<s.
"""

from __future__ import annotations

import numpy as np

from .problem import Layer, Problem

# Relative slack for rounding in the sums below: a bound must never exceed the optimum by a rounding error.
ROUNDING = 1e-9


def mixture(schedule: str, stages: int, microbatches: int) -> float:
    """The factor a with step >= a sum_s w_s for every split of the layers.

    GPipe: the mean of G(s) over s has the factor (M + pp - 1)/pp on every w.
    1F1B with M > pp: weights p_s >= 0 on Z(s) with sum 1 give w_t the factor
    1 + sum_{s<t} p_s + (M - u_t) p_t; setting all equal to a gives a = (M + pp - 1)/pp (p rises from
    p_0 = (a - 1)/(M - pp), which is positive because M > pp).
    1F1B with M <= pp: weights on A(s) give w_t the factor M p_t + sum_{s>t} p_s = a; with R_t = sum_{s>=t} p_s,
    R_t = a/M + (1 - 1/M) R_{t+1} and R_0 = 1 give a = 1/(1 - (1 - 1/M)^pp). The textbook bubble is no bound
    here: uneven stages beat it.
    Zero-bubble: the mean of H(s) over s has the factor M / pp.

    >>> mixture("gpipe", 4, 8), mixture("1f1b", 4, 13), mixture("1f1b", 2, 2)
    (2.75, 4.0, 1.3333333333333333)
    """
    if schedule == "zb" and stages > 1:
        return microbatches / stages
    if schedule == "gpipe" or stages == 1 or microbatches > stages:
        return (microbatches + stages - 1) / stages
    return 1 / (1 - (1 - 1 / microbatches) ** stages)


def lb0(problem: Problem) -> float:
    """Lower bound of the step time without memory [s].

    With one stage the step is sum over layers of M (f + v) + first + last + tail: each layer takes its cheapest
    choice. With more, a sum_s w_s (see `mixture`) with each layer's least f + v; interleaved, whose chunks are given,
    the longest R(s): the forwards of microbatch 0 before rank s's first, all its work, and the backwards of the last
    microbatch behind its last.
    """
    m, pp = problem.microbatches, problem.stages
    price = _layer_step if pp == 1 else _layer_work
    known: dict[int, float] = {}
    values = []
    for layer in problem.layers:
        value = known.get(id(layer.choices))
        if value is None:
            value = known[id(layer.choices)] = price(layer, m)
        values.append(value)
    if pp == 1:
        total = sum(values)
    elif problem.ends is not None:
        spans = zip((0, *problem.ends), problem.ends, strict=False)
        total = float(longest_rank(np.array([[sum(values[a:b])] for a, b in spans]), pp, np.array([m]))[0])
    else:
        total = mixture(problem.schedule, pp, m) * sum(values)
    return total * (1 - ROUNDING) + problem.step_fixed_s


def longest_rank(work: np.ndarray, pp: int, microbatches: np.ndarray) -> np.ndarray:
    """max over ranks s of R(s), for C chunks whose forward and backward take `work` (C, n), and M (n,)."""
    ranks = work.reshape(-1, pp, work.shape[1]).sum(0)
    before = np.concatenate((np.zeros((1, work.shape[1])), np.cumsum(work[: pp - 1], axis=0)))
    return (before + microbatches * ranks).max(0)


def _layer_step(layer: Layer, m: int) -> float:
    """The least of M (f + v) + once-a-step times over the choices."""
    return min(
        m * (c.forward_s + c.backward_s) + c.first_forward_extra_s + c.last_backward_extra_s + c.tail_s
        for c in layer.choices
    )


def _layer_work(layer: Layer, m: int) -> float:
    """The least f + v over the choices."""
    return min(c.forward_s + c.backward_s for c in layer.choices)


def least_in_flight(schedule: str, stages: int, microbatches: int) -> int:
    """What every chunk of some rank has in flight at one moment, at least, whichever rank it is.

    1F1B's last stage holds one microbatch, GPipe's all of them; under ZB-H1 every rank gets to min(pp, M). When an
    interleaved rank starts its first backward, each of its chunks has at least one microbatch in flight.
    """
    if schedule == "gpipe":
        return microbatches
    return min(stages, microbatches) if schedule == "zb" else 1


def most_in_flight(schedule: str, stages: int, microbatches: int) -> int:
    """What the first rank has in flight, where ranks hold from this many down to `least_in_flight`, in equal steps.

    1F1B with M >= pp: pp - s microbatches on rank s.
    """
    if schedule == "1f1b" and microbatches >= stages:
        return stages
    return least_in_flight(schedule, stages, microbatches)


def memory_floor(problem: Problem) -> float:
    """Lower bound of the least limit under which anything fits [B].

    Every chunk keeps at least x microbatches at one moment of its rank (`least_in_flight`), so the pp ranks together
    hold at least sum over layers of min over choices of static + x saved; the fullest rank holds at least the mean.
    """
    x = least_in_flight(problem.schedule, problem.stages, problem.microbatches)
    known: dict[int, int] = {}
    total = 0
    for layer in problem.layers:
        value = known.get(id(layer.choices))
        if value is None:
            value = known[id(layer.choices)] = min(c.static_bytes + x * c.saved_bytes for c in layer.choices)
        total += value
    return total / problem.stages + problem.stage_fixed_bytes
