"""The chain of units as few rows: runs of one class, and patterns of classes that come again and again.

L L L L L G L L L L L G L L  ->  2 x [ 5 x L, G ], 2 x L
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..planner.graph import ModelGraph

_LONGEST_PATTERN = 64  # units; a longer period is drawn unit by unit
_RANGES = 3  # of indices, in one name

Item = tuple[int, tuple[int, ...]]  # class index, positions of the units that stand at this place of the pattern


@dataclass(frozen=True, slots=True)
class Row:
    """Units of one class that follow each other.

    class_index : the class
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


def chain_rows(graph: ModelGraph) -> tuple[Row | Group, ...]:
    """Rows and groups in order of execution; every unit is in exactly one row."""
    return _compress([(unit.class_index, (unit.position,)) for unit in graph.units])


def leaves(members: Iterable[Row | Group]) -> Iterator[Row]:
    """All rows, those inside groups too."""
    for member in members:
        if isinstance(member, Row):
            yield member
        else:
            yield from leaves(member.members)


def _compress(items: Sequence[Item]) -> tuple[Row | Group, ...]:
    found: list[Row | Group] = []
    start = 0
    while start < len(items):
        period, count = _best_repeat(items, start)
        merged = [
            (items[start + k][0], tuple(sorted(p for r in range(count) for p in items[start + r * period + k][1])))
            for k in range(period)
        ]
        if period == 1:
            found.append(Row(merged[0][0], merged[0][1], count))
        else:
            found.append(Group(count, _compress(merged)))
        start += period * count
    return tuple(found)


def _best_repeat(items: Sequence[Item], start: int) -> tuple[int, int]:
    """(period, count) of the repetition from `start` that saves most items; (1, 1) if nothing repeats."""
    best, saved = (1, 1), 0
    for period in range(1, min(_LONGEST_PATTERN, (len(items) - start) // 2) + 1):
        same = 0
        while start + same + period < len(items) and items[start + same][0] == items[start + same + period][0]:
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
