"""What the picture of a folded graph says, before it is laid out: blocks, their lines, and the edges between them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..planner.graph import ModelGraph
from ..units import MIB, format_bytes, format_count
from .chain_rows import MANY_ROWS, Group, Row, chain_rows, leaves, name_pattern, row_name
from .class_parts import (
    ATTENTION,
    LayerChip,
    Part,
    RowSize,
    alike,
    flops_of,
    opaque_reason,
    parameters_of,
    row_size,
)

_LABEL = 26  # characters of a line's name that are surely shown
_MANY_LINES = 12  # in one block; from here on, those alike are one
_SMALL = 0.005  # share of a block's FLOPs below which its own code is not drawn


@dataclass(frozen=True, slots=True)
class Line:
    """One line inside a block: parts of the unit, and how much of the unit's FLOPs and parameters they have."""

    label: str
    flops_share: float
    parameters_share: float
    chips: tuple[LayerChip, ...]
    opaque: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """One row of the chain as drawn.

    name, module_type : pattern of the FQNs; class name
    count : units that follow each other (the stack), in one repetition of the patterns around
    figures : parameters, FLOPs and saved bytes of one unit, as texts
    reads : names of the model's inputs that it reads
    share : of the model's FLOPs, all units of the row together
    lines : the parts of a unit; empty for a block that is one line itself, whose layers are `chips`
    cuts : units of the row after which the pipeline may be cut; `units` is how many there are
    cut_after : whether the last unit is one of them
    opaque : why it or a part of it is, "" if nothing is; `all_opaque` whether it is as a whole
    replicated : whether every stage runs it
    detail : longer text, shown when the pointer rests on the block
    brief : whether another block shows the same parts, so that this one is one line without their names
    """

    class_index: int
    name: str
    module_type: str
    count: int
    figures: tuple[str, ...]
    reads: tuple[str, ...]
    share: float
    lines: tuple[Line, ...]
    chips: tuple[LayerChip, ...]
    cuts: int
    units: int
    cut_after: bool
    opaque: str
    all_opaque: bool
    replicated: bool
    detail: str
    brief: bool = False


@dataclass(frozen=True, slots=True)
class Story:
    """The whole picture: `rows` is the nesting, `blocks[i]` belongs to the i-th leaf of it, `edges` join blocks."""

    rows: tuple[Row | Group, ...]
    blocks: tuple[Block, ...]
    edges: tuple[tuple[int, int], ...]


