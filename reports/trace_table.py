"""The folded graph as text: a row for each run of equal layers, and what people must know about the trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group as Texts
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..planner.graph import LARGEST_OPAQUE, ModelGraph, Unit
from ..planner.sharding import Sharding
from ..units import format_bytes, format_count
from .chain_rows import MANY_ROWS, Group, Row, chain_rows, leaves, name_pattern, row_name
from .class_parts import alike, holds_opaque, opaque_reason, parts_by_class, row_size

_COLUMNS = ("layers", "module", "count", "parameters", "FLOPs forward", "backward", "saved", "of FLOPs", "cuts")
_MOST_NAMES = 8  # unused or tied parameters named; the rest are counted


def trace_table(graph: ModelGraph, sharding: Sharding, batch: int, max_tp: int = 64) -> RenderableType:
    """The chain in order of execution with figures of one layer each, totals, and remarks.

    Parameters
    ----------
    graph : ModelGraph
    sharding : Sharding
        What `planner.sharding.analyse` found for it.
    batch : int
        Samples that FLOPs and bytes are for.
    max_tp : int
        Largest tp degree named.
    """
    lines = (
        *_tensor_parallel(sharding, max_tp),
        *_opaque(graph),
        *_parameters(graph),
        *(("note", note) for note in graph.notes),
    )
    rows = chain_rows(graph)
    if sum(1 for _ in leaves(rows)) > MANY_ROWS:
        rows = chain_rows(graph, alike(graph, parts_by_class(graph, sharding, batch)))
    return Texts(_chain_table(graph, rows, batch), *(_remark(kind, text) for kind, text in lines))


def _chain_table(graph: ModelGraph, rows: Sequence[Row | Group], batch: int) -> Table:
    title = f"{graph.name}: batch {batch}, sequence {graph.sequence_length}, {graph.precision}; figures of one layer"
    if any(not row_size(graph, row, batch).equal for row in leaves(rows)):
        title += " (~: the mean of layers that differ in size)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold" if i < 1 else "ellipsis")
    for cells in _cells(graph, rows, batch, ""):
        table.add_row(*cells)
    table.add_section()
    forward, backward = graph.flops_forward.at(batch), graph.flops_backward.at(batch)
    table.add_row(
        "total", f"{len(graph.classes)} classes", str(len(graph.units)), format_count(graph.parameter_count),
        format_count(forward), format_count(backward), format_bytes(graph.saved_bytes.at(batch)), "",
        str(sum(unit.cut_after for unit in graph.units)), style="bold",
    )  # fmt: skip
    return table


def _cells(graph: ModelGraph, rows: Sequence[Row | Group], batch: int, indent: str) -> Iterator[list[str]]:
    """Cells of each row; a pattern is a row of its own with its members below it, indented."""
    total = (graph.flops_forward + graph.flops_backward).at(batch)
    for row in rows:
        if isinstance(row, Group):
            yield [f"{indent}{row.count} times in turn:", *[""] * (len(_COLUMNS) - 1)]
            yield from _cells(graph, row.members, batch, indent + "  ")
            continue
        cls = graph.classes[row.class_index]
        units = [graph.units[p] for p in row.positions]
        run = f" x {row.run}" if indent and row.run > 1 else ""
        size = row_size(graph, row, batch)
        about = "" if size.equal else "~"
        share = size.flops * len(units) / total if total else 0.0
        yield [
            f"{indent}{row_name(graph, row)}{run}{_mark(graph, units[0])}",
            cls.module_type,
            str(len(units)),
            *(
                f"{about if n else ''}{format_count(n)}"
                for n in (size.parameters, size.flops_forward, size.flops_backward)
            ),
            f"{about if size.saved_bytes else ''}{format_bytes(size.saved_bytes)}",
            f"{share:.1%}",
            "every stage" if units[0].replicated else str(sum(u.cut_after for u in units)),
        ]


def _mark(graph: ModelGraph, unit: Unit) -> str:
    if opaque_reason(graph, unit):
        return " (opaque)"
    return " (partly opaque)" if holds_opaque(graph, unit) else ""


def _tensor_parallel(sharding: Sharding, max_tp: int) -> Iterator[tuple[str, str]]:
    degrees = sharding.degrees_allowed(max_tp)
    if degrees == [1]:
        yield "tensor parallel", "no degree above 1"
    else:
        named = ", ".join(str(d) for d in degrees)
        yield "tensor parallel", f"{named}; divides {sharding.sharded_share:.1%} of the parameter bytes"
    for reason in sharding.reasons:
        yield "", reason
    sequence = sharding.sequence
    if sequence.possible:
        yield "sequence parallel", f"possible, tp must divide {sequence.tokens} tokens; {len(sequence.modules)} modules"
    else:
        yield "sequence parallel", f"no: {sequence.reason}"


def _opaque(graph: ModelGraph) -> Iterator[tuple[str, str]]:
    """What is opaque: where, what part of the FLOPs, why; modules with one reason together."""
    alike: dict[str, list[str]] = {}
    shares: dict[str, float] = {}
    for fqn, reason, share in graph.opaque:
        alike.setdefault(reason, []).append(fqn)
        shares[reason] = shares.get(reason, 0.0) + share
    for reason, names in alike.items():
        around = [f"the code of {name[1:] or 'the model'}" for name in names if name.startswith("/")]
        inside = [name for name in names if not name.startswith("/")]
        where = ", ".join([name_pattern(n) for n in (inside, around) if n])
        yield "opaque", f"{where}, {shares[reason]:.1%} of the FLOPs: {reason}"
    if graph.opaque and not graph.captured:
        yield "opaque", f"more than {LARGEST_OPAQUE:.0%} of the FLOPs together: the model does not count as captured"


def _parameters(graph: ModelGraph) -> Iterator[tuple[str, str]]:
    """Unused and tied parameters."""
    if graph.unused:
        yield "unused", f"{len(graph.unused)} trainable parameters: {_names(graph.unused)}"
    for group in graph.tied[:_MOST_NAMES]:
        yield "tied", " = ".join(group)
    if len(graph.tied) > _MOST_NAMES:
        yield "tied", f"and {len(graph.tied) - _MOST_NAMES} groups more"


def _names(names: Sequence[str]) -> str:
    """Names that differ in indices alone as one, and no more than a few."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        alike.setdefault(tuple("#" if part.isdigit() else part for part in name.split(".")), []).append(name)
    patterns = [name_pattern(group) for group in alike.values()]
    more = f" and {len(patterns) - _MOST_NAMES} more" if len(patterns) > _MOST_NAMES else ""
    return ", ".join(patterns[:_MOST_NAMES]) + more


def _remark(kind: str, text: str) -> RenderableType:
    """A remark below the table, its kind in bold; lines that go on are indented."""
    body = Text()
    if kind:
        body.append(f"{kind}: ", style="bold")
    body.append(text)
    return Padding(body, (0, 0, 0, 0 if kind else 2))
