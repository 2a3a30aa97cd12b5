"""The planner's exactness, counted: solver and bounds against brute force, and two exact engines on large problems.

    python benchmarks/exactness.py                       # 3,000 small instances, CBC on 150, 40 large ones
    python benchmarks/exactness.py --instances 500 --large 10
    python benchmarks/exactness.py --save                # also write benchmarks/results/exactness.json

Small instances (3-7 layers, 1-5 ranks, all four schedules) are enumerated by the oracle of the tests, which shares no
code with the planner; so are near ties, where plans exceed the limit by a few bytes in 100 GB. Large ones (24-60 layers
on 2-8 ranks, recomputation) are solved a second time by the best fillings of every rank and a replay of all
combinations. Every disagreement is printed with its seed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from math import inf
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "planner"))

from brute_force import price_one, splits
from instances import Known, known, near_tie
from large_oracle import large_given, large_problem, optimum, optimum_given
from tpplan.costmodels.schedules import SCHEDULES
from tpplan.planner.bounds import lb0, memory_floor
from tpplan.planner.candidate import Candidate
from tpplan.planner.chunk_bounds import fixed_bound
from tpplan.planner.evaluate import evaluate
from tpplan.planner.intervals import chain_arrays
from tpplan.planner.problem import Problem, Solution
from tpplan.planner.relaxation import Relaxation, least_memory, relax
from tpplan.planner.search import search
from tpplan.planner.solve import solve

RESULTS = Path(__file__).parent / "results" / "exactness.json"
SAME = 1e-9
LARGE_GAP = 1e-6
FIRST_SEED = 100_000  # those of the tests lie below


def main() -> int:
    """Run the campaign; 0 if nothing disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=3000)
    parser.add_argument("--cbc", type=int, default=150, help="of the instances, how many CBC solves too")
    parser.add_argument("--near-ties", type=int, default=500)
    parser.add_argument("--large", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/exactness.json")
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.instances)
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "solver": f"highspy {version('highspy')}, PuLP {version('pulp')}",
        "small": small(seeds, given.cbc),
        "near_ties": near_ties(seeds[: given.near_ties]),
        "large": large(range(given.first_seed, given.first_seed + given.large)),
    }
    parts = ("small", "near_ties", "large")
    for part in parts:
        print(json.dumps(result[part], indent=1))
    if given.save:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(result[part]["wrong"] for part in parts))


def small(seeds: Iterable[int], by_cbc: int) -> dict:
    """Brute force against solver, evaluation and bounds: counts by schedule, and what was wrong."""
    counts: dict[str, Counter[str]] = {schedule: Counter() for schedule in SCHEDULES}
    wrong: list[str] = []
    seconds = Counter[str]()
    for done, seed in enumerate(seeds):
        start = time.process_time()
        k = known(seed, SCHEDULES)
        enumerated = time.process_time()
        count = counts[k.problem.schedule]
        count.update(instances=1, plans=sum(len(p.step_s) for p in k.plans), infeasible=not k.feasible)
        count.update(memory_bound=k.memory_bound, greedy_wrong=k.greedy_wrong, feasible=k.feasible)
        found = differences(k, solve(k.problem, gap=0.0))
        solved = time.process_time()
        found += bound_violations(k)
        bounded = time.process_time()
        found += search_violations(k, seed)
        seconds.update(enumerate=enumerated - start, solve=solved - enumerated, bounds=bounded - solved)
        seconds.update(search=time.process_time() - bounded)
        if done < by_cbc:
            count.update(by_cbc=1)
            found += [f"cbc: {text}" for text in differences(k, solve(k.problem, gap=0.0, engine="cbc"))]
        for text in found:
            wrong.append(f"seed {seed}, {k.problem.schedule}: {text}")
            print(wrong[-1], flush=True)
    total = sum(counts.values(), Counter())
    shares = {
        "memory_bound": total["memory_bound"] / total["instances"],
        "infeasible": total["infeasible"] / total["instances"],
        "greedy_wrong_of_feasible": total["greedy_wrong"] / max(1, total["feasible"]),
    }
    return {
        "by_schedule": {schedule: dict(count) for schedule, count in counts.items()},
        "total": dict(total),
        "shares": {name: round(share, 3) for name, share in shares.items()},
        "cpu_s": {name: round(value, 1) for name, value in seconds.items()},
        "wrong": wrong,
    }


def near_ties(seeds: Iterable[int]) -> dict:
    """Sizes of real models, where plans exceed the limit by as little as one byte (odd seeds) or 512 (even)."""
    wrong, solved, start = [], 0, time.process_time()
    for seed in seeds:
        k = near_tie(seed, 1 if seed % 2 else 512)
        wrong += [f"near tie {seed}: {text}" for text in differences(k, solve(k.problem, gap=0.0))]
        solved += 1
    return {"instances": solved, "cpu_s": round(time.process_time() - start, 1), "wrong": wrong}


def differences(k: Known, solution: Solution) -> list[str]:
    """Where an exact solution is not what brute force says."""
    problem, least = k.problem, k.answer.least_bytes - k.problem.memory_bytes
    if not k.feasible:
        if (solution.status, solution.shortfall_bytes) != ("infeasible", least):
            return [f"{solution.status}, short of {solution.shortfall_bytes} B; the least is {least} B"]
        return []
    if solution.status != "optimal" or solution.assignment is None:
        return [f"{solution.status}; the optimum is {k.answer.optimum_s}"]
    found = []
    step_s, peaks = price_one(problem, solution.assignment)
    evaluation = evaluate(problem, solution.assignment)
    if solution.assignment.boundaries not in splits(problem) or max(peaks) > problem.memory_bytes:
        found.append(f"the pick {solution.assignment} is not allowed")
    if evaluation.stage_bytes != peaks or abs(step_s - solution.objective_s) > SAME * step_s:
        found.append(f"the pick costs {step_s} s, {peaks} B, not {solution.objective_s}, {evaluation.stage_bytes}")
    if abs(solution.objective_s - k.answer.optimum_s) > SAME * k.answer.optimum_s:
        found.append(f"found {solution.objective_s}; the optimum is {k.answer.optimum_s}")
    if solution.lower_bound_s > k.answer.optimum_s * (1 + SAME):
        found.append(f"bound {solution.lower_bound_s} above the optimum {k.answer.optimum_s}")
    return found


