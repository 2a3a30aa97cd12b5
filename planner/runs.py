"""Runs: adjacent layers with equal numbers, folded into one piece of the ILP with a count."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Choice, Layer, Problem


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal layers from position `start` on.

    `options` are the indices of the layer's choices that no other choice dominates.
    """

    start: int
    count: int
    layer: Layer
    options: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position after the last layer."""
        return self.start + self.count


def fold(problem: Problem) -> tuple[Run, ...]:
    """The chain as runs of adjacent equal layers; a run ends where numbers or cut flags change.

    >>> a, b = (Layer(k, (Choice("none", 1.0 + k, 2.0),)) for k in (0, 1))
    >>> [(r.start, r.count) for r in fold(Problem((a, b, b, b), 1, 1, "1f1b", 1))]
    [(0, 1), (1, 3)]
    """
    runs: list[Run] = []
    for position, layer in enumerate(problem.layers):
        if runs and _equal(runs[-1].layer, layer):
            previous = runs[-1]
            runs[-1] = Run(previous.start, previous.count + 1, previous.layer, previous.options)
        else:
            runs.append(Run(position, 1, layer, undominated(layer.choices)))
    return tuple(runs)


def _equal(a: Layer, b: Layer) -> bool:
    """Whether two layers are interchangeable; identity first, since folded layers share their objects."""
    if a is b:
        return True
    return (
        a.kind == b.kind
        and (a.cut_after, a.send_s, a.cut_bytes) == (b.cut_after, b.send_s, b.cut_bytes)
        and (a.choices is b.choices or a.choices == b.choices)
    )


def undominated(choices: tuple[Choice, ...]) -> tuple[int, ...]:
    """Indices of the choices worth keeping.

    A choice goes if another one is at most equal in every time and every size: step time and memory never
    fall when one of those numbers rises. Of equal choices the first stays.

    >>> undominated((Choice("a", 1.0, 1.0, saved_bytes=5), Choice("b", 1.0, 2.0, saved_bytes=5)))
    (0,)
    """
    numbers = [_numbers(choice) for choice in choices]
    return tuple(
        i
        for i, mine in enumerate(numbers)
        if not any(
            all(x <= y for x, y in zip(other, mine, strict=True)) and (other != mine or j < i)
            for j, other in enumerate(numbers)
            if j != i
        )
    )


def _numbers(c: Choice) -> tuple[float, ...]:
    """All that a choice costs; the backward's two parts stand apart, since some schedules move one of them."""
    times = (c.forward_s, c.backward_s - c.weight_s, c.weight_s)
    once = (c.first_forward_extra_s, c.last_backward_extra_s, c.tail_s)
    return (*times, *once, c.static_bytes, c.saved_bytes, c.transient_bytes)
