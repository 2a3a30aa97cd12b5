"""How many bytes live, tick by tick, while a unit runs forward and backward."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from .recording import RawOp, RawStorage, Recording


def _curve(start: int, end: int, spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """Sum over (born, died, bytes) of what lives at each tick of [start, end]; died < 0 is for ever."""
    steps = [0] * (end - start + 2)
    for born, died, nbytes in spans:
        last = end if died < 0 else min(died, end)
        if last < start:
            continue
        steps[max(born, start) - start] += nbytes
        steps[last - start + 1] -= nbytes
    level, curve = 0, []
    for step in steps[:-1]:
        level += step
        curve.append(level)
    return curve


def _born(rec: Recording, start: int, end: int) -> list[RawStorage]:
    low = bisect_left(rec.storages, start, key=lambda s: s.born)
    high = bisect_left(rec.storages, end + 1, key=lambda s: s.born)
    return rec.storages[low:high]


def forward_curve(rec: Recording, ops: Sequence[RawOp], kept: Collection[int]) -> list[int]:
    """Live bytes made by `ops`, above the total of the storages `kept` (saved, or outputs of the unit)."""
    if not ops:
        return [0]
    start, end = ops[0].clock, ops[-1].clock
    own = [(s.born, s.died, s.nbytes) for s in _born(rec, start, end)]
    base = sum(rec.storages[s].nbytes for s in kept if start <= rec.storages[s].born <= end)
    return [level - base for level in _curve(start, end, own)]


def backward_curve(rec: Recording, ops: Sequence[RawOp], saved: Collection[int]) -> list[int]:
    """Live bytes made by the backward of `ops` (parameter gradients excluded), above what `saved` held at its start."""
    ticks = [c for op in ops for c in op.backward_clocks]
    if not ticks:
        return [0]
    start, end = min(ticks), max(ticks)
    own = [(s.born, s.died, s.nbytes) for s in _born(rec, start, end) if not s.parameter_gradient]
    held = [(start, rec.storages[s].died, rec.storages[s].nbytes) for s in saved]
    base = sum(nbytes for _, _, nbytes in held)
    return [level - base for level in _curve(start, end, own + held)]
