"""A model traced at short sequence lengths, extended exactly to a long one.

Every figure of a traced model is a polynomial of the sequence length S (attention's are quadratic) as long as S
stays on a grid (chunks, patches) and no threshold is crossed (a sliding window). The curve through the first lengths
must meet the last ones, and the first unit with a loop is counted once more at a length far beyond.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn

from ..errors import ModelError, TargetError
from .budget import Limits, Reached
from .graph import Affine, ModelGraph, Ref, Unit, UnitClass
from .recording import RawOp
from .time_loops import NotExtendable, collapse

STEPS = (5, 6, 7, 9)  # of the grid, beyond the remainder
USUAL_CHUNK = 64  # steps that linear attention takes at a time, where no attribute says
FIRST_BATCH = 2  # the microbatch size of the first run of a trace
FAR = 67  # steps of the grid at which the first unit with a loop is counted once more
_FOLLOW = ("args", "repeat", "call")  # fields of operators and tensors whose whole numbers may follow the length


class EachStep(NotExtendable):
    """Every step of the sequence runs operators, but not the same ones."""


def lengths_for(wanted: int, grid: int) -> tuple[int, ...]:
    """The lengths to trace for `wanted`: of its remainder on the grid, and short.

    >>> lengths_for(2048, 1), lengths_for(100, 16)
    ((5, 6, 7, 9), (84, 100, 116, 148))
    """
    return tuple(wanted % grid + grid * step for step in STEPS)


def grids(model: nn.Module) -> Iterator[int]:
    """Grids on which a model's figures may be polynomials of the length: its chunk sizes, then the usual one."""
    named = 1
    for owner in (getattr(model, "config", None), *model.modules()):
        for name, value in vars(owner).items() if owner is not None else ():
            if "chunk" in name and type(value) is int and 1 < value <= 1024:
                named = math.lcm(named, value)
    yield named
    if named % USUAL_CHUNK:
        yield math.lcm(named, USUAL_CHUNK)


