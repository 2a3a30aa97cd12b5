"""A chain of layers as arrays, and what one stage costs at least for every interval of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from .problem import Layer

MULTIPLIERS = 8


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
