"""The JSON of a trace reads back as the same graph."""

from __future__ import annotations

import json

import pytest
from tpplan.errors import UsageError
from tpplan.planner.graph import Affine
from tpplan.reports.trace_json import _decode_any, _encode, read_trace, trace_json


@pytest.mark.parametrize("name", ["nanogpt", "levels", "routed"])
def test_it_reads_back(models, name: str) -> None:
    graph, sharding = models[name]
    text = trace_json(graph, sharding, 2)
    again = read_trace(text)
    assert again == graph
    assert again.hash == graph.hash == json.loads(text)["hash"]
    assert trace_json(again, sharding, 2) == text


def test_it_says_what_tools_need(models) -> None:
    graph, sharding = models["nanogpt"]
    data = json.loads(trace_json(graph, sharding, 2))
    assert data["totals"]["parameters"] == graph.parameter_count
    assert data["totals"]["flops_forward"] == graph.flops_forward.at(2)
    (row,) = [row for row in data["chain"] if row["layers"] == "transformer.h.{0-3}"]
    assert row["units"] == [u.position for u in graph.units if u.class_index == row["class"]]
    flops = sum(
        (op["forward"]["flops"]["base"] + 2 * op["forward"]["flops"]["per_sample"]) * op["repeat"]
        for op in data["graph"]["classes"][row["class"]]["ops"]
    )
    assert flops == graph.classes[row["class"]].flops_forward.at(2)
    assert data["tensor_parallel"]["degrees_allowed"] == sharding.degrees_allowed(64)
    assert set(data["tensor_parallel"]["styles"]) == set(sharding.styles)
    assert data["graph"]["tied"] == [["transformer.wte.weight", "lm_head.weight"]]


def test_what_is_opaque_or_unused_is_named(models) -> None:
    routed, levels = (json.loads(trace_json(*models[name], 1)) for name in ("routed", "levels"))
    assert len(routed["graph"]["opaque"]) == len(models["routed"][0].opaque) > 0
    assert set(routed["graph"]["opaque"][0]) == {"fqn", "reason", "flops_share"}
    assert levels["graph"]["unused"] == ["forgotten.weight", "forgotten.bias"]


def test_arguments_of_operators_keep_their_kind() -> None:
    for value in ((1, (2.0, None)), float("-inf"), Affine(0, 3), ("dim", True), "bfloat16"):
        assert _decode_any(json.loads(json.dumps(_encode(value)))) == value
    with pytest.raises(TypeError, match="no JSON form"):
        _encode(object())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "tpplan-trace", "schema_version": 2}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        read_trace(text)
