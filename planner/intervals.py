"""A chain of layers as arrays, and what a stage costs at least for every interval of it."""

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

    n layers with d distinct sets of k choices (short ones repeat their first), p legal positions (p - 1 pieces).

    index : (n,) which set of choices
    positions : (p,) 0, the positions behind legal cuts, n
    work, once, static, saved, transient : (d, k) f + v and first + last + tail [s]; bytes
    extra, tail, forward : (p,) prefix sums over layers of the least first + last, tail and f at each position
    least : (p,) prefix sums of the least work
    send, cut : (p,) transfer [s] and kept bytes of a cut at each position
    peak : (p - 1,) largest over the layers of a piece of the least transient
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
    least: np.ndarray
    send: np.ndarray
    cut: np.ndarray
    peak: np.ndarray


def chain_arrays(layers: Sequence[Layer]) -> Chain:
    """The arrays of a chain; they depend on the layers alone."""
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
        least=_prefix((f + v).min(1)[chain], positions),
        send=np.array([0.0, *(layer.send_s for layer in inner), 0.0]),
        cut=np.array([0.0, *(float(layer.cut_bytes) for layer in inner), 0.0]),
        peak=np.maximum.reduceat(transient.min(1)[chain], positions[:-1]),
    )


def _prefix(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Sums of the values (..., n) before each position."""
    zero = np.zeros((*values.shape[:-1], 1))
    return np.concatenate((zero, np.cumsum(values, axis=-1)), axis=-1)[..., positions]


@dataclass(frozen=True, slots=True)
class Band:
    """Intervals of at most w pieces: [i, k] starts at position i and holds k + 1 pieces.

    ends : (p - 1, w) position behind the interval, clipped; legal : whether it is on the chain
    starts : (p, w) position where the interval of k + 1 pieces that ends at j starts, clipped; reaches : whether it is
        on the chain
    """

    ends: np.ndarray
    legal: np.ndarray
    starts: np.ndarray
    reaches: np.ndarray

    def by_end(self, values: np.ndarray) -> np.ndarray:
        """(p - 1, w) values of intervals by their start, as (p, w) by their end; inf off the chain."""
        width = self.starts.shape[1]
        return np.where(self.reaches, values[self.starts, np.arange(width)], inf)


def band_of(chain: Chain, most_work: float) -> Band:
    """The intervals worth a look: those of so many pieces that some of them does no more than `most_work` [s]."""
    pieces = len(chain.positions) - 1
    width = pieces
    if most_work < inf:
        width = 1
        while width < pieces and (chain.least[width + 1 :] - chain.least[: -width - 1]).min() <= most_work:
            width += 1
    reach = np.arange(1, width + 1)
    ends = np.arange(pieces)[:, None] + reach
    starts = np.arange(pieces + 1)[:, None] - reach
    return Band(np.minimum(ends, pieces), ends <= pieces, np.maximum(starts, 0), starts >= 0)


def stage_work(chain: Chain, band: Band, times: np.ndarray, in_flight: Sequence[int], capacity: float) -> np.ndarray:
    """Least time of each stage for every interval of the band, memory priced: (stages, p - 1, w) [s].

    For every multiplier mu >= 0 and all choices that fit in `room`:
    sum t >= sum t + mu (sum m - room) >= sum_layers min_o (t_o + mu m_o) - mu room. The largest over mu is
    taken; slopes between two choices are where the maximum lies. Intervals whose least memory exceeds the room,
    and those off the chain, are inf.

    Parameters
    ----------
    times : (d, k) array
        Seconds of each choice that the bound sums up.
    in_flight : sequence of int
        x of each stage: memory of a choice is static + x saved.
    capacity : float
        Limit minus fixed bytes [B].
    """
    x = np.asarray(in_flight, dtype=np.float64)[:, None, None]
    memory = chain.static + x * chain.saved
    room = capacity - x * chain.cut[:-1, None] - _peaks(chain, band)
    starts = np.arange(len(chain.positions) - 1)[:, None]

    def between(values: np.ndarray) -> np.ndarray:
        sums = _prefix(values[..., chain.index], chain.positions)
        return sums[..., band.ends] - sums[..., starts]

    bound = np.broadcast_to(between(times.min(1)), room.shape).copy()
    least = between(memory.min(2))
    fastest = between(memory[:, np.arange(len(times)), times.argmin(1)])
    tight = (fastest > room).any((1, 2))
    if tight.any():
        priced = bound[tight]
        for mu in _multipliers(times, memory[tight]):
            price = mu[:, None, None]
            np.maximum(priced, between((times + price * memory[tight]).min(2)) - price * room[tight], out=priced)
        bound[tight] = priced
    bound[(least > room) | ~band.legal] = inf
    return bound


def _peaks(chain: Chain, band: Band) -> np.ndarray:
    """The largest of the least transients in every interval of the band."""
    pieces, width = band.ends.shape
    peaks = np.empty((pieces, width))
    peaks[:, 0] = chain.peak
    for k in range(1, width):
        peaks[:, k] = np.maximum(peaks[:, k - 1], chain.peak[np.minimum(np.arange(pieces) + k, pieces - 1)])
    return peaks


def _multipliers(times: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Seconds per byte at which some layer changes its choice: (`MULTIPLIERS`, stages), 0 where there is none.

    Parameters
    ----------
    times : (d, k) array
    memory : (stages, d, k) array
    """
    slower = times[:, None, :] - times[:, :, None]
    smaller = memory[:, :, :, None] - memory[:, :, None, :]
    mask = (slower > 0) & (smaller > 0)
    slopes = np.where(mask, slower / np.where(mask, smaller, 1.0), inf).reshape(len(memory), -1)
    slopes.sort(axis=1)
    most = np.maximum(mask.reshape(len(memory), -1).sum(1) - 1, 0)
    at = (most[:, None] * np.linspace(0, 1, MULTIPLIERS)).round().astype(int)
    found = np.take_along_axis(slopes, at, 1)
    return np.where(found < inf, found, 0.0).T
