"""Objectives other than the step time, each reduced to proven searches for the fastest plan.

time     the fastest plan                                     one search
memory   the fastest plan of those that need least memory     the least limit is exact; one search at that limit
gpus     the fewest GPUs that reach a target step time        one search for each number of GPUs, rising
cost     the least money a step                               one search for each number of GPUs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import InfeasibleError, TpplanError, UsageError
from ..units import format_seconds, gib
from .mesh import divisors
from .planning import SearchOptions, Solved, Subject, prepare, solve_for
from .request import Request
from .shortfall import least_limit

OBJECTIVES = ("time", "memory", "gpus", "cost")
EXACT_GAP = 1e-4
MEMORY_TOLERANCE = 0.002
MOST_MULTIPLES = 16
HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Goal:
    """What to minimise.

    target_step_time_s : for gpus, the step time to reach [s]
    price_per_gpu_hour : for cost, money for one GPU in one hour
    """

    objective: str = "time"
    target_step_time_s: float | None = None
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        for objective, value, option in (
            ("gpus", self.target_step_time_s, "--target-step-time"),
            ("cost", self.price_per_gpu_hour, "--price"),
        ):
            if (self.objective == objective) != (value is not None):
                raise UsageError(
                    f"--objective {self.objective} "
                    + ("needs" if value is None else "takes no")
                    + f" {option}; it belongs to --objective {objective}.",
                    f"For example --objective {objective} {option} 2.5.",
                )
            if value is not None and value <= 0:
                raise UsageError(f"{option} is {value}.", f"Give {option} a number above 0.")


@dataclass(frozen=True, slots=True)
class Reached:
    """The search whose best plan is the answer, and what was proven on the way, in sentences."""

    solved: Solved
    proofs: tuple[str, ...] = ()


def reach(
    subject: Subject, request: Request, goal: Goal, options: SearchOptions, say: Callable[[str, str], None]
) -> Reached:
    """Solve a request for its goal.

    Returns
    -------
    Reached
        `solved.best` is None where nothing fits (or no plan was found in time).

    Raises
    ------
    InfeasibleError
        If no number of GPUs reaches the target.
    UsageError, InfeasibleError
        As `planning.prepare`.
    """
    ways = {"memory": least_memory, "gpus": fewest_gpus, "cost": least_cost}
    if goal.objective == "time":
        prepared = prepare(subject, request)
        say("search", f"searching {len(prepared[1])} combinations")
        return Reached(solve_for(subject, request, options, prepared))
    return ways[goal.objective](subject, request, goal, options, say)


def least_memory(
    subject: Subject, request: Request, goal: Goal, options: SearchOptions, say: Callable[[str, str], None]
) -> Reached:
    """The fastest plan under the least memory limit of a device for which any plan exists.

    Where no plan is found at the least limit (which is exact but for the rounding of the allocator's reserve), the
    limit rises by `MEMORY_TOLERANCE`.
    """
    say("memory", "finding the least memory that any plan needs")
    least = least_limit(subject, request)
    if least is None or least > request.memory_limit_bytes:
        return Reached(solve_for(subject, request, options))
    proof = f"no plan of the space needs less than {gib(least):.3f} GiB on its fullest device"
    limit = least
    while limit <= request.memory_limit_bytes:
        say("memory", f"the fastest plan within {gib(limit):.3f} GiB a GPU")
        solved = solve_for(subject, replace(request, memory_limit_bytes=limit), options)
        if solved.best is not None or solved.result.status != "infeasible":
            within = f"the plan is the fastest within {gib(limit):.3f} GiB (gap {solved.result.gap:.2%})"
            return Reached(replace(solved, model=subject.costs(request)), (proof, within))
        limit += max(1, round(limit * MEMORY_TOLERANCE))
    return Reached(solve_for(subject, request, options), (proof,))


def gpu_counts(gpus: int, gpus_per_node: int) -> list[int]:
    """Numbers of GPUs to consider: divisors of a node, then whole nodes; of many nodes only round numbers of them.

    >>> gpu_counts(32, 8)
    [1, 2, 4, 8, 16, 24, 32]
    """
    parts = [d for d in divisors(gpus_per_node) if d <= gpus]
    nodes = gpus // gpus_per_node
    multiples = range(1, nodes + 1) if nodes <= MOST_MULTIPLES else divisors(nodes)
    whole = [n * gpus_per_node for n in multiples]
    return sorted({*parts, *whole, gpus})


def _gpus(count: int) -> str:
    return f"{count} GPU" + "s" * (count > 1)


def _each_count(
    subject: Subject, request: Request, options: SearchOptions, say: Callable[[str, str], None], count: int, gap: float
) -> Solved | str:
    """The search for one number of GPUs, or why there is no plan with so many.

    Raises
    ------
    KeyboardInterrupt
        If the search was interrupted: an answer would need the other numbers too.
    """
    say("gpus", _gpus(count))
    try:
        solved = solve_for(subject, replace(request, gpus=count, gap=gap), options)
    except TpplanError as error:
        return error.message
    if interrupted(solved):
        raise KeyboardInterrupt
    if solved.best is None:
        return "nothing fits" if solved.result.status == "infeasible" else "no plan found in time"
    return solved


def interrupted(solved: Solved) -> bool:
    """Whether Ctrl-C ended the search (nothing else does where there is no time limit)."""
    return solved.request.time_limit_s is None and solved.result.status in ("feasible", "unknown")


def fewest_gpus(
    subject: Subject, request: Request, goal: Goal, options: SearchOptions, say: Callable[[str, str], None]
) -> Reached:
    """The first of the rising numbers of GPUs whose best plan reaches the target; the smaller ones are proven not to.

    A number whose bound reaches the target while its plan does not is searched again to `EXACT_GAP`.
    """
    target = goal.target_step_time_s
    assert target is not None
    proofs: list[str] = []
    best_s = float("inf")
    for count in gpu_counts(request.gpus, request.gpus_per_node):
        for gap in (request.gap, EXACT_GAP):
            solved = _each_count(subject, request, options, say, count, gap)
            if isinstance(solved, str) or gap == EXACT_GAP:
                break
            step = solved.result.ranking[0].evaluation.step_time_s
            if step <= target or solved.result.lower_bound_s > target:
                break
        if isinstance(solved, str):
            proofs.append(f"{_gpus(count)}: {solved}")
            continue
        result = solved.result
        step = result.ranking[0].evaluation.step_time_s
        best_s = min(best_s, step)
        if step <= target:
            reached = f"with {_gpus(count)} a step takes {format_seconds(step)}, at most {format_seconds(target)}"
            return Reached(solved, (*proofs, reached))
        sure = "" if result.lower_bound_s > target else " (not proven: within the gap)"
        proofs.append(f"{_gpus(count)}: at least {format_seconds(result.lower_bound_s)} a step{sure}")
    fastest = f"; the fastest plan takes {format_seconds(best_s)}" if best_s < float("inf") else ""
    raise InfeasibleError(
        f"No number of GPUs up to {request.gpus} reaches {format_seconds(target)} a step{fastest}.",
        "Give more GPUs (--gpus), a longer --target-step-time, or a smaller --global-batch.",
    )


def least_cost(
    subject: Subject, request: Request, goal: Goal, options: SearchOptions, say: Callable[[str, str], None]
) -> Reached:
    """The number of GPUs and plan with the least GPUs x step time x price; the bound is the least of all numbers."""
    price = goal.price_per_gpu_hour
    assert price is not None

    def money(count: int, step_s: float) -> float:
        return count * step_s * price / HOUR_S

    table: list[str] = []
    found: list[tuple[float, int, Solved]] = []
    bound = float("inf")
    for count in gpu_counts(request.gpus, request.gpus_per_node):
        solved = _each_count(subject, request, options, say, count, request.gap)
        if isinstance(solved, str):
            table.append(f"{_gpus(count)}: {solved}")
            continue
        step = solved.result.ranking[0].evaluation.step_time_s
        found.append((money(count, step), count, solved))
        bound = min(bound, money(count, solved.result.lower_bound_s))
        table.append(f"{_gpus(count)}: {money(count, step):.4g} a step ({format_seconds(step)})")
    if not found:
        return Reached(solve_for(subject, request, options))
    cost, _, solved = min(found, key=lambda item: item[:2])
    gap = (cost - bound) / cost
    return Reached(solved, (f"no plan costs less than {bound:.4g} a step (gap {gap:.2%})", *table))
