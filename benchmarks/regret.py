"""Measured regret: run every layout that fits on this machine's GPUs, and compare the planner's choice with the best.

    python benchmarks/regret.py plan out/regret --gpus 4 --hardware h100-sxm     # needs no GPU
    python benchmarks/regret.py run out/regret --results benchmarks/results/regret_4xh100.json --limit-s 540
    python benchmarks/regret.py report benchmarks/results/regret_4xh100.json
    python benchmarks/regret.py dry out/dry                                      # all three, tiny, on CPU processes

`run` goes through the layouts in order of predicted step time, the planner's choice first, writes after each, and
leaves out what has a result: call it again to go on. A layout that fails or hangs costs its own time only. The choice
is measured a second time at the end, to show how much two runs of one plan differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from planning_cases.cases import ROOT
from planning_report import degrees
from regret_layouts import DRY, WORKLOADS, write_plans

LIST = "layouts.json"


def main() -> None:
    """Plan, run, report, or all three in small."""
    given = arguments()
    for name in ("folder", "results"):  # planning changes the working directory
        if getattr(given, name, None) is not None:
            setattr(given, name, getattr(given, name).resolve())
    if given.command == "report":
        print(report(json.loads(given.results.read_text())))
        return
    if given.command in ("plan", "dry"):
        workloads = DRY if given.command == "dry" else [w for w in WORKLOADS if w.name in given.models]
        folder = given.folder
        listed = [row for w in workloads for row in write_plans(w, given.gpus, given.hardware, folder, given.deep)]
        (folder / LIST).write_text(json.dumps(listed, indent=1))
    if given.command in ("run", "dry"):
        results = given.results or given.folder / "results.json"
        run_all(given, results)
        print(report(json.loads(results.read_text())))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("plan", "run", "dry"):
        sub = commands.add_parser(name)
        sub.add_argument("folder", type=Path, help="folder of the plans")
        if name != "run":
            sub.add_argument("--gpus", type=int, default=2)
            sub.add_argument("--hardware", default="cpu-gloo" if name == "dry" else "h100-sxm")
            sub.add_argument("--deep", action="store_true", help="also microbatch sizes, recompute, ZeRO-3")
            sub.add_argument("--models", nargs="+", default=[w.name for w in WORKLOADS])
        if name != "plan":
            sub.add_argument("--results", type=Path)
            sub.add_argument("--steps", type=int, default=6 if name == "dry" else 12)
            sub.add_argument("--skip", type=int, default=2 if name == "dry" else 4, help="steps of warm-up")
            sub.add_argument("--layout-s", type=float, default=150, help="a layout is stopped after so many seconds")
            sub.add_argument("--limit-s", type=float, default=float("inf"), help="start no layout after so many")
            sub.add_argument("--again", action="store_true", help="repeat layouts that failed")
            sub.add_argument("--device", default="cpu" if name == "dry" else "cuda")
            sub.add_argument("--run-arg", action="append", default=[], help="passed on to `tpplan run`")
    commands.add_parser("report").add_argument("results", type=Path)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Devices and versions."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in ("tpplan", "transformers")},
        "cores": len(os.sched_getaffinity(0)),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(0),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def run_all(given: argparse.Namespace, path: Path) -> None:
    """Run what has no result yet; results are written after each layout.

    Raises
    ------
    SystemExit
        If earlier results are from another machine or other versions.
    """
    started, here = time.monotonic(), machine()
    results = json.loads(path.read_text()) if path.exists() else {"machine": here, "runs": {}, "steps": given.steps}
    if results["machine"] != here:
        sys.exit(f"{path} is from another machine or other versions: {results['machine']}; choose another --results.")
    listed = json.loads((given.folder / LIST).read_text())
    results["layouts"] = listed
    for file, name in order(listed):
        earlier = results["runs"].get(name)
        if earlier is not None and not (given.again and "step_s" not in earlier):
            continue
        if time.monotonic() - started > given.limit_s:
            print("out of time; call again to go on", flush=True)
            return
        results["runs"][name] = row = run_one(given, given.folder / file)
        results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
        said = f"{row['step_s'] * 1e3:.1f} ms" if "step_s" in row else f"exit {row['exit']}: {row['output'][-300:]}"
        print(f"{name} {words(row)}: predicted {row['predicted_s'] * 1e3:.1f} ms, measured {said}", flush=True)


def order(listed: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(file, name of the run): per model the choice, then the others from fast to slow, then the choice again."""
    found: list[tuple[str, str]] = []
    for model in dict.fromkeys(row["model"] for row in listed):
        rows = [row for row in listed if row["model"] == model and "file" in row]
        if rows:
            choice = rows[0]["file"]
            others = sorted(rows[1:], key=lambda row: row["predicted_s"])
            found += [(choice, choice), *((row["file"], row["file"]) for row in others), (choice, f"{choice} again")]
    return found


