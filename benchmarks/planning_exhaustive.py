"""Every combination of a space solved exactly, without bounds or incumbents, against the search: `--gap 0` for both.

    python benchmarks/planning_exhaustive.py            # all cases; results after each

The search gives most combinations up by a bound. Here each gets an integer programme of its own, from scratch, so a
bound that is none, or a cut-off that hides a better plan, would show as a combination better than the search's plan.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from planning import load, machine, save
from planning_cases.cases import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "planning_exhaustive.json"
TOLERANCE = 1e-6  # by how much two exact solves may differ


@dataclass(frozen=True, slots=True)
class Case:
    """A space small enough to enumerate."""

    name: str
    title: str
    target: str
    options: dict[str, Any]


CASES = (
    Case("gpt2-8", "GPT-2, 8 H100, 64 samples", "examples/nanogpt.py", {"gpus": 8, "global_batch": 64}),
    Case(
        "gpt-wide-16-tight",
        "GPT of eight blocks of width 4,096, 16 H100 of 12 GiB, 64 samples",
        "examples/nanogpt.py",
        {
            "gpus": 16,
            "global_batch": 64,
            "seq_len": 1024,
            "memory_limit_gib": 12.0,
            "model_args": {"n_layer": "8", "n_embd": "4096", "n_head": "32"},
        },
    ),
    Case("llama3-8b-8", "Llama-3 8B, 8 H100, 64 samples", "examples/llama3_8b", {"gpus": 8, "global_batch": 64}),
)


def main() -> None:
    """Enumerate each case and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of cases; all by default")
    parser.add_argument("--limit-s", type=float, default=3600, help="give a case up after so many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results = load(given.out)
    for case in CASES:
        if not given.names or case.name in given.names:
            results["rows"][case.name] = row = enumerate_space(case, given.limit_s)
            results["machine"] = machine()
            save(results, given.out)
            print(row, flush=True)


def enumerate_space(case: Case, limit_s: float) -> dict[str, Any]:
    """Search one space, then solve all of its combinations.

    `better` counts combinations whose optimum is below the search's plan; `open` those that ran out of time.
    """
    from tpplan.planner.planning import solve_for
    from tpplan.planner.solve import solve
    from tpplan.planner.suggest import suggest_in_detail

    found = suggest_in_detail(str(ROOT / case.target), hardware="h100-sxm", gap=0.0, **case.options)
    before = processor_s()
    solve_for(found.subject, found.solved.request)
    search_s = processor_s() - before
    best = found.plan.predicted.step_time_s
    counts = dict.fromkeys(("optimal", "infeasible", "cutoff", "feasible", "open", "better"), 0)
    least, begin, before = inf, time.monotonic(), processor_s()
    for mesh in found.solved.meshes:
        if time.monotonic() - begin > limit_s:
            counts["open"] += 1
            continue
        solution = solve(found.solved.model.problem(mesh), inf, 0.0)
        counts[solution.status] += 1
        least = min(least, solution.objective_s)
        counts["better"] += solution.objective_s < best * (1 - TOLERANCE)
    return {
        "title": case.title,
        "combinations": len(found.solved.meshes),
        "search_s": search_s,
        "enumeration_s": processor_s() - before,
        "search_step_s": best,
        "enumeration_step_s": least,
        "search_solved": found.plan.solver.solved,
        "pruned": found.plan.solver.pruned,
        **counts,
    }


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


if __name__ == "__main__":
    main()
