"""The chain of units as few rows: runs of one class, and patterns of classes that come again and again.

L L L L L G L L L L L G L L  ->  2 x [ 5 x L, G ], 2 x L
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..planner.graph import ModelGraph

MANY_ROWS = 48  # from here on, layers that differ in sizes alone are shown in one row
_LONGEST_PATTERN = 64  # runs; a longer period is drawn run by run
_RANGES = 3  # of indices, in one name

Run = tuple[tuple[int, int], tuple[int, ...]]  # (kind of class, units in a row), positions at this place of the pattern


@dataclass(frozen=True, slots=True)
class Row:
    """Units of one class, or of classes that look alike, that follow each other.

    class_index : the class of the first unit
    positions : of all the units, over all repetitions of the patterns around the row
    run : how many follow each other directly, in one repetition
    """

    class_index: int
    positions: tuple[int, ...]
    run: int


@dataclass(frozen=True, slots=True)
class Group:
    """A pattern of rows that comes `count` times."""

    count: int
    members: tuple[Row | Group, ...]


def chain_rows(graph: ModelGraph, alike: Sequence[int] | None = None) -> tuple[Row | Group, ...]:
    """Rows and groups in order of execution; every unit is in exactly one row.

    Parameters
    ----------
    graph : ModelGraph
    alike : sequence of int, optional
        For each class, a number that it shares with those that may be in one row with it. [default: its own]
    """
    kinds = range(len(graph.classes)) if alike is None else alike
    runs: list[Run] = []
    for unit in graph.units:
        kind = kinds[unit.class_index]
        if runs and runs[-1][0][0] == kind:
            (_, before), positions = runs.pop()
            runs.append(((kind, before + 1), (*positions, unit.position)))
        else:
            runs.append(((kind, 1), (unit.position,)))
    return _with_classes(graph, _compress(runs))


def _with_classes(graph: ModelGraph, rows: Iterable[Row | Group]) -> tuple[Row | Group, ...]:
    """The rows with the class of their first unit in place of the kind."""
    return tuple(
        Row(graph.units[row.positions[0]].class_index, row.positions, row.run)
        if isinstance(row, Row)
        else Group(row.count, _with_classes(graph, row.members))
        for row in rows
    )


def leaves(members: Iterable[Row | Group]) -> Iterator[Row]:
    """All rows, those inside groups too."""
    for member in members:
        if isinstance(member, Row):
            yield member
        else:
            yield from leaves(member.members)


def _compress(runs: Sequence[Run]) -> tuple[Row | Group, ...]:
    found: list[Row | Group] = []
    start = 0
    while start < len(runs):
        period, count = _best_repeat(runs, start)
        merged = [
            (runs[start + k][0], tuple(sorted(p for r in range(count) for p in runs[start + r * period + k][1])))
            for k in range(period)
        ]
        if count == 1:
            (kind, length), positions = merged[0]
            found.append(Row(kind, positions, length))
        else:
            found.append(Group(count, _compress(merged)))
        start += period * count
    return tuple(found)


def _best_repeat(runs: Sequence[Run], start: int) -> tuple[int, int]:
    """(period, count) of the repetition from `start` that saves most runs; (1, 1) if nothing repeats."""
    best, saved = (1, 1), 0
    for period in range(2, min(_LONGEST_PATTERN, (len(runs) - start) // 2) + 1):
        same = 0
        while start + same + period < len(runs) and runs[start + same][0] == runs[start + same + period][0]:
            same += 1
        count = same // period + 1
        if period * (count - 1) > saved:
            best, saved = (period, count), period * (count - 1)
    return best


def row_name(graph: ModelGraph, row: Row) -> str:
    """The FQNs of a row's units as one pattern, with the number of calls where a module is called again."""
    names = list(dict.fromkeys(graph.units[p].fqn for p in row.positions))
    again = len(row.positions) - len(names)
    return name_pattern(names) + (f" ({len(row.positions)} calls)" if again else "")


def name_pattern(names: Sequence[str]) -> str:
    """Distinct names that differ in some parts, as one.

    >>> name_pattern(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"])
    'layers.{0-2}.mlp'
    >>> name_pattern(["down.0.res.0", "down.0.res.1", "down.1.res.0", "down.1.res.1"])
    'down.{0-1}.res.{0-1}'
    >>> name_pattern(["layer1.conv", "layer2.conv", "layer4.conv"])
    'layer{1-2,4}.conv'
    >>> name_pattern(["layers.5", "layers.11", "layers.17", "layers.23"]), name_pattern([""])
    ('layers.{5-23:6}', '(model)')
    """
    if len(names) == 1:
        return names[0] or "(model)"
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return f"{names[0] or '(model)'} ... {names[-1] or '(model)'}"
    columns = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    combinations = 1
    for column in columns:
        combinations *= len(column)
    parts = [column[0] if len(column) == 1 else _alternatives(column) for column in columns]
    if combinations == len(names):
        return ".".join(parts)
    return ".".join(p if len(c) == 1 else "*" for p, c in zip(parts, columns, strict=True))


def _alternatives(column: Sequence[str]) -> str:
    """One part of a name that takes several values."""
    stems = {value.rstrip("0123456789") for value in column}
    if len(stems) == 1 and stems != {""} and stems.isdisjoint(column):
        stem = stems.pop()
        return stem + _alternatives([value.removeprefix(stem) for value in column])
    if not all(value.isdigit() for value in column):
        return "{" + ",".join(column) + "}" if len(column) <= 4 else "*"
    values = sorted(int(value) for value in column)
    step = values[1] - values[0]
    if step > 1 and len(values) > 2 and all(b - a == step for a, b in pairwise(values)):
        return f"{{{values[0]}-{values[-1]}:{step}}}"
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    if len(texts) > _RANGES:
        texts = [*texts[: _RANGES - 1], "...", texts[-1]]
    return "{" + ",".join(texts) + "}"
