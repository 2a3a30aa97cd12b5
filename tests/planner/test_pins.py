"""Pins: read from the command line and a file, held against each other, and bound to the units of a model."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpplan.errors import InfeasibleError, UsageError
from tpplan.planner.impossible import smallest_core
from tpplan.planner.layer_pins import bind_layers
from tpplan.planner.pins import AXES, Pin, Pins, parse_pins

ROOT = Path(__file__).resolve().parents[2]

PINS = st.lists(
    st.builds(Pin, st.sampled_from(["fix", "max", "min", "forbid"]), st.sampled_from(["tp", "pp"]), st.integers(1, 9)),
    max_size=4,
)


def typed(pins: list[Pin]) -> dict[str, list[str]]:
    names = {"fix": "fix", "max": "most", "min": "least", "forbid": "forbid"}
    found: dict[str, list[str]] = {}
    for pin in pins:
        found.setdefault(names[pin.kind], []).append(f"{pin.axis}={pin.value}")
    return found


def obeys(value: int, pin: Pin) -> bool:
    compared = {"fix": value == pin.value, "max": value <= pin.value, "min": value >= pin.value}
    return compared.get(pin.kind, value != pin.value)


@given(PINS)
def test_pins_allow_what_every_one_of_them_allows(pins: list[Pin]) -> None:
    once = [(p.kind, p.axis) for p in pins if p.kind != "forbid"]
    left = {
        axis: {v for v in range(1, 20) if all(obeys(v, p) for p in pins if p.axis == axis)} for axis in ("tp", "pp")
    }
    try:
        parsed = parse_pins(**typed(pins))
    except UsageError:
        parsed = None
    if parsed is None:
        assert len(set(once)) < len(once) or not all(left.values())
        return
    for axis, allowed in left.items():
        assert {v for v in range(1, 20) if parsed.allows(axis, v)} == allowed


def test_no_pins_are_false_and_allow_all() -> None:
    pins = parse_pins()
    assert not pins
    assert pins.schedules() == ("1f1b", "gpipe", "interleaved")
    assert pins.allows("tp", 7)
    assert pins.allows_layer("h.0", recompute="full", zero_stage=2, sharding="replicate")


def test_pins_travel_to_other_processes() -> None:
    pins = parse_pins(fix=["tp=8", "layer:h.*=row"], most=["pp=4"], forbid=["recompute=full"])
    assert pickle.loads(pickle.dumps(pins)) == pins
    assert hash(pins) == hash(parse_pins(fix=["tp=8", "layer:h.*=row"], most=["pp=4"], forbid=["recompute=full"]))


def test_schedules_are_what_pins_leave_and_zero_bubble_where_it_is_fixed() -> None:
    assert parse_pins(forbid=["schedule=interleaved"]).schedules() == ("1f1b", "gpipe")
    assert parse_pins(fix=["schedule=gpipe"]).schedules() == ("gpipe",)
    assert parse_pins(fix=["schedule=zb"]).schedules() == ("zb",)


def test_switches_are_asked_with_booleans() -> None:
    pins = parse_pins(fix=["sequence_parallel=on"])
    assert pins.allows("sequence_parallel", True)
    assert not pins.allows("sequence_parallel", False)


def test_a_pin_of_a_unit_goes_before_one_of_the_plan() -> None:
    pins = parse_pins(fix=["recompute=none", "layer:h.0=full"], forbid=["layer:h.1=zero2"])
    assert pins.allows_layer("h.0", recompute="full", zero_stage=2)
    assert not pins.allows_layer("h.0", recompute="none")
    assert not pins.allows_layer("h.1", recompute="full")
    assert not pins.allows_layer("h.1", recompute="none", zero_stage=2)
    assert pins.layer_key("h.0") != pins.layer_key("h.1") != pins.layer_key("h.2") == ()


def test_an_unusual_fixed_microbatch_size_is_searched() -> None:
    assert parse_pins(fix=["microbatch_size=3"]).microbatch_sizes((1, 2, 4)) == (3,)
    assert parse_pins(most=["microbatch_size=2"]).microbatch_sizes((1, 2, 4)) == (1, 2)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"fix": ["tp=8"], "most": ["tp=4"]}, ["--fix tp=8", "--max tp=4"]),
        ({"fix": ["tp=8"], "least": ["tp=16"]}, ["--fix tp=8", "--min tp=16"]),
        ({"fix": ["tp=8"], "forbid": ["tp=8"]}, ["--fix tp=8", "--forbid tp=8"]),
        ({"least": ["pp=8"], "most": ["pp=4"]}, ["--min pp=8", "--max pp=4"]),
        ({"fix": ["tp=2", "tp=4"]}, ["twice", "tp=2", "tp=4"]),
        ({"forbid": ["zero_stage=2", "zero_stage=3"]}, ["zero_stage=2", "zero_stage=3"]),
        ({"fix": ["dp=8", "dp_shard=3"]}, ["--fix dp=8", "--fix dp_shard=3"]),
        ({"fix": ["dp=8", "dp_shard=2", "dp_replicate=2"]}, ["dp=8", "dp_shard=2", "dp_replicate=2"]),
        ({"fix": ["layer:h.0=full", "layer:h.0=none"]}, ["layer:h.0=full", "layer:h.0=none"]),
        ({"fix": ["thp=8"]}, ["tp?", *AXES]),
        ({"fix": ["schedule=2f2b"]}, ["1f1b, gpipe, interleaved, zb"]),
        ({"fix": ["layer:h.0=fast"]}, ["none, selective, full"]),
        ({"most": ["schedule=gpipe"]}, ["no max"]),
        ({"fix": ["tp"]}, ["AXIS=VALUE"]),
        ({"fix": ["tp=0"]}, ["1 or more"]),
    ],
)
def test_a_wrong_pin_is_named(pins: dict[str, list[str]], said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pins(**pins)
    assert all(text in str(caught.value) for text in said)


def test_a_file_is_read_and_the_command_line_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "pins.toml"
    file.write_text(
        '[fix]\ntp = 8\nsequence_parallel = true\n[max]\npp = 4\n[forbid]\nschedule = ["gpipe", "interleaved"]\n'
        '[layers]\n"h.*" = ["zero3", "row"]\n'
    )
    pins = parse_pins(fix=["tp=2"], file=file)
    assert (pins.fixed("tp"), pins.fixed("sequence_parallel"), pins.schedules()) == (2, "on", ("1f1b",))
    assert pins.allows("pp", 4)
    assert not pins.allows("pp", 5)
    assert not pins.allows_layer("h.3", zero_stage=2)
    assert not pins.allows_layer("h.3", sharding="replicate")
    with pytest.raises(UsageError, match=r"--min pp=8 contradicts --max pp=4 \(in .*pins.toml\)"):
        parse_pins(least=["pp=8"], file=file)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[fixed]\ntp = 8", "fixed"), ("[fix\n", "no TOML"), ("fix = 3", "no table"), ("[fix]\ntp = 1.5", "1.5"),
     ("[max]\ntp = 4\n[fix]\ntp = 8", "contradicts")],
)  # fmt: skip
def test_a_damaged_file_is_a_usage_error(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pins.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        parse_pins(file=tmp_path / "pins.toml")


@given(st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(6, 9)))
def test_the_core_is_the_smallest_that_leaves_nothing(broken: set[int], idle: set[int]) -> None:
    pins = Pins(tuple(Pin("fix", "tp", n) for n in sorted(broken | idle)))
    core = smallest_core(pins, lambda some: broken <= {int(p.value) for p in some})
    assert {p.value for p in core} == broken


@pytest.fixture(scope="module")
def gpt():
    from tpplan.planner.sharding import analyse
    from tpplan.planner.target import load_target
    from tpplan.planner.trace import trace

    sizes = {"n_layer": "3", "n_embd": "64", "n_head": "4", "vocab_size": "128", "block_size": "64"}
    loaded = load_target(str(ROOT / "examples/nanogpt.py"), model_args=sizes, inputs=(), precision="bf16")
    graph = trace(loaded, sequence_length=64, precision="bf16")
    return graph, analyse(graph)


def test_patterns_name_units_and_modules_inside_them(gpt) -> None:
    units = {f"transformer.h.{i}" for i in range(3)}
    for pattern in ("transformer.h.*", "*.mlp.c_proj"):
        pins = bind_layers(parse_pins(fix=[f"layer:{pattern}=row"]), *gpt)
        assert pins.layers()[0].units == units
    first = bind_layers(parse_pins(fix=["layer:transformer.h.0=full"]), *gpt)
    assert not first.allows_layer("transformer.h.0", recompute="none")
    assert first.allows_layer("transformer.h.1", recompute="none")


@pytest.mark.parametrize(
    ("pins", "error", "said"),
    [
        (["layer:transformer.g.*=full"], UsageError, ["transformer.g.*", "transformer.h"]),
        (["layer:transformer.h.*=full", "layer:transformer.h.1=none"], UsageError, ["h.*=full", "h.1=none"]),
        (["layer:transformer.wte=full"], InfeasibleError, ["transformer.wte", "cannot be recomputed"]),
        (["layer:transformer.ln_f=tp"], InfeasibleError, ["transformer.ln_f", "splits nothing"]),
        (["layer:*.mlp.c_proj=col"], InfeasibleError, ["c_proj row", "no col"]),
    ],
)
def test_a_pattern_that_the_model_cannot_satisfy_is_named(gpt, pins: list[str], error: type, said: list[str]) -> None:
    with pytest.raises(error) as caught:
        bind_layers(parse_pins(fix=pins), *gpt)
    assert all(text in str(caught.value) for text in said), str(caught.value)