def story(
    graph: ModelGraph,
    parts: Sequence[tuple[Part, ...]],
    batch: int,
    detailed: bool = True,
    most: int | None = None,
) -> Story:
    """Blocks of a graph with the parts of its classes at `batch` samples.

    Without `detailed`, every block is one line. Of more than `most` rows and patterns, those in the middle are one row.
    """
    rows = chain_rows(graph)
    if sum(1 for _ in leaves(rows)) > MANY_ROWS:
        rows = chain_rows(graph, alike(graph, parts))
    if most is not None and len(rows) > most:
        middle = tuple(sorted(p for row in leaves(rows[most // 2 : -(most // 2)]) for p in row.positions))
        rest = Row(graph.units[middle[0]].class_index, middle, len(middle))
        rows = (*rows[: most // 2], rest, *rows[-(most // 2) :])
    total = (graph.flops_forward + graph.flops_backward).at(batch)
    blocks = [_block(graph, row, parts[row.class_index], batch, total) for row in leaves(rows)]
    largest: dict[Hashable, int] = {}
    for i, block in enumerate(blocks):
        known = largest.setdefault(_looks(block), i)
        if block.share > blocks[known].share:
            largest[_looks(block)] = i
    blocks = [
        block if (detailed and largest[_looks(block)] == i) or not block.lines else replace(block, lines=(), brief=True)
        for i, block in enumerate(blocks)
    ]
    return Story(rows, tuple(blocks), _edges(graph, list(leaves(rows))))


def _looks(block: Block) -> Hashable:
    """What two blocks have in common that would be drawn alike, but for sizes."""
    lines = tuple((line.label, tuple((c.name, c.style) for c in line.chips)) for line in block.lines)
    return block.module_type, lines, block.opaque


def _block(graph: ModelGraph, row: Row, parts: Sequence[Part], batch: int, total: float) -> Block:
    cls = graph.classes[row.class_index]
    units = [graph.units[p] for p in row.positions]
    size = row_size(graph, row, batch)
    flops = flops_of(graph, row.class_index, batch)
    lines = block_lines(parts, flops, parameters_of(cls))
    reads = dict.fromkeys(graph.inputs[k].name for u in units for source, k in u.sources if source < 0)
    whole = opaque_reason(graph, units[0])
    opaque = whole or next((p.opaque for p in parts if p.opaque), "")
    cuts = sum(u.cut_after for u in units)
    types = {graph.classes[unit.class_index].module_type for unit in units}
    kinds = f"class {cls.index}{'' if size.equal else ' and others'}"
    detail = [f"{row_name(graph, row)}: {cls.module_type}, {len(units)} units, {kinds}"]
    detail += [f"opaque: {opaque}"] if opaque else []
    detail += [f"{c.name} stays whole: {c.why}" for part in parts for c in part.chips if c.why]
    return Block(
        class_index=cls.index,
        name=row_name(graph, row),
        module_type=next(iter(types)) if len(types) == 1 else f"{len(types)} types",
        count=row.run,
        figures=_figures(size),
        reads=tuple(reads),
        share=size.flops * len(units) / total if total else 0.0,
        lines=lines if len(lines) > 1 else (),
        chips=tuple(chip for part in parts for chip in part.chips),
        cuts=cuts,
        units=len(units),
        cut_after=units[-1].cut_after,
        opaque=opaque,
        all_opaque=bool(whole),
        replicated=units[0].replicated,
        detail="\n".join(detail),
    )


def _figures(size: RowSize) -> tuple[str, ...]:
    about = "" if size.equal else "~"
    texts = [
        f"{about}{format_count(size.parameters)} parameters" if size.parameters else "",
        f"{about}{format_count(size.flops)}FLOP" if size.flops else "",
        f"{about}{format_bytes(size.saved_bytes)} saved" if size.saved_bytes >= MIB else "",
    ]
    return tuple(text for text in texts if text)


def block_lines(parts: Sequence[Part], flops: int, parameters: int) -> tuple[Line, ...]:
    """A line a part of a unit of so many FLOPs and parameters; light parts that follow each other share one."""
    found: list[Line] = []
    light = False
    for part in parts:
        share = part.flops / flops if flops else 0.0
        own = not part.name or part.name.startswith("/")
        if own and share < _SMALL and not part.opaque and not part.chips:
            continue
        inner, chips = _without_prefix(part.chips)
        label = ".".join(name for name in (_label(part), inner) if name)
        if label.rpartition(".")[2].isdigit() and len(label) + len(part.module_type) < _LABEL:
            label = f"{label} {part.module_type}".rstrip()
        line = Line(label, share, part.parameters / parameters if parameters else 0.0, chips, part.opaque)
        joins = not part.flops and not part.opaque and all(chip.style == "channel" for chip in part.chips)
        if joins and light:
            before = found[-1]
            line = replace(
                before,
                label=f"{before.label}, {line.label}",
                parameters_share=before.parameters_share + line.parameters_share,
                chips=before.chips + line.chips,
            )
            found.pop()
        light = joins
        found.append(line)
    return tuple(found) if len(found) <= _MANY_LINES else _together(found)


def _together(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Lines that differ in indices alone (experts, branches) as one, where the first of them stands."""
    alike: dict[Hashable, list[Line]] = {}
    for line in lines:
        chips = tuple((chip.name, chip.style) for chip in line.chips)
        alike.setdefault((re.sub(r"\d+", "#", line.label), chips, line.opaque), []).append(line)
    return tuple(
        replace(
            group[0],
            label=" ".join(name_pattern(list(dict.fromkeys(words))) for words in _words(group)),
            flops_share=sum(line.flops_share for line in group),
            parameters_share=sum(line.parameters_share for line in group),
        )
        for group in alike.values()
    )


def _words(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The names of the lines, then their types if they have one."""
    return zip(*(line.label.split(" ") for line in lines), strict=False)


def _without_prefix(chips: Sequence[LayerChip]) -> tuple[str, tuple[LayerChip, ...]]:
    """What the names of all layers of a part begin with, and the layers named without it."""
    split = [chip.name.split(".") for chip in chips if chip.style != ATTENTION]
    shared = 0
    while split and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    if not shared:
        return "", tuple(chips)
    prefix = ".".join(split[0][:shared])
    return prefix, tuple(replace(chip, name=chip.name.removeprefix(f"{prefix}.")) for chip in chips)


def _label(part: Part) -> str:
    if part.name.startswith("/"):
        return f"code of {part.name[1:] or 'the model, loss'}"
    return part.name or "own code"


def _edges(graph: ModelGraph, rows: Sequence[Row]) -> tuple[tuple[int, int], ...]:
    """Pairs of blocks between which tensors flow forward; what every stage computes for itself is left out."""
    block_of = {p: i for i, row in enumerate(rows) for p in row.positions}
    found: dict[tuple[int, int], None] = {}
    for unit in graph.units:
        for source, _ in unit.sources:
            if source >= 0 and not graph.units[source].replicated:
                pair = block_of[source], block_of[unit.position]
                if pair[0] < pair[1]:
                    found[pair] = None
    return tuple(sorted(found))
