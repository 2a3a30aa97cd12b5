"""Which choices a row of layers takes if their bytes have to fit and some weighted time is to be least: a knapsack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# More points of a front than this are merged, with their bytes rounded down: still a bound.
MOST_POINTS = 1500


@dataclass(slots=True)
class Front:
    """What a row of layers can cost: points (bytes rising, value falling), and how each came about."""

    size: np.ndarray
    value: np.ndarray
    came: np.ndarray
    option: np.ndarray
    parent: Front | None = None

    def extended(self, sizes: np.ndarray, values: np.ndarray, options: np.ndarray, room: float) -> Front:
        """With one layer more, whose `options` have `sizes` and `values`; only what fits in `room`."""
        size = (self.size[:, None] + sizes).ravel()
        value = (self.value[:, None] + values).ravel()
        fits = np.flatnonzero(size <= room)
        order = fits[np.lexsort((value[fits], size[fits]))]
        lowest = np.minimum.accumulate(value[order])
        order = order[np.flatnonzero(np.concatenate(([True], lowest[1:] < lowest[:-1])))] if len(order) else order
        if len(order) > MOST_POINTS:
            # The least value among points of nearly equal size, at the smallest of their sizes.
            group = np.minimum((size[order] / room * MOST_POINTS).astype(int), MOST_POINTS)
            first = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
            last = np.concatenate((first[1:], [len(order)])) - 1
            smallest = size[order[first]]
            order = order[last]
            size = size.copy()
            size[order] = smallest
        came, option = np.divmod(order, len(sizes))
        return Front(size[order], value[order], came, options[option], self)

    def choices(self) -> list[int]:
        """The choice of each layer at the last point, the one of least value."""
        at, found, front = len(self.size) - 1, [], self
        while front.parent is not None:
            found.append(int(front.option[at]))
            at, front = int(front.came[at]), front.parent
        return found[::-1]

    @staticmethod
    def empty() -> Front:
        """No layer: nothing, for nothing."""
        return Front(np.zeros(1), np.zeros(1), np.zeros(1, int), np.zeros(1, int))