def search_violations(k: Known, seed: int) -> list[str]:
    """Where a whole search (bounds, decomposition, coarse and fine solves) contradicts brute force."""
    gap = (0.0, 1e-4, 0.005, 0.05)[seed % 4]
    optimum_s = k.answer.optimum_s
    result = search([Candidate((0,), lambda: k.problem)], gap=gap)
    if not k.feasible:
        return [] if result.status == "infeasible" else [f"search: {result.status}, but nothing fits"]
    if result.best is None or result.status != "optimal":
        return [f"search at gap {gap}: {result.status}; the optimum is {optimum_s}"]
    found = []
    step_s, peaks = price_one(k.problem, result.best.assignment)
    if max(peaks) > k.problem.memory_bytes or abs(step_s - result.best.evaluation.step_time_s) > SAME * step_s:
        found.append(f"search at gap {gap}: its plan costs {step_s} s, {peaks} B")
    if result.lower_bound_s > optimum_s * (1 + SAME):
        found.append(f"search at gap {gap}: bound {result.lower_bound_s} above the optimum {optimum_s}")
    if step_s > optimum_s / (1 - max(gap, SAME)) * (1 + SAME):
        found.append(f"search at gap {gap}: {step_s}; the optimum is {optimum_s}")
    return found


def bound_violations(k: Known) -> list[str]:
    """Bounds above the optimum, and windows that shut a plan out that is within their target."""
    problem, optimum_s, least_bytes = k.problem, k.answer.optimum_s, k.answer.least_bytes
    chain = chain_arrays(problem.layers)
    least, _ = least_memory(problem, chain)
    found = []
    if max(memory_floor(problem), least) > least_bytes or (problem.ends is None and least != least_bytes):
        found.append(f"memory floor {memory_floor(problem)}, least memory {least}; it is {least_bytes}")
    bounds = {"lb0": lb0(problem)}
    if problem.ends is not None:
        bounds["fixed"] = fixed_bound(problem)
    else:
        relaxation = relax(problem, chain)
        bounds |= {"lb1": relaxation.lb1_s, "lb2": relaxation.lb2_s}
        for target_s in (optimum_s, 1.1 * optimum_s, inf):
            if k.feasible and shut_out(k, relaxation, target_s):
                found.append(f"windows of target {target_s} shut out {shut_out(k, relaxation, target_s)}")
    return found + [f"{name} = {value} above {optimum_s}" for name, value in bounds.items() if not value <= optimum_s]


def shut_out(k: Known, relaxation: Relaxation, target_s: float) -> list[tuple[int, ...]]:
    """Splits outside the windows that hold a plan within the target."""
    windows = relaxation.windows(target_s)
    out = []
    for plans in k.plans:
        within = (plans.step_s <= target_s) & (plans.peak_bytes.max(0) <= k.problem.memory_bytes)
        pairs = zip(plans.boundaries, windows, strict=True) if windows else ()
        inside = bool(windows) and all(low <= b <= high for b, (low, high) in pairs)
        if within.any() and not inside:
            out.append(plans.boundaries)
    return out


def large(seeds: Iterable[int]) -> dict:
    """The integer programme against the second engine; every fourth problem is interleaved, with given chunks."""
    rows, wrong = [], []
    for seed in seeds:
        given = seed % 4 == 3
        problem = large_given(seed) if given else large_problem(seed)
        start = time.process_time()
        best, replayed = optimum_given(problem) if given else optimum(problem)
        half = time.process_time()
        solution, bound_s = with_bounds(problem)
        row = {
            "seed": seed,
            "schedule": problem.schedule,
            "layers": len(problem.layers),
            "stages": problem.stages,
            "microbatches": problem.microbatches,
            "replayed": replayed,
            "optimum_s": best,
            "status": solution.status,
            "oracle_cpu_s": round(half - start, 2),
            "solve_cpu_s": round(time.process_time() - half, 2),
        }
        rows.append(row)
        print(row, flush=True)
        if best == inf:
            agree = solution.status == "infeasible"
        else:
            reached = abs(solution.objective_s - best) <= LARGE_GAP * best
            agree = reached and max(solution.lower_bound_s, bound_s) <= best * (1 + SAME)
        if not agree:
            wrong.append(f"seed {seed}: {solution.status} {solution.objective_s}, bound {solution.lower_bound_s}")
    return {"rows": rows, "wrong": wrong}


def with_bounds(problem: Problem) -> tuple[Solution, float]:
    """The problem as the search solves it (windows below an incumbent, integer programme), and its bound [s]."""
    if problem.ends is not None:
        return solve(problem, gap=LARGE_GAP), fixed_bound(problem)
    relaxation = relax(problem, chain_arrays(problem.layers))
    if relaxation.lb2_s == inf:
        return Solution("infeasible", None, inf, inf), inf
    first = solve(problem, gap=0.02, windows=relaxation.windows(inf))
    if first.assignment is None:
        return first, relaxation.lb2_s
    windows = relaxation.windows(first.objective_s * (1 + SAME))
    return solve(problem, gap=LARGE_GAP, windows=windows), relaxation.lb2_s


if __name__ == "__main__":
    sys.exit(main())
