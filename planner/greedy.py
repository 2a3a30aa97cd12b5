"""A good assignment for given boundaries, without a solver: cheapest seconds per byte first.

It gives the search upper bounds; it proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..costmodels.schedules import in_flight_vectors
from .front import convex_front, slope
from .problem import Assignment, Choice, Layer, Problem


@dataclass(slots=True)
class _Group:
    """Equal layers of one chunk with `in_flight` microbatches: how many take each choice."""

    layer: Layer
    in_flight: int
    positions: list[int]
    counts: list[int]

    def size(self, o: int) -> int:
        """Bytes that one layer with choice `o` keeps."""
        choice = self.layer.choices[o]
        return choice.static_bytes + self.in_flight * choice.saved_bytes


def fill(problem: Problem, boundaries: tuple[int, ...]) -> Assignment | None:
    """Choices for the layers between `boundaries`: the fastest, then, rank by rank, smaller ones until it fits.

    A rank over its limit moves layers along the convex front of (bytes, seconds of a step), fewest seconds per
    byte first; then layers move back where the room left allows it. Of an interleaved rank's vectors of microbatches in
    flight only the one with most of them is asked for (`evaluate` judges all). None if a rank does not fit, or there
    are no boundaries.
    """
    if not boundaries:
        return None
    choices = [0] * len(problem.layers)
    vectors = in_flight_vectors(problem.schedule, problem.stages, problem.microbatches, problem.virtual)
    for s in range(problem.stages):
        groups: list[_Group] = []
        room = problem.memory_bytes - problem.stage_fixed_bytes
        for c, x in zip(range(s, problem.chunks, problem.stages), max(vectors[s], key=sum), strict=True):
            start = boundaries[c - 1] if c else 0
            room -= x * problem.layers[start - 1].cut_bytes if c else 0
            groups += _groups(problem, start, boundaries[c], x)
        if not _fit(groups, room, problem.microbatches):
            return None
        for group in groups:
            taken = [o for o, count in enumerate(group.counts) for _ in range(count)]
            for position, choice in zip(group.positions, taken, strict=True):
                choices[position] = choice
    return Assignment(tuple(boundaries), tuple(choices))


def _groups(problem: Problem, start: int, end: int, x: int) -> list[_Group]:
    """The layers of one chunk by identity of their choices, each with its fastest choice."""
    groups: dict[int, _Group] = {}
    for position in range(start, end):
        layer = problem.layers[position]
        group = groups.get(id(layer.choices))
        if group is None:
            group = groups[id(layer.choices)] = _Group(layer, x, [], [0] * len(layer.choices))
        group.positions.append(position)
    for group in groups.values():
        seconds = [_seconds(choice, problem.microbatches) for choice in group.layer.choices]
        group.counts[seconds.index(min(seconds))] = len(group.positions)
    return list(groups.values())


def _seconds(choice: Choice, microbatches: int) -> float:
    """What a choice adds to its rank's part of the step."""
    once = choice.first_forward_extra_s + choice.last_backward_extra_s + choice.tail_s
    return microbatches * (choice.forward_s + choice.backward_s) + once


def _used(groups: list[_Group]) -> int:
    """Bytes of the rank without what is fixed."""
    total = peak = 0
    for group in groups:
        for o, (choice, count) in enumerate(zip(group.layer.choices, group.counts, strict=True)):
            if count:
                total += count * group.size(o)
                peak = max(peak, choice.transient_bytes)
    return total + peak


def _fit(groups: list[_Group], room: int, microbatches: int) -> bool:
    """Move layers to smaller choices until the rank fits, then back where there is room."""
    if _used(groups) <= room:
        return True
    steps = sorted(
        (step for g, group in enumerate(groups) for step in _front(group, g, microbatches)),
    )
    for _, g, slow, fast in steps:
        counts, group = groups[g].counts, groups[g]
        saves = group.size(fast) - group.size(slow)
        while counts[fast] and (excess := _used(groups) - room) > 0:
            moved = min(counts[fast], -(-excess // saves))
            counts[fast] -= moved
            counts[slow] += moved
    if _used(groups) > room:
        return False
    for _, g, slow, fast in reversed(steps):
        counts = groups[g].counts
        while counts[slow]:
            counts[slow] -= 1
            counts[fast] += 1
            if _used(groups) > room:
                counts[slow] += 1
                counts[fast] -= 1
                break
    return True


def _front(group: _Group, g: int, microbatches: int) -> list[tuple[float, int, int, int]]:
    """Steps (seconds per byte, group, slower choice, faster choice) along the lower convex front."""
    choices = group.layer.choices
    front = convex_front([(_seconds(choice, microbatches), group.size(o), o) for o, choice in enumerate(choices)])
    return [(slope(a, b), g, b[2], a[2]) for a, b in pairwise(front)]
