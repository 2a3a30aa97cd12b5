"""Profiles: strict files, named errors, equal content equal hash, and a source for every figure."""

from __future__ import annotations

import json

import pytest
from tpplan.errors import HardwareError
from tpplan.hardware_profiles import describe_profiles, list_profiles, load_profile, match_gpu, parse_profile

BUILT_IN = ["a100-sxm-80g", "cpu-gloo", "h100-sxm", "h200-sxm"]


def content(name: str = "a100-sxm-80g") -> dict:
    return load_profile(name).content.model_dump(mode="json")


def test_built_in_profiles_are_listed_with_their_main_figures():
    table = describe_profiles()
    assert table.name.tolist() == BUILT_IN == [profile.name for profile in list_profiles()]
    row = table.set_index("name").loc["h100-sxm"]
    assert row.gpus_per_node == 8
    assert 79 < row.memory_gib < 80
    assert row.bf16_tflops == pytest.approx(989.4)
    assert "nvlink 8" in row.links
    assert "network any" in row.links
    assert table.hash.nunique() == len(BUILT_IN)


def figures(node, path=()):
    """Every (path, object) that holds a number, apart from keys that say what a thing is and not how fast."""
    if isinstance(node, dict):
        if "source" in node:
            yield path, node
        for key, child in node.items():
            if key in ("schema_version", "size") or "source" in node:
                continue
            yield from figures(child, (*path, key))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from figures(child, (*path, i))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path, None


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_number_has_a_source_and_a_kind_of_evidence(name):
    found = list(figures(content(name)))
    assert len(found) > 40
    for path, figure in found:
        assert figure is not None, f"{path}: a number without a source"
        assert len(figure["source"]) >= 8, path
        assert figure["evidence"] in ("datasheet", "measured", "fitted", "published", "assumed"), path


@pytest.mark.parametrize("name", BUILT_IN)
def test_figures_are_within_physical_bounds(name):
    device = load_profile(name).device
    for x, seconds in zip(device.memory_time.x, device.memory_time.y, strict=True):
        assert x / seconds <= 1.05 * device.memory_bandwidth
    assert device.gemm.sustained_flops <= 1.001 * device.peak_flops[device.gemm.dtype]
    assert device.overlap_compute_slowdown >= 1
    assert device.overlap_communication_slowdown >= 1
    assert 0 < device.fused_factor <= 1
    assert device.optimizer_bandwidth < device.memory_bandwidth
    for level in load_profile(name).links.levels:
        for model in (level.default, *level.operations.values()):
            assert model.bandwidth <= level.default.bandwidth * 1.001 or name == "cpu-gloo"
            for curve in model.curves.values():
                assert all(a < b for a, b in zip(curve.y, curve.y[1:], strict=False)), level.name


@pytest.mark.parametrize(("typed", "near"), [("h100", "h100-sxm"), ("A100", "a100-sxm-80g"), ("h200sxm", "h200-sxm")])
def test_unknown_name_names_near_matches(typed, near):
    with pytest.raises(HardwareError, match="Did you mean") as caught:
        load_profile(typed)
    assert near in caught.value.message
    assert caught.value.exit_code == 2
    assert "tpplan hardware" in caught.value.remedy
    assert len(str(caught.value).splitlines()) == 2


def test_name_like_nothing_lists_what_there_is():
    with pytest.raises(HardwareError) as caught:
        load_profile("zzzzzz")
    assert all(name in caught.value.message for name in BUILT_IN)


def test_missing_file_is_named():
    with pytest.raises(HardwareError, match=r"nowhere/box\.json"):
        load_profile("nowhere/box.json")


def drop(data: dict, *path: str) -> dict:
    node = data
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return data


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("memory",), "memory: this key is missing"),
        (("memory", "context_bytes"), "memory.context_bytes: this key is missing"),
        (("compute", "gemm", "max_efficiency", "source"), "compute.gemm.max_efficiency.source: this key is missing"),
        (("host", "eager_s_per_op", "evidence"), "host.eager_s_per_op.evidence: this key is missing"),
    ],
)
def test_missing_key_is_named(path, words):
    with pytest.raises(HardwareError) as caught:
        parse_profile(json.dumps(drop(content(), *path)), "box.json")
    assert words in caught.value.message


def test_unknown_key_is_named_at_any_depth():
    data = content()
    data["compute"]["gemm"]["max_efficency"] = data["compute"]["gemm"]["max_efficiency"]
    with pytest.raises(HardwareError, match=r"compute\.gemm\.max_efficency: unknown key"):
        parse_profile(json.dumps(data), "box.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["links"][-1].update(size=64), "size null"),
        (lambda d: d["links"].insert(1, {**d["links"][0], "name": "rack", "size": 4}), "grow from the innermost"),
        (lambda d: d["compute"]["peak_flops"].pop("bfloat16"), "peak_flops lacks 'bfloat16'"),
        (lambda d: d["compute"]["memory_time_s"]["rows"].reverse(), "must ascend"),
        (lambda d: d["memory"]["context_bytes"].update(value=-1), "memory.context_bytes.value"),
        (lambda d: d["memory"]["context_bytes"].update(value=float("nan")), "context_bytes"),
        (lambda d: d["memory"]["context_bytes"].update(evidence="hearsay"), "memory.context_bytes.evidence"),
        (lambda d: d.update(schema_version=2), "schema_version"),
    ],
)
def test_wrong_value_is_named(change, words):
    data = content()
    change(data)
    with pytest.raises(HardwareError) as caught:
        parse_profile(json.dumps(data), "box.json")
    assert words in caught.value.message


def test_text_that_is_no_json_is_an_error():
    with pytest.raises(HardwareError, match="not valid JSON"):
        parse_profile("{", "box.json")


def test_file_equals_built_in_and_hash_ignores_layout(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content("h100-sxm"), indent=7, sort_keys=True), encoding="utf-8")
    built_in, mine = load_profile("h100-sxm"), load_profile(str(path))
    assert mine.hash == built_in.hash
    assert mine.content == built_in.content
    assert (mine.file, built_in.file) == (str(path), None)


def test_hash_changes_with_any_figure():
    data = content()
    data["host"]["eager_s_per_op"]["value"] *= 1.01
    assert parse_profile(json.dumps(data), "box").hash != load_profile("a100-sxm-80g").hash


def test_gpus_are_matched_by_whole_name():
    assert match_gpu("NVIDIA H200").name == "h200-sxm"  # type: ignore[union-attr]
    assert match_gpu("nvidia  A100-SXM4-80GB").name == "a100-sxm-80g"  # type: ignore[union-attr]
    assert match_gpu("NVIDIA A100-SXM4-40GB") is None
    assert match_gpu("NVIDIA H200 NVL") is None


def test_nvlink_domain_of_72_and_rails_are_data():
    data = content("h100-sxm")
    node, network = data["links"]
    rack = {**node, "name": "nvlink72", "size": 72, "collectives": {}}
    data["links"] = [rack, {**network, "name": "rail", "size": 576}, network]
    levels = parse_profile(json.dumps(data), "rack.json").links.levels
    assert [level.size for level in levels] == [72, 576, None]


def test_node_size_can_be_changed_without_touching_the_rest():
    links = load_profile("h100-sxm").links
    four = links.with_node_size(4)
    assert [level.size for level in four.levels] == [4, None]
    assert four.levels[1] is links.levels[1]
