"""Price stored runs of run_layouts.py with today's cost model, beside what was measured: a Markdown table.

    python benchmarks/repredict.py benchmarks/results/llama_1b_2xh200.json examples/llama_1b --hardware h200-sxm

Nothing runs; each run's layout is pinned and planned again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from tpplan.planner.suggest import suggest_in_detail

SKIPPED = 4  # steps of warm-up
_AXES = {
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
}


def pins(run: dict[str, Any]) -> list[str]:
    """What fixes the layout of a stored run."""
    fixed = [f"{axis}={run['mesh'][name]}" for axis, name in _AXES.items()]
    fixed.append(f"microbatch_size={run['batch']['microbatch_size']}")
    if run["mesh"]["pipeline_parallel_degree"] > 1:
        fixed.append(f"schedule={run['schedule']['name']}")
    if run["mesh"]["tensor_parallel_degree"] > 1:  # runs without the field are older than sequence parallelism
        fixed.append(f"sequence_parallel={'on' if run.get('sequence_parallel') else 'off'}")
    asked = [] if run["layout"] == "planner's choice" else run["layout"].split(",")
    fixed += [pin for pin in asked if pin.split("=")[0] in ("zero_stage", "recompute")]
    if not any(pin.startswith("recompute") for pin in fixed):
        modes = {mode for stage in run["recompute"] for mode in stage.values()}
        fixed.append(f"recompute={modes.pop() if len(modes) == 1 else 'none'}")
    return fixed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("target")
    parser.add_argument("--hardware", required=True)
    given = parser.parse_args()
    stored = json.loads(given.results.read_text())
    print("| layout | step predicted | measured | error | peak memory predicted | measured | error |")
    print("|---|---|---|---|---|---|---|")
    for run in stored["runs"]:
        if not run.get("steps"):
            continue
        batch = run["batch"]
        plan = suggest_in_detail(
            given.target,
            gpus=math.prod(run["mesh"].values()),
            hardware=given.hardware,
            seq_len=batch["sequence_length"],
            global_batch=batch["global_batch"],
            fix=pins(run),
        ).plan
        step = statistics.median(s["step_time_s"] for s in run["steps"][SKIPPED:])
        memory = max(s["peak_memory_bytes"] for s in run["steps"]) / 2**30
        expected = max(plan.predicted.peak_memory_bytes) / 2**30
        shape = f"{batch['microbatches']} x {batch['microbatch_size']}"
        print(
            f"| {', '.join(pins(run)[:4])}; {shape} | {plan.predicted.step_time_s * 1e3:.0f} ms | {step * 1e3:.0f} ms"
            f" | {plan.predicted.step_time_s / step - 1:+.1%} | {expected:.1f} GiB | {memory:.1f} GiB"
            f" | {expected / memory - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
