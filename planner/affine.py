"""Turns figures traced at several microbatch sizes into exact affine functions of the microbatch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

from ..errors import ModelError
from .fold import Folded
from .graph import Affine, Op, Ref, UnitClass
from .graph_view import absolute
from .sample_loops import summed


class NotLinear(ModelError):
    """A figure is no line through three microbatch sizes; a fourth may prove that it is a parabola."""


class NotAffine(Exception):
    """A figure is no affine function of the microbatch size, nor a proven quadratic one."""


class OtherOperators(NotAffine):
    """The operators themselves change with the microbatch size."""


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _number(x: Fraction) -> float:
    return x.numerator if x.denominator == 1 else float(x)


def _same(x: float, y: float) -> bool:
    """Equal; what is no whole number (tokens an expert gets) up to rounding."""
    return x == y or (isinstance(y, float) and abs(x - y) <= 1e-12 * abs(y))


def fit(batches: Sequence[int], values: Sequence[float], exact: bool = True) -> Affine:
    """The line through the first two points, or the parabola through the first three; the others must lie on it.

    A parabola needs a fourth point to prove it. Where data decides sizes (`exact` false), points off the line give
    a figure proportional to the batch, as measured at the largest.

    >>> fit((2, 3, 5), (14, 16, 20))
    Affine(base=10, per_sample=2)
    >>> fit((2, 3, 5, 7), (7, 13, 31, 57))
    Affine(base=1, per_sample=1, per_pair=1)
    >>> fit((2, 3, 5), (14, 17, 20), exact=False)
    Affine(base=0, per_sample=4)

    Raises
    ------
    NotAffine
        If a point is off the curve and `exact`.
    """
    if (whole := _whole_line(batches, values)) is not None:
        return whole
    curves = [_line(batches, values)]
    if exact and len(batches) > 3:
        curves.append(_parabola(batches, values))
    for curve in curves:
        if all(_same(curve.at(b), value) for b, value in zip(batches, values, strict=True)):
            return curve
    if exact:
        shown = ", ".join(f"{value:g}" for value in values)
        raise NotAffine(f"{shown} at microbatch sizes {', '.join(map(str, batches))}")
    return Affine(0, _whole(values[-1] / batches[-1]))


def _whole_line(batches: Sequence[int], values: Sequence[float]) -> Affine | None:
    """The line of whole slope through whole numbers, which nearly all figures are; None for any others."""
    if any(type(value) is not int for value in values):
        return None
    slope, rest = divmod(values[1] - values[0], batches[1] - batches[0])
    base = values[0] - slope * batches[0]
    if rest or any(base + slope * b != value for b, value in zip(batches, values, strict=True)):
        return None
    return Affine(base, slope)


def _line(batches: Sequence[int], values: Sequence[float]) -> Affine:
    slope = Fraction(values[1]) - Fraction(values[0])
    slope /= batches[1] - batches[0]
    return Affine(_number(Fraction(values[0]) - slope * batches[0]), _number(slope))


def _parabola(batches: Sequence[int], values: Sequence[float]) -> Affine:
    """Through the first three points, by divided differences (in fractions: sizes are large, and whole)."""
    (x, y, z), (u, v, w) = batches[:3], (Fraction(value) for value in values[:3])
    first, second = (v - u) / (y - x), (w - v) / (z - y)
    pairs = (second - first) / (z - x)
    slope = first - pairs * (x + y)
    base = u - slope * x - pairs * x * x
    return Affine(*(_number(c) for c in (base, slope, pairs)))


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    """The fields of a dataclass; () of any other type."""
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()


@dataclass(frozen=True, slots=True)
class _Merger:
    """Merges copies of a value that were traced at several batches."""

    batches: Sequence[int]
    exact: bool = True

    def merge(self, values: Sequence[Any], argument: bool = False) -> Any:
        """One value; `argument` while inside an operator's arguments, whose numbers may follow the batch."""
        first = values[0]
        if isinstance(first, Affine):
            return fit(self.batches, [v.base for v in values], self.exact)
        if isinstance(first, Ref) or all(v is first for v in values):
            if any(v != first for v in values):
                raise NotAffine("it reads other tensors")
            return first
        if names := _field_names(type(first)):
            if len({type(v) for v in values}) > 1:
                raise OtherOperators("its arguments change their kind")
            inside = (self.merge([getattr(v, name) for v in values], argument or name == "args") for name in names)
            return type(first)(*inside)
        if isinstance(first, tuple):
            if len({len(v) for v in values}) > 1:
                raise OtherOperators("its arguments change their number")
            return tuple(self.merge([v[i] for v in values], argument) for i in range(len(first)))
        if all(v == first for v in values):
            return first
        if argument and isinstance(first, int):
            return fit(self.batches, values, self.exact)
        if argument and isinstance(first, float):
            return first
        raise NotAffine(f"{first!r} changes to {values[-1]!r}")


