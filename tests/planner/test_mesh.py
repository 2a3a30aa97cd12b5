"""The enumerated meshes: every one is legal, none is missing, pins hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpplan.errors import UsageError
from tpplan.planner.mesh import MICROBATCH_SIZES, enumerate_meshes
from tpplan.planner.pins import parse_pins
from tpplan.planner.request import Request


def request(gpus: int = 16, global_batch: int = 256, **kw) -> Request:
    defaults = {
        "gpus_per_node": 8, "sequence_length": 128, "precision": "bf16", "optimizer": "adamw",
        "memory_limit_bytes": 2**36,
    }  # fmt: skip
    return Request(gpus=gpus, global_batch=global_batch, **{**defaults, **kw})


@given(
    gpus=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 64]),
    batch=st.integers(1, 300),
    tps=st.sets(st.sampled_from([1, 2, 3, 4, 8]), min_size=1),
    stages=st.integers(1, 9),
)
def test_every_mesh_is_legal(gpus: int, batch: int, tps: set[int], stages: int) -> None:
    for mesh in enumerate_meshes(request(gpus, batch), tps, stages):
        assert mesh.world_size == mesh.pp * mesh.dp_replicate * mesh.dp_shard * mesh.tp == gpus
        assert mesh.microbatch_size * mesh.microbatches * mesh.dp == batch
        assert mesh.pp <= stages
        assert mesh.pp <= mesh.microbatches
        assert mesh.tp in tps
        assert min(gpus, 8) % mesh.tp == 0


def test_no_mesh_is_missing_or_twice() -> None:
    found = enumerate_meshes(request(4, 8), [1, 2], max_stages=2)
    seen = {(m.pp, m.tp, m.dp_replicate, m.dp_shard, m.microbatch_size) for m in found}
    wanted = {
        (pp, tp, rep, shard, size)
        for pp in (1, 2)
        for tp in (1, 2)
        for rep in (1, 2, 4)
        for shard in (1, 2, 4)
        for size in MICROBATCH_SIZES
        if pp * tp * rep * shard == 4 and 8 % (rep * shard * size) == 0 and 8 // (rep * shard * size) >= pp
    }
    assert seen == wanted
    assert len(found) == len(set(found))


def test_pins_hold() -> None:
    found = enumerate_meshes(request(16, 256, pins=parse_pins(["tp=2", "pp=4", "microbatch_size=16"])), [1, 2, 4], 8)
    assert found
    assert {(m.tp, m.pp, m.microbatch_size) for m in found} == {(2, 4, 16)}


def test_an_unusual_microbatch_size_can_be_pinned() -> None:
    found = enumerate_meshes(request(2, 12, pins=parse_pins(["microbatch_size=3"])), [1], 4)
    assert {m.microbatch_size for m in found} == {3}


@pytest.mark.parametrize("text", ["tp", "tp=", "tp=0", "tp=-1", "tp=two", "xp=2", "recompute=some", "schedule=2f2b"])
def test_a_wrong_pin_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pins((text,))


def test_a_pin_given_twice_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_pins(("tp=2", "tp=4"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 0}, "at least one"),
        ({"gpus": -3}, "at least one"),
        ({"gpus": 12}, "do not fill"),
        ({"global_batch": 0}, "--global-batch"),
        ({"sequence_length": 0}, "--seq-len"),
        ({"memory_limit_bytes": 0}, "--memory-limit"),
        ({"gpus_per_node": 0}, "--gpus-per-node"),
    ],
)
def test_a_wrong_request_is_a_usage_error(change: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        request(**change)
    assert said in str(caught.value)
