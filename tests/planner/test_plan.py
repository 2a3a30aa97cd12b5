"""plan.json: strict to read, atomic to write, and loadable for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest

from tpplan.errors import PlanFileError
from tpplan.planner.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "nanogpt_16.plan.json"


@pytest.fixture
def text() -> str:
    return GOLDEN.read_text()


def test_golden_plan_loads_and_writes_the_same_bytes(text: str) -> None:
    assert Plan.parse(text).to_json() == text


def test_golden_plan_is_valid_under_the_published_schema(text: str) -> None:
    schema = json.loads((ROOT / "docs" / "plan.schema.json").read_text())
    jsonschema.validate(json.loads(text), schema)


def test_published_schema_is_the_code_s() -> None:
    assert json.loads((ROOT / "docs" / "plan.schema.json").read_text()) == Plan.model_json_schema()


def test_top_keys_are_the_contract(text: str) -> None:
    wanted = {"schema_version", "model", "hardware", "mesh", "batch", "schedule", "stages", "predicted", "solver"}
    assert wanted <= set(json.loads(text))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: d | {"schema_version": 2}, "Upgrade tpplan"),
        (lambda d: d | {"schema_version": "1"}, "schema_version"),
        (lambda d: d | {"flavour": 1}, "flavour"),
        (lambda d: d | {"mesh": d["mesh"] | {"tp": 2}}, "mesh.tp"),
        (lambda d: d | {"mesh": d["mesh"] | {"tensor_parallel_degree": 0}}, "tensor_parallel_degree"),
        (lambda d: {k: v for k, v in d.items() if k != "predicted"}, "predicted"),
        (lambda d: [1, 2], "no tpplan plan"),
        (lambda d: {"a": 1}, "no tpplan plan"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place(text: str, spoil, said: str) -> None:
    with pytest.raises(PlanFileError) as caught:
        Plan.parse(json.dumps(spoil(json.loads(text))), "p.json")
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) <= 2


def test_a_truncated_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError, match="damaged or truncated"):
        Plan.parse(text[: len(text) // 2])


def test_a_file_that_is_no_plan_is_never_overwritten(text: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": true}')
    with pytest.raises(PlanFileError, match="left as it is"):
        Plan.parse(text).save(notes)
    assert notes.read_text() == '{"mine": true}'


def test_save_replaces_a_plan_in_one_step(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan.parse(text)
    plan.save(path)
    plan.save(path)
    assert Plan.load(path) == plan
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_missing_plan_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="tpplan suggest"):
        Plan.load(tmp_path / "none.json")


def test_save_into_a_missing_folder(text: str, tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="no folder"):
        Plan.parse(text).save(tmp_path / "x" / "plan.json")
