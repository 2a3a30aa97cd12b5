"""`tpplan run` from outside: a short run and its metrics, and every failure as one readable error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from plans import EXAMPLES, write_plan
from tpplan.errors import EnvironmentFailure, PlanFileError, UsageError
from tpplan.planner.plan import Plan
from tpplan.runtime.launch import run_plan

ARGS = {"n_layer": "2", "n_head": "2", "n_embd": "16", "block_size": "16", "vocab_size": "50"}
UNITS = [*(f"transformer.{u}" for u in ("wte", "wpe", "drop", "h.0", "h.1", "ln_f")), "lm_head"]


def tiny_plan(folder: Path, **options) -> Path:
    """A plan of a tiny nanogpt for two processes."""
    plan = write_plan(str(EXAMPLES / "nanogpt.py"), [UNITS], model_args=ARGS, sequence_length=8, dp_shard=2, **options)
    plan.save(folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.slow
def test_a_run_prints_progress_and_writes_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert run_plan(tiny_plan(tmp_path), steps=3, device="cpu", metrics=metrics, clip_grad_norm=1.0) == 0
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(3 < record["loss"] < 5 and record["grad_norm"] > 0 for record in records)
    assert all(record["step_time_s"] > 0 and record["peak_memory_bytes"] > 2**20 for record in records)
    out = capfd.readouterr().out
    assert "same weight for every microbatch" in out
    assert "clipped at 1" in out
    assert "measured/predicted" in out


@pytest.mark.slow
def test_a_plan_for_another_model_is_named_by_its_first_stranger(tmp_path: Path) -> None:
    path = tiny_plan(tmp_path)
    path.write_text(path.read_text().replace("transformer.h.1", "transformer.h.7"))
    with pytest.raises(PlanFileError, match=r"no module transformer\.h\.7"):
        run_plan(path, steps=1, device="cpu")


@pytest.mark.slow
def test_an_interrupt_ends_every_process(tmp_path: Path) -> None:
    # A shell that runs this suite in the background ignores SIGINT, and so would its children.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from tpplan.runtime.launch import run_plan; sys.exit(run_plan({str(tiny_plan(tmp_path))!r}, "
    code += "steps=10**6, device='cpu'))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two workers
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert len(gone) == len(family), alive


@pytest.mark.slow
def test_workers_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    code = f"from tpplan.runtime.launch import run_plan; run_plan({str(tiny_plan(tmp_path))!r}, "
    code += "steps=10**6, device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert len(gone) == len(family), alive


def test_a_world_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(EnvironmentFailure, match="for 2 processes, but torchrun started 3"):
        run_plan(tiny_plan(tmp_path), device="cpu")


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFailure, match=f"Port {port} cannot be used"):
            run_plan(tiny_plan(tmp_path), device="cpu", master_port=port)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init_from": "nowhere"}, "is no folder"), ({"metrics": "nowhere/m.jsonl"}, "does not exist")],
)
def test_paths_are_checked_before_anything_starts(tmp_path: Path, options, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UsageError, match=message):
        run_plan(tiny_plan(tmp_path), device="cpu", **options)
    assert time.monotonic() - begin < 2


def test_a_plan_for_estimates_only_is_refused(tmp_path: Path) -> None:
    from tpplan.runtime.train import check_runnable

    plan = Plan.load(tiny_plan(tmp_path))
    check_runnable(plan)
    with pytest.raises(UsageError, match="ZeRO 1"):
        check_runnable(plan.model_copy(update={"sharding": plan.sharding.model_copy(update={"zero_stage": 1})}))


def test_no_gpu_is_said_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from tpplan.runtime.api import start_process_group

    with pytest.raises(EnvironmentFailure, match="no GPU"):
        start_process_group("cuda")
    assert os.environ.get("RANK") is None
