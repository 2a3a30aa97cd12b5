"""docs/planning.md and its tables from the results of planning.py, planning_scale.py and planning_exhaustive.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from planning_cases.cases import ROOT, Row

PAGE = ROOT / "docs" / "planning.md"
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / "benchmarks" / "planning_cases" / "peers.json"
SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "zb": "zero-bubble"}
SHORT = {
    "tensor_parallel_degree": "tp",
    "pipeline_parallel_degree": "pp",
    "data_parallel_replicate_degree": "ddp",
    "data_parallel_shard_degree": "fsdp",
}


def degrees(mesh: dict[str, Any]) -> str:
    """A mesh in words: "tp4 x pp8 x fsdp32"."""
    parts = [f"{short}{mesh[name]}" for name, short in SHORT.items() if mesh[name] > 1]
    return " x ".join(parts) or "one GPU"


def layout(row: dict[str, Any]) -> str:
    """A plan in words: degrees, microbatches, schedule, ZeRO level, recomputation."""
    batch, schedule, mesh = row["batch"], row["schedule"], row["mesh"]
    words = [degrees(mesh) + (", sequence parallel" if row["sequence_parallel"] else "")]
    words.append(f"{batch['microbatches']} x {batch['microbatch_size']}")
    if mesh["pipeline_parallel_degree"] > 1:
        name = schedule["name"]
        words.append(SCHEDULES.get(name, f"interleaved v={schedule['virtual_stages']}"))
    if mesh["data_parallel_shard_degree"] > 1:
        words.append(f"ZeRO-{row['sharding']['zero_stage']}")
    modes = ", ".join(f"{mode} in {count}" for mode, count in row["recompute"].items())
    return ", ".join([*words, f"recompute {modes or 'none'}"])


def seconds(row: dict[str, Any]) -> list[str]:
    """Cells: imports, trace, search, rest of the process (wall); bounds, ILPs, simulation (all worker processes)."""
    parts = row["solver"]["seconds"]
    walls = [parts[name] for name in ("imports", "trace", "search")]
    work = [parts.get(f"search: {name}", 0.0) for name in ("bounds", "ilps", "simulation")]
    return [f"{part:.1f}" for part in (*walls, row["wall_s"] - sum(walls), *work)]


def table(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """Time and gap of each row against what was promised."""
    lines = [
        "| case | flags | promised | wall s | of it imports | trace | search | rest | bounds | ILPs | simulation "
        "| processor s | load before | gap asked | gap proven | combinations | solved |",
        "|" + "---|" * 17,
    ]
    for row in rows:
        found = results["rows"].get(row.name)
        if found is None:
            continue
        flags = f"`{' '.join(row.flags)}`" if row.flags else ""
        head = f"| {row.case.title} | {flags} | {row.promised_s:.0f} s"
        if "error" in found:
            lines.append(f"{head} | {found['error'].splitlines()[0]} {'| ' * 13}|")
            continue
        solver = found["solver"]
        late = "" if found["wall_s"] <= row.promised_s else " (late)"
        short = "" if solver["gap"] <= row.gap * (1 + 1e-9) else " (open)"
        cells = [
            f"{found['wall_s']:.1f}{late}",
            *seconds(found),
            f"{found['processor_s']:.1f}",
            f"{found['load_before']:.1f}",
        ]
        cells += [
            f"{row.gap:g}",
            f"{solver['gap']:.1e}{short}",
            f"{solver['candidates']:,}",
            str(solver["solved"]),
        ]
        lines.append(f"{head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pruned(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """How the combinations of each row were dealt with."""
    chosen = [(row, results["rows"].get(row.name, {})) for row in rows]
    chosen = [(row, found) for row, found in chosen if "solver" in found]
    names = list(dict.fromkeys(name for _, found in chosen for name in found["solver"]["pruned"]))
    lines = [f"| row | combinations | {' | '.join(names)} | solved |", "|" + "---|" * (3 + len(names))]
    for row, found in chosen:
        solver = found["solver"]
        counts = [f"{solver['pruned'].get(name, 0):,}" for name in names]
        lines.append(f"| {row.name} | {solver['candidates']:,} | {' | '.join(counts)} | {solver['solved']} |")
    return "\n".join(lines)


def gains(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """The chosen plans against the baselines, as the cost model predicts both."""
    lines = ["| row | plan | step | MFU | rule of thumb | plain FSDP |", "|---|---|---|---|---|---|"]
    for row in rows:
        found = results["rows"].get(row.name, {})
        if "solver" not in found:
            continue
        step = found["step_time_s"]
        cells = [against(found["baselines"], name, step) for name in ("rule of thumb", "plain FSDP")]
        lines.append(f"| {row.name} | {layout(found)} | {step:.4g} s | {found['mfu']:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against(baselines: Sequence[dict[str, Any]], name: str, step_s: float) -> str:
    """A baseline's layout, step, and how much faster the plan is."""
    for baseline in baselines:
        if baseline["name"] == name:
            where = f"{degrees(baseline['mesh'])}, microbatch {baseline['microbatch_size']}"
            if baseline["step_time_s"] is None:
                return f"{where}: does not fit"
            ratio = baseline["step_time_s"] / step_s
            return f"{where}: {baseline['step_time_s']:.4g} s, plan {ratio:.2f}x as fast"
    return "none in this space: the batch or the pins leave it out"


