"""What is inside a unit class: its child modules with their figures, and the layers in them with their tp style."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..planner.graph import ModelGraph, Op, Parameter, Unit, UnitClass
from ..planner.graph_view import absolute
from ..planner.sharding import Sharding
from .chain_rows import Row, name_pattern

WHOLE = "whole"
ATTENTION = "attention"
_MOST = 0.9  # of the operators in one child: its own children say more


@dataclass(frozen=True, slots=True)
class LayerChip:
    """A module that holds weights, or several alike.

    name : pattern of the names relative to the part; the style where the part itself is its only layer
    style : tp style as in plan.json, "attention" (attends on 1/tp of the heads), or "whole"
    parameters : elements, of all of them together
    why : why it stays whole, "" if nothing is known
    """

    name: str
    style: str
    parameters: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A child module of a unit, or the unit's own code.

    name : relative to the unit; "" is the unit's own code, "/fqn" what a module around it runs here
    module_type : class name where the child runs operators itself, else ""
    parameters, flops : elements; FLOPs of forward and backward at the batch size asked for
    chips : its layers
    opaque : why its figures hold for the trace only, "" if they do not
    """

    name: str
    module_type: str
    parameters: int
    flops: int
    chips: tuple[LayerChip, ...]
    opaque: str = ""


def flops_of(graph: ModelGraph, index: int, batch: int) -> int:
    """FLOPs of forward and backward of one unit of a class."""
    cls = graph.classes[index]
    return int((cls.flops_forward + cls.flops_backward).at(batch))


def parameters_of(cls: UnitClass) -> int:
    """Elements of the parameters that a unit of the class reads."""
    return sum(p.numel for p in cls.parameters if not p.is_buffer)


@dataclass(frozen=True, slots=True)
class RowSize:
    """Figures of one unit of a row: of each, if they are `equal`, else the mean."""

    equal: bool
    parameters: float
    flops_forward: float
    flops_backward: float
    saved_bytes: float

    @property
    def flops(self) -> float:
        """Forward and backward."""
        return self.flops_forward + self.flops_backward


def row_size(graph: ModelGraph, row: Row, batch: int) -> RowSize:
    """The figures of a row at `batch` samples."""
    counts = Counter(graph.units[p].class_index for p in row.positions)
    n = len(row.positions)

    def mean(figure: Callable[[UnitClass], float]) -> float:
        return sum(figure(graph.classes[i]) * count for i, count in counts.items()) / n

    return RowSize(
        len(counts) == 1,
        mean(parameters_of),
        mean(lambda cls: cls.flops_forward.at(batch)),
        mean(lambda cls: cls.flops_backward.at(batch)),
        mean(lambda cls: cls.saved_bytes.at(batch)),
    )


def opaque_reason(graph: ModelGraph, unit: Unit, name: str = "") -> str:
    """Why `name` (relative to the unit) or the whole unit is opaque; "" if it is not."""
    for fqn, reason, _ in graph.opaque:
        here = name if name.startswith("/") else absolute(name, unit.fqn)
        if here == fqn or (not fqn.startswith("/") and (not fqn or here.startswith(f"{fqn}."))):
            return reason
    return ""


def holds_opaque(graph: ModelGraph, unit: Unit) -> bool:
    """Whether the unit is, or holds, an opaque part."""
    inside = f"{unit.fqn}.".lstrip(".")
    glue = {op.fqn for op in graph.classes[unit.class_index].ops if op.fqn.startswith("/")}
    return bool(opaque_reason(graph, unit)) or any(f.startswith(inside) or f in glue for f, _, _ in graph.opaque)


def parts_of(graph: ModelGraph, sharding: Sharding, unit: Unit, batch: int) -> tuple[Part, ...]:
    """The parts of a unit in order of execution.

    Parameters
    ----------
    graph : ModelGraph
    sharding : Sharding
        What `analyse` found for it.
    unit : Unit
        Any unit of the class (its names find the styles).
    batch : int
        Samples that the FLOPs are for.
    """
    cls = graph.classes[unit.class_index]
    depth = _depth(cls)
    grouped: dict[str, list[Op]] = {}
    for op in cls.ops:
        grouped.setdefault(_child(op.fqn, depth), []).append(op)
    read = _read_by(cls)
    chips = _chips(graph, sharding, unit, read)
    found = []
    for name, ops in grouped.items():
        types = [op.module_type for op in ops if op.fqn == name]
        inside = [n for n in chips if _child(n, depth) == name]
        numel = sum(p.numel for fqn, ps in read.items() if _child(fqn, depth) == name for p in ps)
        flops = sum(int((op.forward_flops + op.backward_flops).at(batch)) for op in ops)
        opaque = next((r for r in (opaque_reason(graph, unit, op.fqn) for op in ops) if r), "")
        found.append(Part(name, types[0] if types else "", numel, flops, _merged(name, inside, chips), opaque))
    return tuple(found)


