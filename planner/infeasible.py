"""The answer where no plan exists: how much memory is missing, where and for what, and the repairs that work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from ..errors import InfeasibleError, TpplanError
from ..units import GIB, format_seconds, gib
from .assemble import memory_parts
from .mesh import Mesh
from .planning import Solved, Subject, solve_for
from .repairs import Repair, find_repairs


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The least memory that is missing, over all plans of the space.

    limit_bytes : the least limit of a device under which something fits
    missing_bytes : that, less the request's limit
    mesh : the mesh that needs the least
    rank : its fullest pipeline rank
    parts : bytes of that rank by part, largest first
    """

    limit_bytes: int
    missing_bytes: int
    mesh: Mesh
    rank: int
    parts: tuple[tuple[str, int], ...]


def shortfall(subject: Subject, solved: Solved) -> Shortfall:
    """What is missing at least; the plan that needs it is solved for, so that its parts are those of a real plan."""
    model, result = solved.model, solved.result
    mesh = Mesh(*result.shortfall_key)
    active = model.active_limit(mesh) + result.shortfall_bytes
    limit = active + model.reserve_bytes(active) + sum(model.fixed_bytes(mesh).values())
    request = replace(model.request, memory_limit_bytes=limit)
    least = solve_for(subject, request, prepared=(type(model)(*_inputs(subject), request), [mesh]))
    missing = limit - model.request.memory_limit_bytes
    if least.best is None:
        return Shortfall(limit, missing, mesh, result.shortfall_stage, ())
    parts = memory_parts(least.model, mesh, least.best.assignment, least.best.evaluation)
    rank = max(range(len(parts)), key=lambda r: sum(parts[r].values()))
    largest = sorted(((n, b) for n, b in parts[rank].items() if b), key=lambda item: -item[1])
    return Shortfall(limit, missing, mesh, rank, tuple(largest))


def _inputs(subject: Subject):
    return subject.graph, subject.sharding, subject.profile


def no_plan(subject: Subject, solved: Solved, repair_s: float, say: Callable[[str, str], None]) -> TpplanError:
    """The error for a search without a plan: out of memory (by how much, where, what helps), or out of time."""
    request, result = solved.request, solved.result
    if result.status != "infeasible":
        return InfeasibleError(
            f"No plan was found within {request.time_limit_s} s.",
            "Give more time with --time-limit, or pin axes with --fix.",
        )
    if not result.shortfall_key:
        return InfeasibleError("No candidate has enough legal cuts for its stages.", "Use fewer stages: --fix pp=1.")
    short = shortfall(subject, solved)
    lines = [_remedy_line(request.pins.text())]
    if repair_s > 0:
        say("repairs", "nothing fits; solving for what would")
        lines = repair_lines(*find_repairs(subject, solved.request, short.limit_bytes, repair_s)) or lines
    return InfeasibleError(f"{_message(short, request.memory_limit_bytes)}", "\n".join(lines))


def _message(short: Shortfall, limit_bytes: int) -> str:
    m = short.mesh
    parts = ", ".join(f"{name.replace('_', ' ')} {gib(b):.2f}" for name, b in short.parts[:3])
    largest = f"; most of that rank: {parts} GiB" if parts else ""
    return (
        f"Nothing fits: the best layout ({m.describe()}, microbatch {m.microbatch_size}) lacks "
        f"{gib(short.missing_bytes):.2f} GiB in stage {short.rank} of {m.pp} "
        f"(limit {gib(limit_bytes):.1f} GiB a GPU{largest})."
    )


def _remedy_line(pinned: str) -> str:
    drop = ", or drop a --fix." if pinned else "."
    return f"Use more GPUs (--gpus), a shorter sequence (--seq-len), or a larger --memory-limit{drop}"


def repair_lines(working: list[Repair], tried: list[str]) -> list[str]:
    """The repairs for people: those that work with their price, then those that were tried in vain."""
    lines = []
    if working:
        lines.append("What would fit (each solved, step time within 5 % of the best):")
        width = max(len(r.text) for r in working)
        lines += [
            f"  {r.text:{width}}  {format_seconds(r.step_time_s)} a step, {r.layout}, {gib(r.device_bytes):.1f} GiB"
            for r in working
        ]
    if tried:
        lines.append(f"Tried in vain: {', '.join(tried)}.")
    return lines


def round_up_gib(n_bytes: int) -> int:
    """Whole GiB that hold `n_bytes`."""
    return ceil(n_bytes / GIB)
