"""The enumerated meshes: every one is legal, none is missing, pins hold, orders that cost the same come once."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner.mesh import (
    AXES,
    LARGEST_MICROBATCH,
    Mesh,
    Space,
    axis_orders,
    enumerate_meshes,
    interleaved_ends,
)
from tpplan.planner.pins import parse_pins
from tpplan.planner.request import Request

LINKS = load_profile("h100-sxm").links


def request(gpus: int = 16, global_batch: int = 256, **kw) -> Request:
    defaults = {
        "gpus_per_node": 8, "sequence_length": 128, "precision": "bf16", "optimizer": "adamw",
        "memory_limit_bytes": 2**36,
    }  # fmt: skip
    return Request(gpus=gpus, global_batch=global_batch, **{**defaults, **kw})


def meshes(asked: Request, tps, stages: int, layouts=None, sequence=()) -> list[Mesh]:
    return enumerate_meshes(asked, Space(tuple(tps), stages, tuple(sequence), layouts), LINKS)


@given(
    gpus=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 64]),
    batch=st.integers(1, 300),
    tps=st.sets(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1),
    stages=st.integers(1, 9),
)
def test_every_mesh_is_legal(gpus: int, batch: int, tps: set[int], stages: int) -> None:
    found = meshes(request(gpus, batch), tps, stages, dict.fromkeys(range(4, 9), (0, 3)), tps)
    assert len(set(found)) == len(found)
    for mesh in found:
        assert mesh.world_size == mesh.pp * mesh.dp_replicate * mesh.dp_shard * mesh.tp == gpus
        assert mesh.microbatch_size * mesh.microbatches * mesh.dp == batch
        assert mesh.pp <= stages
        assert mesh.pp <= mesh.microbatches
        assert mesh.tp in tps
        assert (mesh.virtual > 1) == (mesh.schedule == "interleaved")
        assert mesh.virtual == 1 or 4 <= mesh.pp * mesh.virtual <= 8
        assert not mesh.sequence_parallel or mesh.tp > 1


def test_no_mesh_is_missing() -> None:
    found = meshes(request(4, 8), [1, 2], 2, {4: (0,)})
    seen = {(m.pp, m.tp, m.dp_replicate, m.dp_shard, m.microbatch_size, m.schedule, m.virtual) for m in found}
    wanted = {
        (pp, tp, rep, shard, size, schedule, virtual)
        for pp, tp, rep, shard, size in product((1, 2), (1, 2), (1, 2, 4), (1, 2, 4), range(1, LARGEST_MICROBATCH + 1))
        for schedule, virtual in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2))
        if pp * tp * rep * shard == 4 and 8 % (rep * shard * size) == 0 and 8 // (rep * shard * size) >= pp
        if pp > 1 or schedule == "1f1b"
    }
    assert seen == wanted


def test_sizes_that_are_no_powers_of_two() -> None:
    found = meshes(request(12, 36, gpus_per_node=12), [1, 3], 6)
    assert {m.dp for m in found} == {1, 2, 3, 4, 6, 12}
    assert {m.microbatch_size for m in found if m.dp == 1} == {1, 2, 3, 4, 6, 9}  # pp = 4 leaves no larger one


def test_orders_differ_in_what_lies_inside_a_node() -> None:
    """tp 8 fills a node, so nothing else can lie in it; two axes of 4 on nodes of 8 leave a choice."""
    assert len(axis_orders(2, 1, 1, 8, LINKS)) == 2  # tp inside, or two ranks of pp inside and tp across
    orders = axis_orders(4, 1, 4, 1, LINKS)
    kept = [Mesh(4, 1, 1, False, 8, 1, "last", "1f1b", 4, 1, order).axes for order in orders]
    assert [[axis for axis in axes if axis in ("pp", "dp_shard")] for axes in kept] == [
        ["pp", "dp_shard"],
        ["dp_shard", "pp"],
    ]
    assert axis_orders(1, 1, 16, 1, LINKS) == (0,)
    assert axis_orders(2, 1, 4, 1, LINKS) == (0,)  # all in one node


def test_strides_follow_the_order() -> None:
    for order in axis_orders(2, 2, 2, 2, LINKS):
        mesh = Mesh(2, 2, 1, False, 8, 2, "last", "1f1b", 2, 1, order)
        assert [mesh.stride(axis) for axis in reversed(mesh.axes)] == [1, 2, 4, 8]
        assert sorted(mesh.axes) == sorted(AXES)


def test_near_equal_chunks() -> None:
    cuts = range(20)
    assert interleaved_ends(range(1, 9), cuts, 10, 4, 0) == (3, 5, 7, 10)
    assert interleaved_ends(range(1, 8), cuts, 9, 4, 0) is None
    assert interleaved_ends(range(1, 8), cuts, 9, 4, 1) == (3, 5, 7, 9)  # the last holds one block less
    assert interleaved_ends(range(1, 8), cuts, 9, 4, 2) == (2, 4, 6, 9)  # the first does
    assert interleaved_ends(range(1, 7), cuts, 8, 4, 3) == (2, 4, 6, 8)  # both do
    assert interleaved_ends(range(1, 9), [2, 4], 10, 4, 0) is None  # no stage may end after position 6
    assert interleaved_ends((1, 4, 7, 10), (2, 5, 8), 12, 4, 0) == (3, 6, 9, 12)  # the first legal cut behind a block


def test_pins() -> None:
    pins = parse_pins(["tp=2", "pp=4", "microbatch_size=16"])
    found = meshes(request(16, 256, pins=pins), [1, 2, 4], 8)
    assert found
    assert {(m.tp, m.pp, m.microbatch_size) for m in found} == {(2, 4, 16)}
    bounded = meshes(
        request(16, 256, pins=parse_pins(most=["pp=4"], least=["pp=2"], forbid=["schedule=gpipe"])), [1], 8
    )
    assert {m.pp for m in bounded} == {2, 4}
    assert {m.schedule for m in bounded} == {"1f1b"}


def test_zero_bubble_is_searched_where_it_is_pinned() -> None:
    assert {m.schedule for m in meshes(request(4, 8), [1], 4)} == {"1f1b", "gpipe"}
    found = meshes(request(4, 8, pins=parse_pins(["schedule=zb"])), [1], 4)
    assert {m.schedule for m in found if m.pp > 1} == {"zb"}


def test_a_large_microbatch_is_enumerated_where_it_is_pinned() -> None:
    assert max(m.microbatch_size for m in meshes(request(1, 256), [1], 1)) == LARGEST_MICROBATCH
    pinned = meshes(request(1, 256, pins=parse_pins(["microbatch_size=128"])), [1], 1)
    assert {m.microbatch_size for m in pinned} == {128}


@pytest.mark.parametrize(("gpus", "batch"), [(16, 8), (3, 256)])
def test_no_mesh_where_the_batch_does_not_divide(gpus: int, batch: int) -> None:
    assert meshes(request(gpus, batch, gpus_per_node=gpus), [1], 1) == []
