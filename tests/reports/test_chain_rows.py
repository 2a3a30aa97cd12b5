"""Rows of the chain: nothing lost, nothing twice, order kept, repeats found."""

from __future__ import annotations

import random

import pytest
from tpplan.planner.graph import Affine, ModelGraph, Unit, UnitClass
from tpplan.reports.chain_rows import Group, Row, chain_rows, leaves, name_pattern

NONE = Affine()


def chain(kinds: list[int]) -> ModelGraph:
    """A graph of empty units of these classes, one after the other."""
    classes = tuple(
        UnitClass(i, f"Kind{i}", (), (), (), (), (), NONE, NONE, NONE, NONE, NONE) for i in range(max(kinds) + 1)
    )
    units = tuple(Unit(i, f"layers.{i}", 0, kind, ()) for i, kind in enumerate(kinds))
    return ModelGraph("chain", "fp32", 1, classes, units, (), {})


def played(rows: tuple[Row | Group, ...]) -> list[int]:
    """The classes in the order in which the rows say that they run."""
    order: list[int] = []
    for row in rows:
        if isinstance(row, Row):
            order += [row.class_index] * row.run
        else:
            order += played(row.members) * row.count
    return order


@pytest.mark.parametrize("seed", range(60))
def test_rows_play_back_the_chain(seed: int) -> None:
    rng = random.Random(seed)
    pattern = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
    kinds = pattern * rng.randint(1, 6) + [rng.randrange(4) for _ in range(rng.randint(0, 9))]
    rows = chain_rows(chain(kinds))
    assert played(rows) == kinds
    positions = sorted(p for row in leaves(rows) for p in row.positions)
    assert positions == list(range(len(kinds)))
    assert all({kinds[p] for p in row.positions} == {row.class_index} for row in leaves(rows))


def test_patterns_are_found() -> None:
    local, global_ = 1, 2
    rows = chain_rows(chain([0, *([local] * 5 + [global_]) * 4, local, local, 3]))
    assert [type(row) for row in rows] == [Row, Group, Row, Row]
    group = rows[1]
    assert isinstance(group, Group)
    assert group.count == 4
    assert [(m.class_index, m.run, len(m.positions)) for m in group.members if isinstance(m, Row)] == [
        (local, 5, 20),
        (global_, 1, 4),
    ]
    assert len(list(leaves(chain_rows(chain([0] * 1000))))) == 1


def test_classes_that_look_alike_share_a_row() -> None:
    graph = chain([0, 1, 2, 3, 4])
    assert len(chain_rows(graph)) == 5
    rows = chain_rows(graph, [0, 1, 1, 1, 2])
    assert len(rows) == 3
    middle = rows[1]
    assert isinstance(middle, Row)
    assert middle.positions == (1, 2, 3)


def test_names() -> None:
    assert name_pattern([f"h.{i}.mlp" for i in (0, 1, 2, 6, 7)]) == "h.{0-2,6-7}.mlp"
    assert name_pattern(["encoder", "decoder.layers.0"]) == "encoder ... decoder.layers.0"
    assert name_pattern(["a.0.b", "c.1.b"]) == "*.*.b"
