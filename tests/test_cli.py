"""The command line's contract: exit codes, one- or two-line errors with a remedy, JSON and nothing else on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
NANOGPT = str(ROOT / "examples" / "nanogpt.py")
TINY = [
    *("--model-arg", "n_layer=2", "--model-arg", "n_embd=64", "--model-arg", "n_head=4"),
    *("--model-arg", "vocab_size=128", "--model-arg", "block_size=64", "--seq-len", "64"),
]


def tpplan(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpplan", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or "/", env=env, timeout=300, check=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the command line in this process (no new interpreter): returns (exit code, stdout, stderr)."""
    from tpplan import cli

    monkeypatch.chdir(tmp_path)

    def invoke(*args: str) -> tuple[int, str, str]:
        def body() -> None:
            monkeypatch.setattr(sys, "argv", ["tpplan", *args])
            cli.main()

        import click

        command = click.Command("tpplan", callback=lambda: body())
        result = CliRunner().invoke(command, [], catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    return invoke


def check_error(outcome: tuple[int, str, str], code: int, *said: str) -> None:
    exit_code, out, err = outcome
    assert exit_code == code, err
    assert out == ""
    assert "Traceback" not in err
    message = err[err.index("rror") - 1 :].strip().splitlines()
    assert 1 <= len(message) <= 5, err
    for text in said:
        assert text in err


def test_help_is_fast() -> None:
    outcome = subprocess.run([sys.executable, "-X", "importtime", "-m", "tpplan", "--help"], capture_output=True)
    assert outcome.returncode == 0
    imported = {line.rpartition(b"|")[2].strip() for line in outcome.stderr.splitlines()}
    assert b"click" in imported
    assert not imported & {b"torch", b"numpy", b"pandas", b"networkx", b"pulp", b"pydantic"}


def test_json_is_the_plan_and_nothing_else(run, tmp_path: Path) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "4", "--format", "json")
    assert code == 0
    plan = json.loads(out)
    assert plan["schema_version"] == 1
    mesh = plan["mesh"]
    world = 1
    for axis in ("pipeline", "data_parallel_replicate", "data_parallel_shard", "context", "tensor"):
        world *= mesh[f"{axis}_degree" if axis.startswith("data") else f"{axis}_parallel_degree"]
    assert world == 4
    assert os.listdir(tmp_path) == []


def test_suggest_is_deterministic(run) -> None:
    args = ("suggest", NANOGPT, *TINY, "--gpus", "4", "--format", "json")
    first, second = (json.loads(run(*args)[1]) for _ in range(2))
    for plan in (first, second):
        assert sum(plan["solver"].pop("seconds").values()) > 0
        plan["solver"].pop("wall_s")
    assert first == second


def test_the_number_of_workers_changes_nothing(run) -> None:
    plans = []
    for workers in ("1", "2"):
        args = ("--gpus", "4", "--global-batch", "16", "--format", "json", "--workers", workers)
        plan = json.loads(run("suggest", NANOGPT, *TINY, *args)[1])
        plans.append({**plan, "solver": {k: v for k, v in plan["solver"].items() if k not in ("seconds", "wall_s")}})
    assert plans[0] == plans[1]


def test_a_ranking_is_shown_and_kept(run, tmp_path: Path) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "4", "--top", "3")
    assert code == 0
    assert "Layouts (> this plan" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    meshes = [plan["mesh"], *(row["mesh"] for row in plan["alternatives"])]
    degrees = {tuple(v for k, v in mesh.items() if k != "order") for mesh in meshes}
    assert len(degrees) == len(meshes) == 3
    pins = [part for pin in plan["alternatives"][1]["fix"] for part in ("--fix", pin)]
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "4", "--format", "json", *pins)
    assert json.loads(out)["mesh"] == plan["alternatives"][1]["mesh"]


def test_the_certificate_and_the_space_are_shown(run) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "2", "--forbid", "schedule=interleaved")
    assert code == 0
    for text in ("Proof: step time is at least", "combinations", "Seconds:", "not searched:", "schedule!=interleaved"):
        assert text in out


def test_an_audit_is_told_and_the_programme_written(run, tmp_path: Path) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "2", "--audit", "--dump-lp", "plan.lp")
    assert code == 0
    assert "pruned combinations (all) solved again without bounds, none beats the proven bound" in " ".join(out.split())
    assert "Subject To" in (tmp_path / "plan.lp").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--objective", "cost", "--price", "2"], "No plan costs less than"),
        (["--objective", "memory"], "No plan of the space needs less than"),
        (["--objective", "gpus", "--target-step-time", "100"], "With 1 GPU a step takes"),
    ],
)
def test_other_objectives_say_what_they_prove(run, tmp_path: Path, args: list[str], said: str) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "2", "--global-batch", "8", *args)
    assert code == 0
    assert said in out
    assert json.loads((tmp_path / "plan.json").read_text())["solver"]["objective"] == args[1]


