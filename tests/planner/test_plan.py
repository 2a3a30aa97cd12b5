"""plan.json: strict to read, atomic to write, and loadable for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from tpplan.errors import PlanFileError
from tpplan.planner.evaluate import evaluate
from tpplan.planner.mesh import Mesh
from tpplan.planner.plan import Plan
from tpplan.planner.suggest import suggest, suggest_in_detail

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "nanogpt_16.plan.json"
SCHEMA = ROOT / "docs" / "plan.schema.json"


@pytest.fixture
def text() -> str:
    return GOLDEN.read_text()


def test_suggest_still_gives_the_golden_plan(rewrite_golden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = suggest(
        "examples/nanogpt.py", gpus=16, hardware="h100-sxm", seq_len=1024, global_batch=64, fix=["tp=2", "pp=2"]
    )
    if rewrite_golden:
        GOLDEN.parent.mkdir(exist_ok=True)
        solver = plan.solver.model_copy(update={"wall_s": 0.0})
        GOLDEN.write_text(plan.model_copy(update={"solver": solver}).to_json())
        SCHEMA.write_text(json.dumps(Plan.model_json_schema(), indent=2) + "\n")
    golden = Plan.load(GOLDEN)
    for section in (
        "mesh",
        "batch",
        "schedule",
        "sharding",
        "stages",
        "tensor_parallel",
        "parameters",
        "redistributes",
    ):
        assert getattr(plan, section) == getattr(golden, section), section
    assert plan.predicted.step_time_s == pytest.approx(golden.predicted.step_time_s, rel=1e-9)
    assert plan.predicted.peak_memory_bytes == golden.predicted.peak_memory_bytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plan_s_numbers_are_one_number(precision: str, tmp_path: Path) -> None:
    sizes = {"n_layer": "4", "n_embd": "64", "n_head": "4", "vocab_size": "128", "block_size": "64"}
    found = suggest_in_detail(str(ROOT / "examples/nanogpt.py"), gpus=8, hardware="h100-sxm", seq_len=64,
                              global_batch=32, precision=precision, model_args=sizes)  # fmt: skip
    plan, best = found.plan, found.result.best
    assert best is not None
    model = found.subject.costs(found.request)
    again = evaluate(model.problem(Mesh(*best.key)), best.assignment)
    plan.save(tmp_path / "plan.json")
    stored = Plan.load(tmp_path / "plan.json")
    assert again.step_time_s == plan.predicted.step_time_s == plan.solver.objective_s == stored.solver.objective_s
    assert sum(stored.predicted.breakdown_s.values()) == pytest.approx(stored.predicted.step_time_s, rel=1e-12)
    assert [sum(parts.values()) for parts in stored.predicted.memory_bytes] == stored.predicted.device_bytes
    assert max(stored.predicted.device_bytes) <= stored.hardware.memory_limit_bytes
    solver = stored.solver
    assert solver.gap == pytest.approx((solver.objective_s - solver.lower_bound_s) / solver.objective_s, abs=1e-12)
    assert solver.gap <= 0.005


def test_golden_plan_loads_and_writes_the_same_bytes(text: str) -> None:
    assert Plan.parse(text).to_json() == text


def test_golden_plan_is_valid_under_the_published_schema(text: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(json.loads(text), schema)


def test_published_schema_is_the_code_s() -> None:
    assert json.loads(SCHEMA.read_text()) == Plan.model_json_schema()


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
