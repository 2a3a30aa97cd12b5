"""Run the whole zoo: trace, plan and check every member, and execute the small ones on gloo processes.

    python benchmarks/zoo/run.py --jobs 2                 # everything; members that are done on this tree are kept
    python benchmarks/zoo/run.py gpt2 t5 --no-execute     # some

Members from torchvision and timm need these two packages, beside a CPU build of torch in a folder of their own
(transformers would import a torchvision that lacks its operators):

    pip install --no-deps --target .venv/vision torchvision==0.28.0 timm

Each member runs in processes of its own, so that one that crashes or hangs costs only itself. Results go to
benchmarks/results/zoo.json as they come; `report.py` writes docs/zoo.md from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from member import Member
from members import MEMBERS, by_name

HERE = Path(__file__).resolve().parent

RESULTS = HERE.parent / "results" / "zoo.json"
CHECK_TIMEOUT_S, EXECUTE_TIMEOUT_S = 600, 400
LAYOUTS = ("tp=2", "pp=2")


def last_json_lines(command: Sequence[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """JSON objects that a command prints, a line each, and what went wrong ("" if it ended well)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
        failure = "" if process.returncode == 0 else f"exit {process.returncode}: {err[-800:]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        failure = f"still running after {timeout_s:.0f} s"
    found = []
    for line in out.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found, failure


def run_member(member: Member, execute: bool) -> dict[str, Any]:
    """Everything about one member."""
    started = time.monotonic()
    found, failure = last_json_lines([sys.executable, str(HERE / "check.py"), member.name], CHECK_TIMEOUT_S)
    result = found[-1] if found else {"name": member.name, "family": member.family, "library": member.library}
    result.setdefault("errors", {})
    if failure:
        result["errors"]["check"] = failure
    if execute and member.executed:
        with tempfile.TemporaryDirectory() as folder:
            spec, arguments = member.target(Path(folder), small=True)
            command = [sys.executable, str(HERE / "execute.py"), spec, "--seq-len", str(member.small_seq)]
            for layout in LAYOUTS:
                command += ["--layout", layout]
            for key, value in arguments.items():
                command += ["--model-arg", f"{key}={value}"]
            for text in member.inputs:
                command += ["--input", text]
            runs, failure = last_json_lines(command, EXECUTE_TIMEOUT_S)
        result["runs"] = {run["layout"]: run for run in runs}
        if failure:
            result["errors"]["execute"] = failure
    elif not member.executed:
        result["why_not_executed"] = member.why_not
    return result | {"wall_s": round(time.monotonic() - started, 1)}


def environment() -> dict[str, Any]:
    """Machine, versions and tree of this run."""
    import torch
    import transformers

    tree = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "tree": os.environ.get("TPPLAN_TREE") or tree.stdout.strip(),
    }


def main() -> None:
    """Run the zoo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="members (all of them by default)")
    parser.add_argument("--jobs", type=int, default=2, help="members at a time")
    parser.add_argument("--no-execute", action="store_true", help="leave the gloo runs out")
    parser.add_argument("--again", action="store_true", help="run members that have a result on this tree too")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no member after so many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    members = [by_name(name) for name in given.names] or list(MEMBERS)
    where = environment()
    before = json.loads(given.out.read_text()) if given.out.exists() else {"environments": {}, "members": {}}
    known = before["members"]
    environments = {**before["environments"], where["tree"]: where}
    if not given.again:
        members = [m for m in members if known.get(m.name, {}).get("tree") != where["tree"]]
    lock, started = threading.Lock(), time.monotonic()

    def one(member: Member) -> None:
        if time.monotonic() - started > given.limit_s:
            return
        result = run_member(member, not given.no_execute) | {"tree": where["tree"]}
        with lock:
            known[member.name] = result
            temporary = given.out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"environments": environments, "members": known}, indent=1, default=str))
            temporary.replace(given.out)
            runs = [
                f"{k}: {'equal' if r['equal'] else r['error'] or 'differs'}" for k, r in result.get("runs", {}).items()
            ]
            print(member.name, f"{result['wall_s']} s", result["errors"] or "ok", *runs, flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, members))


if __name__ == "__main__":
    main()
