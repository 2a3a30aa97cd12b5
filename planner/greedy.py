"""A good assignment for given boundaries, without a solver: cheapest seconds per byte first.

It gives the search upper bounds; it proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..costmodels.schedules import in_flight_microbatches
from .problem import Assignment, Choice, Layer, Problem


@dataclass(slots=True)
class _Group:
    """Equal layers of one stage: how many take each choice."""

    layer: Layer
    positions: list[int]
    counts: list[int]


def fill(problem: Problem, boundaries: tuple[int, ...]) -> Assignment | None:
    """Choices for the layers between `boundaries`: the fastest, then, stage by stage, smaller ones until it fits.

    A stage over its limit moves layers along the convex front of (bytes, seconds of a step), fewest seconds per
    byte first; then layers move back where the room left allows it. None if a stage does not fit.
    """
    choices = [0] * len(problem.layers)
    start = 0
    for s, x in enumerate(in_flight_microbatches(problem.schedule, problem.stages, problem.microbatches)):
        groups = _groups(problem, start, boundaries[s])
        cut = problem.layers[start - 1].cut_bytes if s else 0
        room = problem.memory_bytes - problem.stage_fixed_bytes - x * cut
        if not _fit(groups, room, x, problem.microbatches):
            return None
        for group in groups:
            taken = [o for o, count in enumerate(group.counts) for _ in range(count)]
            for position, choice in zip(group.positions, taken, strict=True):
                choices[position] = choice
        start = boundaries[s]
    return Assignment(tuple(boundaries), tuple(choices))


def _groups(problem: Problem, start: int, end: int) -> list[_Group]:
    """The layers of one stage by identity of their choices, each with its fastest choice."""
    groups: dict[int, _Group] = {}
    for position in range(start, end):
        layer = problem.layers[position]
        group = groups.get(id(layer.choices))
        if group is None:
            group = groups[id(layer.choices)] = _Group(layer, [], [0] * len(layer.choices))
        group.positions.append(position)
    for group in groups.values():
        seconds = [_seconds(choice, problem.microbatches) for choice in group.layer.choices]
        group.counts[seconds.index(min(seconds))] = len(group.positions)
    return list(groups.values())


def _seconds(choice: Choice, microbatches: int) -> float:
    """What a choice adds to its stage's part of the step."""
    once = choice.first_forward_extra_s + choice.last_backward_extra_s + choice.tail_s
    return microbatches * (choice.forward_s + choice.backward_s) + once


def _size(choice: Choice, x: int) -> int:
    return choice.static_bytes + x * choice.saved_bytes


def _used(groups: list[_Group], x: int) -> int:
    """Bytes of the stage without what is fixed."""
    total = peak = 0
    for group in groups:
        for choice, count in zip(group.layer.choices, group.counts, strict=True):
            if count:
                total += count * _size(choice, x)
                peak = max(peak, choice.transient_bytes)
    return total + peak


def _fit(groups: list[_Group], room: int, x: int, microbatches: int) -> bool:
    """Move layers to smaller choices until the stage fits, then back where there is room."""
    if _used(groups, x) <= room:
        return True
    steps = sorted(
        (step for g, group in enumerate(groups) for step in _front(group.layer, g, x, microbatches)),
    )
    for _, g, slow, fast in steps:
        counts, options = groups[g].counts, groups[g].layer.choices
        saves = _size(options[fast], x) - _size(options[slow], x)
        while counts[fast] and (excess := _used(groups, x) - room) > 0:
            moved = min(counts[fast], -(-excess // saves))
            counts[fast] -= moved
            counts[slow] += moved
    if _used(groups, x) > room:
        return False
    for _, g, slow, fast in reversed(steps):
        counts = groups[g].counts
        while counts[slow]:
            counts[slow] -= 1
            counts[fast] += 1
            if _used(groups, x) > room:
                counts[slow] += 1
                counts[fast] -= 1
                break
    return True


def _front(layer: Layer, g: int, x: int, microbatches: int) -> list[tuple[float, int, int, int]]:
    """Steps (seconds per byte, group, slower choice, faster choice) along the lower convex front."""
    points = sorted((_seconds(choice, microbatches), _size(choice, x), o) for o, choice in enumerate(layer.choices))
    front = [points[0]]
    for point in points[1:]:
        if point[1] >= front[-1][1]:
            continue
        while len(front) > 1 and _slope(front[-2], front[-1]) >= _slope(front[-1], point):
            front.pop()
        front.append(point)
    return [(_slope(a, b), g, b[2], a[2]) for a, b in pairwise(front)]


def _slope(a: tuple[float, int, int], b: tuple[float, int, int]) -> float:
    """Seconds paid per byte saved from a to b."""
    return (b[0] - a[0]) / (a[1] - b[1])