def parts_by_class(graph: ModelGraph, sharding: Sharding, batch: int) -> list[tuple[Part, ...]]:
    """The parts of each class."""
    first: dict[int, Unit] = {}
    for unit in graph.units:
        first.setdefault(unit.class_index, unit)
    return [parts_of(graph, sharding, first[i], batch) for i in range(len(graph.classes))]


def alike(graph: ModelGraph, parts: Sequence[tuple[Part, ...]]) -> list[int]:
    """For each class a number that it shares with those of the same parts and styles, whatever their sizes."""
    looks: dict[Hashable, int] = {}
    found = []
    for cls, inside in zip(graph.classes, parts, strict=True):
        chips = tuple((p.name, tuple((c.name, c.style) for c in p.chips)) for p in inside)
        own = tuple(item for item in chips if not item[0].startswith("/"))
        found.append(looks.setdefault((cls.module_type, own), len(looks)))
    return found


def _depth(cls: UnitClass) -> int:
    """How many components of a relative name make a part: one more where one child holds nearly everything."""
    inner = [op.fqn for op in cls.ops if op.fqn and not op.fqn.startswith("/")]
    for depth in (1, 2, 3):
        counts: dict[str, int] = {}
        for fqn in inner:
            counts[_child(fqn, depth)] = counts.get(_child(fqn, depth), 0) + 1
        most = max(counts.values(), default=0)
        if most < _MOST * len(inner) or len(counts) > 1:
            return depth
    return 1


def _child(fqn: str, depth: int) -> str:
    """The part that a relative name belongs to; an index belongs to the name before it."""
    if fqn.startswith("/"):
        return fqn
    taken: list[str] = []
    named = 0
    for component in fqn.split("."):
        if not component.isdigit():
            if named == depth:
                break
            named += 1
        taken.append(component)
    return ".".join(taken)


def _read_by(cls: UnitClass) -> dict[str, list[Parameter]]:
    """Module (relative FQN) -> parameters that its operators are the first to read."""
    parameters = {p.fqn: p for p in cls.parameters if not p.is_buffer}
    found: dict[str, list[Parameter]] = {}
    for op in cls.ops:
        for t in op.inputs:
            p = parameters.pop(cls.tensors[t].fqn, None) if cls.tensors[t].kind == "parameter" else None
            if p is not None:
                found.setdefault(op.fqn, []).append(p)
    return found


def _chips(
    graph: ModelGraph, sharding: Sharding, unit: Unit, read: Mapping[str, list[Parameter]]
) -> dict[str, LayerChip]:
    """Relative FQN -> chip of each module of the unit with a weight matrix, a style, or attention on heads."""
    cls = graph.classes[unit.class_index]
    found: dict[str, LayerChip] = {}
    for name in dict.fromkeys([*(op.fqn for op in cls.ops), *_styled(sharding, unit)]):
        if name.startswith("/"):
            continue
        fqn = absolute(name, unit.fqn)
        style = sharding.styles.get(fqn)
        if style is not None or any(len(p.shape) > 1 for p in read.get(name, ())):
            below = f"{name}." if style and name else "/"
            numel = sum(p.numel for n, ps in read.items() if n == name or n.startswith(below) for p in ps)
            kind, why = (style.style, "") if style else (WHOLE, sharding.whole.get(fqn, ""))
            found[name] = LayerChip(name, kind, numel, why)
        elif fqn in sharding.attention:
            found[name] = LayerChip(name, ATTENTION, 0)
    return found


def _styled(sharding: Sharding, unit: Unit) -> Iterator[str]:
    """Modules inside the unit that have a style (its own operators may be run by modules around or below them)."""
    prefix = f"{unit.fqn}." if unit.fqn else ""
    for fqn in sharding.styles:
        if fqn.startswith(prefix) and prefix:
            yield fqn[len(prefix) :]
        elif fqn == unit.fqn:
            yield ""


def _merged(part: str, names: list[str], chips: dict[str, LayerChip]) -> tuple[LayerChip, ...]:
    """Chips of a part, those that differ in indices alone as one."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name in names:
        grouped.setdefault((re.sub(r"\d+", "#", name), chips[name].style), []).append(name)
    found = []
    for (_, style), alike in grouped.items():
        inner = [n[len(part) :].lstrip(".") if n != part else "" for n in alike]
        label = name_pattern(inner) if any(inner) else style if len(names) == 1 else "own weights"
        why = next((chips[n].why for n in alike if chips[n].why), "")
        found.append(LayerChip(label, style, sum(chips[n].parameters for n in alike), why))
    return tuple(found)
