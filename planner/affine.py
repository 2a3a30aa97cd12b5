"""Turns figures traced at several microbatch sizes into exact affine functions of the microbatch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..errors import ModelError
from .fold import Folded
from .graph import Affine, Op, Ref, UnitClass


class NotAffine(Exception):
    """A figure is no affine function of the microbatch size."""


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def fit(batches: Sequence[int], values: Sequence[float]) -> Affine:
    """The line through the first two points; every further point must lie on it exactly.

    >>> fit((2, 3, 5), (14, 16, 20))
    Affine(base=10, per_sample=2)

    Raises
    ------
    NotAffine
        If it does not.
    """
    if len(batches) == 1:
        return Affine(values[0], 0)
    slope = (values[1] - values[0]) / (batches[1] - batches[0])
    line = Affine(_whole(values[0] - slope * batches[0]), _whole(slope))
    for b, value in zip(batches, values, strict=True):
        if line.at(b) != value:
            raise NotAffine(f"{values[0]:g}, {values[1]:g}, {value:g} at microbatch sizes {tuple(batches)}")
    return line


def _merge(batches: Sequence[int], values: Sequence[Any], argument: bool = False) -> Any:
    first = values[0]
    if isinstance(first, Affine):
        return fit(batches, [v.base for v in values])
    if isinstance(first, Ref) or all(v is first for v in values):
        if any(v != first for v in values):
            raise NotAffine("it reads other tensors")
        return first
    if is_dataclass(first) and not isinstance(first, type):
        if len({type(v) for v in values}) > 1:
            raise NotAffine("its arguments change their kind")
        inside = {
            f.name: _merge(batches, [getattr(v, f.name) for v in values], argument or f.name == "args")
            for f in fields(first)
        }
        return replace(first, **inside)
    if isinstance(first, tuple):
        if len({len(v) for v in values}) > 1:
            raise NotAffine("its arguments change their number")
        return tuple(_merge(batches, [v[i] for v in values], argument) for i in range(len(first)))
    if all(v == first for v in values):
        return first
    if argument and isinstance(first, int):
        return fit(batches, values)
    if argument and isinstance(first, float):
        return first
    raise NotAffine(f"{first!r} changes to {values[-1]!r}")


def _merge_op(batches: Sequence[int], ops: Sequence[Op], owner: str) -> Op:
    names = {op.name for op in ops}
    try:
        if len(names) > 1:
            raise NotAffine(f"the operator itself changes ({', '.join(sorted(names))})")
        return _merge(batches, ops)
    except NotAffine as error:
        raise ModelError(
            f"{ops[0].name} in {owner}{'.' + ops[0].fqn if ops[0].fqn else ''} does not grow linearly with the "
            f"microbatch size: {error}.",
            "Make every sample of the batch independent of the batch's size.",
        ) from None


def merge_class(batches: Sequence[int], classes: Sequence[UnitClass], owner: str) -> UnitClass:
    """One class whose every figure is a function of the microbatch size, from its copies at concrete sizes.

    Raises
    ------
    ModelError
        Naming the operator whose shapes or figures are not affine.
    """
    if len({len(c.ops) for c in classes}) > 1:
        counts = ", ".join(str(len(c.ops)) for c in classes)
        raise ModelError(
            f"{owner} runs {counts} operators at microbatch sizes {', '.join(map(str, batches))}.",
            "Make its forward run the same operators at every batch size.",
        )
    ops = tuple(_merge_op(batches, [c.ops[i] for c in classes], owner) for i in range(len(classes[0].ops)))
    bare = [replace(c, ops=()) for c in classes]
    try:
        return replace(_merge(batches, bare), ops=ops)
    except NotAffine as error:
        raise ModelError(
            f"{owner} does not grow linearly with the microbatch size: {error}.",
            "Make every sample of the batch independent of the batch's size.",
        ) from None


def _peak(batches: Sequence[int], curves: Sequence[list[int]]) -> Affine:
    """The highest point of the curve at the largest batch, as a function of the batch; never negative."""
    if len({len(c) for c in curves}) > 1:
        return _upper_line(batches, [max(0, *c) for c in curves])
    tick = max(range(len(curves[-1])), key=curves[-1].__getitem__)
    if curves[-1][tick] <= 0:
        return Affine()
    try:
        return fit(batches, [c[tick] for c in curves])
    except NotAffine:
        return _upper_line(batches, [max(0, *c) for c in curves])


def _upper_line(batches: Sequence[int], values: Sequence[int]) -> Affine:
    """Proportional to the batch, and above every value."""
    return Affine(0, max(v / b for b, v in zip(batches, values, strict=True)))


def merge(batches: Sequence[int], traces: Sequence[Folded], owners: Sequence[str]) -> tuple[UnitClass, ...]:
    """The classes as functions of the microbatch size; `owners[i]` is the FQN of a unit of class i."""
    if any(t.class_of != traces[0].class_of for t in traces):
        raise ModelError(
            f"The model runs other modules at microbatch sizes {', '.join(map(str, batches))}.",
            "Make its forward run the same modules at every batch size.",
        )
    merged = []
    for i, owner in enumerate(owners):
        found = merge_class(batches, [t.classes[i] for t in traces], owner)
        merged.append(
            replace(
                found,
                workspace_forward=_peak(batches, [t.forward_curves[i] for t in traces]),
                workspace_backward=_peak(batches, [t.backward_curves[i] for t in traces]),
            )
        )
    return tuple(merged)