def run_one(given: argparse.Namespace, plan_path: Path) -> dict[str, Any]:
    """Run one plan; its exit code, its steps and, if it ended well, its median step."""
    plan = json.loads(plan_path.read_text())
    row: dict[str, Any] = {key: plan[key] for key in ("mesh", "batch", "schedule", "sharding")}
    row["recompute"] = [stage["recompute"] for stage in plan["stages"]]
    row |= {
        "predicted_s": plan["predicted"]["step_time_s"],
        "predicted_peak_bytes": max(plan["predicted"]["peak_memory_bytes"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        metrics, log = Path(folder) / "metrics.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "tpplan", "run", str(plan_path), "--steps", str(given.steps)]
        command += ["--metrics", str(metrics), "--device", given.device, *given.run_arg]
        begin = time.perf_counter()
        row["exit"] = call(command, log, given.layout_s)
        row["run_s"] = time.perf_counter() - begin
        row["output"] = log.read_text(errors="replace")[-2000:]
        steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    times = [step["step_time_s"] for step in steps]
    row["step_times_s"] = times
    if row["exit"] == 0 and len(times) > given.skip:
        row["step_s"] = statistics.median(times[given.skip :])
        row["peak_bytes"] = max(step["peak_memory_bytes"] for step in steps)
        row["losses"] = [steps[0]["loss"], steps[-1]["loss"]]
    return row


def call(command: list[str], log: Path, limit_s: float) -> int:
    """Exit code of a command; 124 when it ran past its limit and was interrupted, then killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # tpplan ends its torchrun, which ends the workers
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return 124


def words(row: dict[str, Any]) -> str:
    """A layout in words."""
    modes = [mode for stage in row["recompute"] for mode in stage.values()]
    schedule, batch = row["schedule"], row["batch"]
    parts = [degrees(row["mesh"])]
    if row["mesh"]["pipeline_parallel_degree"] > 1:
        name = schedule["name"]
        parts.append(f"{name} v={schedule['virtual_stages']}" if schedule["virtual_stages"] > 1 else name)
    parts += [f"{batch['microbatches']} x {batch['microbatch_size']}", f"ZeRO-{row['sharding']['zero_stage']}"]
    return ", ".join([*parts, f"recompute in {len(modes)} units" if modes else "no recompute"])


def report(results: dict[str, Any]) -> str:
    """Per model: the regret, and every layout, predicted against measured."""
    said = [" ".join(f"{key} {value}" for key, value in results["machine"].items())]
    layouts = results["layouts"]
    for model in dict.fromkeys(row["model"] for row in layouts):
        runs = {name: run for name, run in results["runs"].items() if name.startswith(f"{model}-")}
        measured = {name: run for name, run in runs.items() if "step_s" in run and not name.endswith("again")}
        choice = next((row["file"] for row in layouts if row["model"] == model and "file" in row), None)
        left_out = sum("left_out" in row for row in layouts if row["model"] == model)
        said.append(f"\n## {model}\n")
        if choice in measured:
            best = min(measured, key=lambda name: measured[name]["step_s"])
            ratio = measured[choice]["step_s"] / measured[best]["step_s"]
            twice = runs.get(f"{choice} again", {}).get("step_s")
            spread = f"; the choice again: {twice * 1e3:.1f} ms" if twice else ""
            fastest = f"{words(measured[best])}: {measured[best]['step_s'] * 1e3:.1f} ms"
            said.append(
                f"Regret {ratio:.3f}: the choice {measured[choice]['step_s'] * 1e3:.1f} ms, "
                f"the best of {len(measured)} ({fastest}){spread}. "
                f"{left_out} combinations of pins have no plan.\n"
            )
        if note := results.get("notes", {}).get(model):
            said.append(f"{note}\n")
        said += [
            "| layout | step predicted | measured | error | peak predicted | measured |",
            "|---|---|---|---|---|---|",
        ]
        for name in sorted(runs, key=lambda name: runs[name].get("step_s", float("inf"))):
            said.append(line(runs[name], " (the choice)" if name.startswith(str(choice)) else ""))
    return "\n".join(said)


def line(run: dict[str, Any], mark: str) -> str:
    """One row of the report."""
    head = f"| {words(run)}{mark} | {run['predicted_s'] * 1e3:.1f} ms"
    if "step_s" not in run:
        return f"{head} | failed, exit {run['exit']} | | | |"
    return (
        f"{head} | {run['step_s'] * 1e3:.1f} ms | {run['predicted_s'] / run['step_s'] - 1:+.1%} "
        f"| {run['predicted_peak_bytes'] / 2**30:.1f} GiB | {run['peak_bytes'] / 2**30:.1f} GiB |"
    )


if __name__ == "__main__":
    main()
