"""Cold, whole-process planning times with their proven gaps, and what the plans gain over layouts without a planner.

    python benchmarks/planning.py                     # every row, results after each
    python benchmarks/planning.py llama3 --only-new   # rows whose name contains "llama3" and that have no result yet
    python benchmarks/planning.py --write             # only write docs/planning.md from the results

Each row is one `tpplan suggest` process, started cold: interpreter, imports, trace, search, plan.json. Rows run one
after another. The processor seconds of a row count its worker processes too; on a machine with other work they say
more than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from planning_cases.cases import ROOT, ROWS, Row
from planning_report import table, write_page

RESULTS = ROOT / "benchmarks" / "results" / "planning.json"


def main() -> None:
    """Run the rows that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of row names; all rows by default")
    parser.add_argument("--only-new", action="store_true", help="leave out rows that have a result without an error")
    parser.add_argument("--write", action="store_true", help="run nothing, write docs/planning.md")
    parser.add_argument("--slack", type=float, default=2.0, help="give a row up after its promise so many times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results = load(given.out)
    if not given.write:
        rows = [row for row in ROWS if not given.names or any(name in row.name for name in given.names)]
        if not rows:
            parser.error(f"no such row; there are {', '.join(row.name for row in ROWS)}")
        for row in rows:
            if given.only_new and "error" not in results["rows"].get(row.name, {"error": ""}):
                continue
            results["rows"][row.name] = measured = measure(row, given.slack)
            results["machine"] = machine()
            save(results, given.out)
            print(f"{row.name}: {measured.get('error') or summary(measured)}", flush=True)
    print(table(results, ROWS))
    if given.write:
        write_page(results, ROWS)


def load(path: Path) -> dict[str, Any]:
    """Earlier results, or empty ones."""
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": {}}


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results; a run that is stopped keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def measure(row: Row, slack: float) -> dict[str, Any]:
    """One row: the process, its seconds by part, its certificate, its plan and the baselines."""
    result: dict[str, Any] = {
        "command": " ".join(["tpplan", *row.command()]),
        "load_before": os.getloadavg()[0],
    }
    limit_s = slack * row.promised_s + 60
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "tpplan", *row.command(f"{ROOT}/"), "-o", str(path)]
        before_s, begin = processor_s(), time.perf_counter()
        try:
            # In a folder of its own: the repository's root is the package itself, not a place to import from.
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {**result, "error": f"stopped after {limit_s:.0f} s"}
        result |= {"wall_s": time.perf_counter() - begin, "processor_s": processor_s() - before_s}
        if done.returncode:
            return {**result, "error": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
        plan = json.loads(path.read_text())
    return result | what_counts(plan)


def processor_s() -> float:
    """Processor seconds of all processes started so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def what_counts(plan: dict[str, Any]) -> dict[str, Any]:
    """Of a plan, what the table and the page show."""
    stages = plan["stages"]
    modes = [mode for stage in stages for mode in stage["recompute"].values()]
    return {
        "solver": {key: value for key, value in plan["solver"].items() if key != "space"},
        "space": plan["solver"]["space"],
        "mesh": plan["mesh"],
        "batch": plan["batch"],
        "schedule": plan["schedule"],
        "sharding": plan["sharding"],
        "sequence_parallel": plan["tensor_parallel"]["sequence_parallel"],
        "units_by_stage": [len(stage["modules"]) for stage in stages],
        "recompute": {mode: modes.count(mode) for mode in ("selective", "full") if mode in modes},
        "step_time_s": plan["predicted"]["step_time_s"],
        "mfu": plan["predicted"]["mfu"],
        "baselines": plan["baselines"],
        "model": {key: plan["model"][key] for key in ("name", "parameters", "layers", "classes")},
    }


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    name = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{package: version(package) for package in ("tpplan", "torch", "highspy", "pulp", "numpy")},
    }


def summary(measured: dict[str, Any]) -> str:
    """One line for the console."""
    solver = measured["solver"]
    return (
        f"{measured['wall_s']:.1f} s wall, {measured['processor_s']:.1f} s processor, gap {solver['gap']:.2e} "
        f"({solver['status']}), {solver['candidates']} combinations, {solver['solved']} solved"
    )


if __name__ == "__main__":
    main()
