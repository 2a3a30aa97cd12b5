"""The answer where no plan exists: how much memory is missing, where and for what, and the repairs that work."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InfeasibleError, TpplanError
from ..units import format_seconds, gib
from .planning import Solved, Subject
from .repairs import Repairs, find_repairs
from .shortfall import Shortfall, shortfall


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
        lines = repair_lines(find_repairs(subject, solved.request, short.limit_bytes, repair_s)) or lines
    return InfeasibleError(_message(short, request.memory_limit_bytes), "\n".join(lines))


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


def repair_lines(found: Repairs) -> list[str]:
    """The repairs for people: those that work with their price, then the others."""
    lines = []
    if found.working:
        lines.append("What would fit (each solved, step time within 5 % of the best):")
        width = max(len(r.text) for r in found.working)
        lines += [
            f"  {r.text:{width}}  {format_seconds(r.step_time_s)} a step, {r.layout}, {gib(r.device_bytes):.1f} GiB"
            for r in found.working
        ]
    if found.in_vain:
        lines.append(f"Tried in vain: {', '.join(found.in_vain)}.")
    if found.undecided:
        lines.append(f"Not decided in time: {', '.join(found.undecided)}.")
    return lines