def test_text_mode_writes_the_plan_and_names_the_next_step(run, tmp_path: Path) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "2")
    assert code == 0
    assert "tpplan run plan.json" in out
    assert json.loads((tmp_path / "plan.json").read_text())["hardware"]["gpus"] == 2


def test_one_gpu_works(run) -> None:
    code, out, _ = run("suggest", NANOGPT, *TINY, "--gpus", "1", "--format", "json")
    assert code == 0
    assert json.loads(out)["solver"]["gap"] <= 0.005


def test_trace_prints_the_graph_as_json(run) -> None:
    code, out, _ = run("trace", NANOGPT, *TINY, "--format", "json", "--batch-size", "2")
    assert code == 0
    keys = {"parameters", "buffers", "flops_forward", "flops_backward", "saved_bytes", "layers", "classes", "opaque"}
    assert keys <= set(json.loads(out))


def test_hardware_lists_the_profiles(run) -> None:
    code, out, _ = run("hardware", "--format", "json")
    assert code == 0
    assert {"h100-sxm", "h200-sxm", "a100-sxm-80g", "cpu-gloo"} <= {row["name"] for row in json.loads(out)}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--gpus", "0"], 2, ["--gpus"]),
        (["--gpus", "-4"], 2, ["--gpus"]),
        (["--gpus", "12"], 2, ["do not fill nodes of 8", "--gpus 8 or 16"]),
        (["--gpus", "4", "--hardware", "h100-smx"], 2, ["h100-sxm"]),
        (["--gpus", "4", "--hardware", "none.json"], 2, ["none.json"]),
        (["--gpus", "4", "--fix", "tp=3"], 3, ["tp=3"]),
        (["--gpus", "4", "--fix", "pp=3"], 3, ["pp=3"]),
        (["--gpus", "4", "--fix", "heads=4"], 2, ["Axes"]),
        (["--gpus", "4", "--memory-limit", "0.5"], 3, ["GiB", "stage", "--memory-limit 2 ", "Tried in vain"]),
        (["--gpus", "4", "--min", "pp=4", "--max", "pp=2"], 2, ["--min pp=4", "--max pp=2"]),
        (["--gpus", "4", "--forbid", "recompute=some"], 2, ["none, selective, full"]),
        (["--gpus", "4", "--fix", "layer:h.7=full"], 2, ["h.7", "transformer."]),
        (["--gpus", "4", "--pins", "none.toml"], 2, ["none.toml"]),
        (["--gpus", "4", "--memory-limit", "-1"], 2, ["--memory-limit"]),
        (["--gpus", "4", "--global-batch", "7", "--fix", "dp_shard=4"], 3, ["global batch of 7"]),
        (["--gpus", "4", "--global-batch", "0"], 2, ["--global-batch"]),
        (["--gpus", "4", "--model-arg", "n_layer"], 2, ["--model-arg"]),
        (["--gpus", "4", "-o", "missing/plan.json"], 2, ["no folder"]),
        (["--gpus", "4", "--time-limit", "0"], 2, ["--time-limit"]),
        (["--gpus", "4", "--objective", "gpus"], 2, ["--target-step-time"]),
        (["--gpus", "4", "--objective", "gpus", "--target-step-time", "1e-6"], 3, ["No number of GPUs up to 4"]),
    ],
)
def test_bad_input_is_told_in_a_line(run, tmp_path: Path, args: list[str], code: int, said: list[str]) -> None:
    check_error(run("suggest", NANOGPT, *TINY, *args), code, *said)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_no_plan_is_not_overwritten(run, tmp_path: Path) -> None:
    (tmp_path / "thesis.json").write_text("{}")
    check_error(run("suggest", NANOGPT, *TINY, "--gpus", "2", "-o", "thesis.json"), 2, "left as it is")
    assert (tmp_path / "thesis.json").read_text() == "{}"


def test_missing_target_has_a_near_miss(run) -> None:
    check_error(run("suggest", str(ROOT / "examples" / "nanogtp.py"), "--gpus", "2"), 2, "nanogpt.py")


def test_plan_of_the_future_and_foreign_files(run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema_version": 99, "mesh": {}, "solver": {}}')
    check_error(run("run", "a.json"), 2, "Upgrade tpplan")
    (tmp_path / "b.json").write_text('{"x": 1')
    check_error(run("run", "b.json"), 2, "damaged")
    (tmp_path / "c.json").write_text('{"x": 1}')
    check_error(run("run", "c.json"), 2, "no tpplan plan")
    check_error(run("run", "d.json"), 2, "No plan")