def _no_curve(batches: Sequence[int], what: str, error: NotAffine) -> ModelError:
    if len(batches) == 3:
        return NotLinear(f"{what} does not grow linearly with the microbatch size: {error}.")
    return ModelError(
        f"{what} grows neither linearly nor with the square of the microbatch size: {error}.",
        "Make every sample of the batch independent of the batch's size.",
    )


def _merge_op(
    batches: Sequence[int], ops: Sequence[Op], index: int, owner: str, inexact: set[tuple[int, str]] | None
) -> Op:
    """One operator of class `index`; where data may decide, modules with sizes off the line go to `inexact`."""
    try:
        names = {op.name for op in ops}
        if len(names) > 1:
            raise OtherOperators(f"the operator itself changes ({', '.join(sorted(names))})")
        try:
            return _Merger(batches).merge(ops)
        except OtherOperators:
            raise
        except NotAffine:
            if inexact is None:
                raise
            inexact.add((index, ops[0].fqn))
            return _Merger(batches, exact=False).merge(ops)
    except OtherOperators:
        raise
    except NotAffine as error:
        where = absolute(ops[0].fqn, owner) or "the model"
        raise _no_curve(batches, f"{ops[0].name} in {where}", error) from None


def merge_class(
    batches: Sequence[int],
    classes: Sequence[UnitClass],
    owner: str,
    inexact: set[tuple[int, str]] | None = None,
    loops: set[int] | None = None,
) -> UnitClass:
    """One class whose every figure is a function of the microbatch size, from its copies at concrete sizes.

    Parameters
    ----------
    batches, classes : sequences
        The microbatch sizes, and the class as traced at each.
    owner : str
        FQN of one unit of the class, for messages.
    inexact : set, optional
        Given where data decides sizes: takes (class, relative FQN) of modules whose figures are typical, not exact.

    loops : set, optional
        Takes the index of the class if its operators themselves follow the microbatch size: it has sums then.

    Raises
    ------
    ModelError
        Naming the operator whose shapes or figures are not affine.
    """
    try:
        if len({len(c.ops) for c in classes}) > 1:
            raise OtherOperators(f"{', '.join(str(len(c.ops)) for c in classes)} operators")
        ops = tuple(
            _merge_op(batches, same, classes[0].index, owner, inexact)
            for same in zip(*(c.ops for c in classes), strict=True)
        )
    except OtherOperators as error:
        if loops is None:
            raise _other_operators(batches, owner, error) from None
        loops.add(classes[0].index)
        return _sums(batches, classes, owner)
    bare = [replace(c, ops=()) for c in classes]
    try:
        merged = replace(_Merger(batches, exact=inexact is None).merge(bare), ops=ops)
    except NotAffine as error:
        raise _no_curve(batches, owner, error) from None
    forward, backward = Affine(), Affine()
    for op in ops:
        forward += op.forward_flops
        backward += op.backward_flops
    return replace(merged, flops_forward=forward, flops_backward=backward)


def _other_operators(batches: Sequence[int], owner: str, error: Exception) -> ModelError:
    return ModelError(
        f"{owner} runs other operators at microbatch sizes {', '.join(map(str, batches))} ({error}).",
        "Make its forward run the same operators at every batch size.",
    )


def _sums(batches: Sequence[int], classes: Sequence[UnitClass], owner: str) -> UnitClass:
    """A class without operators of its own (`sample_loops`); what data draws anew at each size need not be a line."""
    try:
        return summed(classes, lambda values: fit(batches, values, exact=False))
    except (NotAffine, ValueError) as error:
        raise _other_operators(batches, owner, error) from None


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


def merge(
    batches: Sequence[int],
    traces: Sequence[Folded],
    owners: Sequence[str],
    inexact: set[tuple[int, str]] | None = None,
    loops: set[int] | None = None,
) -> tuple[UnitClass, ...]:
    """The classes as functions of the microbatch size; `owners[i]` is the FQN of a unit of class i.

    `inexact` and `loops` as in `merge_class`.
    """
    if any(t.class_of != traces[0].class_of for t in traces):
        raise ModelError(
            f"The model runs other modules at microbatch sizes {', '.join(map(str, batches))}.",
            "Make its forward run the same modules at every batch size.",
        )
    return tuple(
        replace(
            merge_class(batches, [t.classes[i] for t in traces], owner, inexact, loops),
            workspace_forward=_peak(batches, [t.forward_curves[i] for t in traces]),
            workspace_backward=_peak(batches, [t.backward_curves[i] for t in traces]),
        )
        for i, owner in enumerate(owners)
    )