@dataclass(frozen=True, slots=True)
class Curves:
    """Evaluates at `wanted` the polynomial of degree 2 at most through values at `lengths`."""

    lengths: Sequence[int]
    wanted: int

    def number(self, values: Sequence[float]) -> float:
        """The curve through the first lengths, which the others must meet.

        >>> Curves((1, 2, 3, 4), 10).number((1, 4, 9, 16))
        100

        Raises
        ------
        NotExtendable
            If no polynomial of degree 2 meets them all.
        """
        if all(v == values[0] for v in values):
            return values[0]
        for degree in (1, 2):
            curve = self._through(degree + 1, values)
            if all(_same(curve(s), v) for s, v in zip(self.lengths, values, strict=True)):
                found = curve(self.wanted)
                return found.numerator if found.denominator == 1 else float(found)
        raise NotExtendable(f"{', '.join(f'{v:g}' for v in values)} at lengths {', '.join(map(str, self.lengths))}")

    def _through(self, points: int, values: Sequence[float]) -> Callable[[int], Fraction]:
        """Lagrange's polynomial through the first points."""
        xs, ys = self.lengths[:points], [Fraction(v) for v in values[:points]]

        def at(x: int) -> Fraction:
            total = Fraction(0)
            for i, y in enumerate(ys):
                for j, other in enumerate(xs):
                    if j != i:
                        y = y * (x - other) / (xs[i] - other)
                total += y
            return total

        return at

    def affine(self, values: Sequence[Affine]) -> Affine:
        """A figure of the microbatch size at the wanted length."""
        return Affine(*(self.number(same) for same in zip(*values, strict=True)))

    def peak(self, values: Sequence[Affine]) -> Affine:
        """A peak of memory: where another operator is the peak at another length, above the line of the last two."""
        try:
            return self.affine(values)
        except NotExtendable:
            last = Curves(self.lengths[-2:], self.wanted)
            return Affine(*(max(0, last.number(same[-2:])) for same in zip(*values, strict=True)))

    def merge(self, values: Sequence[Any], argument: bool = False) -> Any:
        """One value at the wanted length; numbers may follow the length in arguments, `repeat` and `call`."""
        first = values[0]
        if isinstance(first, Affine):
            return self.affine(values)
        if isinstance(first, Ref) or all(v is first for v in values):
            return self._equal(values)
        if is_dataclass(first) and not isinstance(first, type):
            inside = {
                f.name: self.merge([getattr(v, f.name) for v in values], argument or f.name in _FOLLOW)
                for f in fields(first)
            }
            return replace(first, **inside)
        if isinstance(first, tuple):
            if len({len(v) for v in values}) > 1:
                return self._list(values)
            return tuple(self.merge([v[i] for v in values], argument) for i in range(len(first)))
        if argument and isinstance(first, (int, float)) and not isinstance(first, bool):
            return self.number(values) if isinstance(first, int) else first
        return self._equal(values)

    def _equal(self, values: Sequence[Any]) -> Any:
        if any(v != values[0] for v in values):
            raise NotExtendable(f"{values[0]!r} changes to {values[-1]!r}")
        return values[0]

    def _list(self, values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """A list of one equal number for each step, as one number."""
        if any(len(set(v)) != 1 for v in values):
            raise NotExtendable(f"{values[0]!r} changes to {values[-1]!r}")
        return (self.merge([v[0] for v in values], True),)

    def unit_class(self, classes: Sequence[UnitClass]) -> UnitClass:
        """One class at the wanted length; its peaks of memory apart."""
        bare = [replace(c, workspace_forward=Affine(), workspace_backward=Affine()) for c in collapse(classes)]
        merged = self.merge(bare)
        forward, backward = Affine(), Affine()
        for op in merged.ops:
            forward += op.forward_flops
            backward += op.backward_flops
        return replace(
            merged,
            flops_forward=forward,
            flops_backward=backward,
            workspace_forward=self.peak([c.workspace_forward for c in classes]),
            workspace_backward=self.peak([c.workspace_backward for c in classes]),
        )


def trace_loops(at: Callable[[int, Limits], ModelGraph], wanted: int, steps: Sequence[int], fqn: str) -> ModelGraph:
    """The model at the length `wanted`, whose unit `fqn` loops over time: extended, or traced in full if it must be.

    Parameters
    ----------
    at : callable
        ``at(length, limits)`` traces the model at one length.
    steps : sequence of int
        The grids to try.
    """
    why = "the sequence is short"
    for grid in steps:
        lengths = lengths_for(wanted, grid)
        if lengths[-1] >= wanted:
            continue
        try:
            return _extended(at, wanted, grid, lengths, fqn)
        except EachStep as error:  # a coarser grid would not help
            why = str(error)
            break
        except NotExtendable as error:
            why = str(error)
        except (ModelError, TargetError) as error:
            why = error.message
    graph = at(wanted, Limits())
    return replace(graph, notes=(*graph.notes, f"every step of the loop in {fqn or 'the model'} was traced: {why}"))


def _extended(
    at: Callable[[int, Limits], ModelGraph], wanted: int, grid: int, lengths: Sequence[int], fqn: str
) -> ModelGraph:
    limits = Limits()
    graphs = [at(lengths[0], limits), at(lengths[1], replace(limits, batches=2))]
    looped = _called_each_step(graphs)
    if not looped and _operators(graphs[0]) == _operators(graphs[1]):
        raise NotExtendable(f"no operator more at length {lengths[1]} than at {lengths[0]}")
    if looped:
        limits = Limits(looped=looped)
        graphs = [at(lengths[0], limits), at(lengths[1], replace(limits, batches=2))]
    graphs += [at(length, replace(limits, batches=2)) for length in lengths[2:]]
    try:
        return _beyond(at, graphs, wanted, grid, fqn, bool(looped))
    except NotExtendable as error:
        if _operators(graphs[0]) < _operators(graphs[1]) < _operators(graphs[2]):
            raise EachStep(str(error)) from None
        raise


def _operators(graph: ModelGraph) -> int:
    return sum(len(cls.ops) for cls in graph.classes)


def _beyond(
    at: Callable[[int, Limits], ModelGraph],
    graphs: Sequence[ModelGraph],
    wanted: int,
    grid: int,
    fqn: str,
    looped: bool,
) -> ModelGraph:
    """The graphs extended, and counted once more at a length far beyond theirs."""
    far = min(wanted, wanted % grid + FAR * grid)
    known = {unit.fqn: unit for unit in graphs[0].units}
    if fqn in known and not looped:
        _compare(extend(graphs, far), known[fqn].position, _counted(at, far, fqn), far)
    graph = extend(graphs, wanted)
    shown = ", ".join(str(g.sequence_length) for g in graphs)
    note = f"a loop over time in {fqn or 'the model'}: traced at lengths {shown} and extended to {wanted}"
    return replace(graph, notes=(*graph.notes, note))


def _called_each_step(graphs: Sequence[ModelGraph]) -> frozenset[str]:
    """Modules that are units and are called more often at a longer sequence."""
    few, many = (Counter(unit.fqn for unit in graph.units) for graph in graphs)
    return frozenset(fqn for fqn in many if many[fqn] != few[fqn])


def _counted(at: Callable[[int, Limits], ModelGraph], length: int, fqn: str) -> Sequence[RawOp]:
    """Forward operators of the first call of a unit at another length."""
    try:
        at(length, Limits(until=fqn))
    except Reached as reached:
        return reached.ops
    raise NotExtendable(f"{fqn} is the last that runs")


def _compare(graph: ModelGraph, position: int, ops: Sequence[RawOp], length: int) -> None:
    """The extended unit must launch the counted kernels, of the same FLOPs and bytes."""
    own = [op for op in graph.classes[graph.units[position].class_index].ops if not op.fqn.startswith("/")]
    b = FIRST_BATCH
    counted = [op.kernel for op in ops if op.kernel.kind != "free"]
    expected = (len(counted), sum(k.flops.at(b) for k in counted), sum(k.bytes_moved.at(b) for k in counted))
    launched = [op for op in own if op.forward.kind != "free"]
    found = (
        sum(op.repeat for op in launched),
        sum(op.forward_flops.at(b) for op in launched),
        sum(op.forward.bytes_moved.at(b) * op.repeat for op in launched),
    )
    if any(abs(x - y) > 1e-9 * abs(y) for x, y in zip(found, expected, strict=True)):
        raise NotExtendable(f"{graph.units[position].fqn} runs otherwise at length {length}")


def extend(graphs: Sequence[ModelGraph], wanted: int) -> ModelGraph:
    """The model at the length `wanted`, from itself at several short lengths.

    Raises
    ------
    NotExtendable
        If the lengths differ in more than numbers, or a number is no polynomial of degree 2 of the length.
    """
    first = graphs[0]
    curves = Curves([g.sequence_length for g in graphs], wanted)
    if len({len(g.units) for g in graphs}) > 1 or len({len(g.classes) for g in graphs}) > 1:
        raise NotExtendable("other modules run at other lengths")
    return replace(
        first,
        sequence_length=wanted,
        classes=tuple(curves.unit_class([g.classes[i] for g in graphs]) for i in range(len(first.classes))),
        units=tuple(_unit(curves, same) for same in zip(*(g.units for g in graphs), strict=True)),
        inputs=tuple(curves.merge(same) for same in zip(*(g.inputs for g in graphs), strict=True)),
    )


def _unit(curves: Curves, units: Sequence[Unit]) -> Unit:
    shared = [u.shared_saved for u in units]
    if len({tuple(p for p, _ in s) for s in shared}) > 1:
        raise NotExtendable(f"{units[0].fqn} shares what it keeps with other units at other lengths")
    bare = curves._equal([replace(u, shared_saved=()) for u in units])
    kept = tuple((same[0][0], curves.affine([a for _, a in same])) for same in zip(*shared, strict=True))
    return replace(bare, shared_saved=kept)


def _same(x: Fraction, y: float) -> bool:
    return x == y or (isinstance(y, float) and abs(x - Fraction(y)) <= 1e-12 * abs(y))