def peers() -> str:
    """Published planning times of other planners, as their authors give them."""
    lines = ["| planner | what was planned | published time | source |", "|---|---|---|---|"]
    for peer in json.loads(PEERS.read_text()):
        lines.append(f"| {peer['planner']} | {peer['what']} | {peer['time']} | {peer['source']} |")
    return "\n".join(lines)


def exhaustive() -> str:
    """The section on enumeration, empty until it was run."""
    path = RESULTS / "planning_exhaustive.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    lines = ["| case | combinations | enumeration | search | best step, both | combinations better than the plan |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found["rows"].values():
        lines.append(
            f"| {row['title']} | {row['combinations']:,} | {row['enumeration_s']:.0f} s | {row['search_s']:.1f} s "
            f"| {row['enumeration_step_s']:.6g} s, {row['search_step_s']:.6g} s | {row['better']} |"
        )
    return EXHAUSTIVE.format(table="\n".join(lines))


def regrets() -> str:
    """The sections on measured regret, empty until it was measured."""
    from regret import report

    files = sorted(RESULTS.glob("regret_*.json"))
    said = [report(json.loads(path.read_text())).replace("\n## ", "\n### ") for path in files]
    return REGRET + "\n\n".join(said) + "\n" if said else ""


REGRET = """
## Measured regret

By `benchmarks/regret.py`: every layout that fits on the GPUs of one machine, each at the planner's best, was run;
regret is the step time of the planner's choice over that of the fastest.

"""

EXHAUSTIVE = """
## Exhaustive enumeration, where it finishes

Written by `benchmarks/planning_exhaustive.py`: every combination solved exactly, without lower bounds, incumbents or
windows, against the search at `--gap 0`. Processor seconds of one process; the trace is left out of both.

{table}
"""

TEMPLATE = """# Planning times, gaps and gains

Written by `python benchmarks/planning.py --write` from `benchmarks/results/planning*.json`; do not edit. Measured on
{date}, {cores} cores of {processor}, Python {python}, torch {torch}, HiGHS {highspy}, PuLP {pulp}.

Each row is one cold process, from `tpplan suggest` to plan.json. *Promised* is the wall time that was set as the goal
before anything was built. *Imports* are torch, the model's libraries and its file; *rest* is the interpreter, the
baselines and writing the plan. *Bounds*, *ILPs* and *simulation* are wall seconds within the search, summed over its
worker processes (one a core). *Processor s* counts all threads and processes: on an idle machine the wall time lies
below it where the workers share the search. *Load before* is the machine's load average when the row began: wall times
beside a load of more than a few tenths say more about the other work than about the planner.
*Gap proven* is (step - bound) / step over the whole modelled space, at most what `--gap` asked for.

{table}

## How the combinations were dealt with

*lb0*, *lb1*, *lb2* are the bounds of [ilp.md](ilp.md); a combination counts under the one that closed it.

{pruned}

## Against layouts without a planner

Predicted by the same cost model, on the same hardware profile. *Rule of thumb*: the least pp, then the least tp that
fits, the largest microbatch that fits, recomputation only where needed (Narayanan et al. 2021). *Plain FSDP*: the best
layout with fully_shard over all GPUs, any microbatch size and recomputation.

{gains}

Six situations in which the best layout is neither, with what makes it so, are tests:
[tests/planner/test_decides.py](../tests/planner/test_decides.py).

## How time grows

Llamas of 8B's width with 24 to 128 layers on 64 GPUs, and Llama-3 8B on 8 to 16,384, to the default gap of 0.5 %, by
`benchmarks/planning_scale.py`.

![Planning time against layers](pictures/planning_layers.svg)

![Planning time against GPUs](pictures/planning_gpus.svg)
{exhaustive}{regrets}
## What others publish

Quoted, not measured here; each planned another space on other machines, and Alpa's time includes profiling on GPUs.
None proves a lower bound over meshes, pipelines and recomputation together. For Galvatron, nnScaler and Mist no figure
was found that could be checked.

{peers}
"""


def write_page(results: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write docs/planning.md."""
    page = TEMPLATE.format(
        **{
            key: results["machine"][key] for key in ("date", "cores", "processor", "python", "torch", "highspy", "pulp")
        },
        table=table(results, rows),
        pruned=pruned(results, rows),
        gains=gains(results, rows),
        exhaustive=exhaustive(),
        regrets=regrets(),
        peers=peers(),
    )
    PAGE.write_text(page)
