"""The convex front of a layer's choices: what is worth taking when seconds are paid for bytes."""

from __future__ import annotations

from collections.abc import Sequence


def convex_front(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The lower convex front of (seconds, bytes, which), from the fastest to the smallest.

    >>> convex_front([(1.0, 10.0, 0), (2.0, 9.0, 1), (3.0, 2.0, 2)])
    [(1.0, 10.0, 0), (3.0, 2.0, 2)]
    """
    front: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if front and point[1] >= front[-1][1]:
            continue
        while len(front) > 1 and slope(front[-2], front[-1]) >= slope(front[-1], point):
            front.pop()
        front.append(point)
    return front


def slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Seconds paid per byte saved from a to b."""
    return (b[0] - a[0]) / (a[1] - b[1])
