"""Markdown tables from raw results: `python benchmarks/tables.py benchmarks/results/llama_1b_2xh200.json`."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

SKIP = 4  # steps of warm-up, as in run_layouts.py
SHORT = {
    "tensor_parallel": "tp",
    "pipeline_parallel": "pp",
    "data_parallel_replicate": "ddp",
    "data_parallel_shard": "fsdp",
}


def layout(run: dict) -> str:
    """A run's layout in words."""
    degrees = {SHORT.get(k.removesuffix("_degree"), k): v for k, v in run["mesh"].items() if v > 1}
    mesh = " x ".join(f"{axis}{n}" for axis, n in degrees.items()) or "one GPU"
    modes = sorted({mode for stage in run["recompute"] for mode in stage.values()})
    own = " (the planner's choice)" if run["layout"] == "planner's choice" else ""
    batch = f"{run['batch']['microbatches']} x {run['batch']['microbatch_size']}"
    return f"{mesh}, ZeRO-{run['sharding']['zero_stage']}, {batch}, recompute {', '.join(modes) or 'none'}{own}"


def runs_table(results: dict) -> str:
    """Predicted against measured, one row a run."""
    lines = [
        "| layout | step predicted | measured | error | peak memory predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        steps = run.get("steps", [])[SKIP:]
        if not steps:
            continue
        step = statistics.median(s["step_time_s"] for s in steps)
        peak = max(s["peak_memory_bytes"] for s in steps) / 2**30
        predicted, expected = run["predicted"]["step_time_s"], max(run["predicted"]["peak_memory_bytes"]) / 2**30
        lines.append(
            f"| {layout(run)} | {predicted * 1e3:.0f} ms | {step * 1e3:.0f} ms | {predicted / step - 1:+.1%} "
            f"| {expected:.1f} GiB | {peak:.1f} GiB | {expected / peak - 1:+.1%} |"
        )
    return "\n".join(lines)


def rows_table(rows: list[dict]) -> str:
    """Measured torchtitan rows: errors by group."""

    def group(row: dict) -> str:
        name = row["run_id"]
        kind = "tp" if "_tp" in name or "tp2" in name else "pp" if "_pp" in name else "one GPU, fsdp, ddp"
        return f"{kind}, {'compiled' if row['compile'] == '1' else 'eager'}"

    lines = ["| rows | count | step time: median error | median absolute | memory: median error | median absolute |"]
    lines.append("|---|---|---|---|---|---|")
    names = sorted({group(r) for r in rows})
    for name in [*names, "all"]:
        chosen = [r for r in rows if name in (group(r), "all")]
        cells = []
        for key in ("time_error", "memory_error"):
            errors = [r[key] for r in chosen]
            cells += [f"{statistics.median(errors):+.1%}", f"{statistics.median(map(abs, errors)):.1%}"]
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    data = json.loads(parser.parse_args().results.read_text())
    print(runs_table(data) if isinstance(data, dict) else rows_table(data))


if __name__ == "__main__":
    main()
