"""Repairs of a request that nothing fits: each changes one thing, and counts only if a solve finds a plan for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from ..errors import TpplanError
from ..units import GIB
from .mesh import Mesh
from .pins import NO_PINS, Pins
from .planning import Solved, Subject, solve_for
from .request import Request

GAP = 0.05
MOST_GPUS = 16  # times the request's
SHORTEST = 8  # parts of the request's sequence length


@dataclass(frozen=True, slots=True)
class Repair:
    """A change under which a plan exists.

    text : what to type
    layout : mesh and microbatch of the plan found
    step_time_s : its step time, within `GAP` of the best
    device_bytes : its fullest device
    """

    text: str
    layout: str
    step_time_s: float
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One change to try; `build` gives what to solve, and may trace again."""

    family: str
    text: str
    build: Callable[[], tuple[Subject, Request]]


@dataclass(frozen=True, slots=True)
class Repairs:
    """What was found out about changes of a request.

    working : at most one of a family, the smallest change of it that works
    in_vain : changes under which a proof says that nothing fits
    undecided : changes that time did not allow to decide
    """

    working: tuple[Repair, ...]
    in_vain: tuple[str, ...]
    undecided: tuple[str, ...]


def find_repairs(subject: Subject, request: Request, least_limit_bytes: int, seconds: float) -> Repairs:
    """Try changes of the request, each by a solve.

    Parameters
    ----------
    subject, request : Subject, Request
        What nothing fits.
    least_limit_bytes : int
        The least memory of a device under which something fits.
    seconds : float
        For all solves together.
    """
    deadline = time.monotonic() + seconds
    working: dict[str, Repair] = {}
    in_vain = searched_already(request.pins)
    late = []
    for attempt in attempts(subject, request, least_limit_bytes):
        if attempt.family in working or (attempt.family == "all pins" and any(f[:4] == "pin " for f in working)):
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            late.append(attempt.text)
            continue
        try:
            changed, wanted = attempt.build()
            solved = solve_for(changed, replace(wanted, gap=GAP, time_limit_s=left))
        except TpplanError:
            continue  # this model or batch does not allow the change
        if solved.best is not None:
            working[attempt.family] = _repair(attempt.text, solved)
        elif solved.result.status == "infeasible":
            in_vain.append(attempt.text)
        elif time.monotonic() < deadline:
            break  # Ctrl-C: tell what is known
        else:
            late.append(attempt.text)
    return Repairs(tuple(working.values()), tuple(in_vain), tuple(late))


def searched_already(pins: Pins) -> list[str]:
    """The remedies that the space holds anyway, where no pin forbids them."""
    free = (
        ("recompute", "full", "recompute=full"),
        ("zero_stage", 3, "ZeRO-3"),
        ("microbatch_size", 1, "microbatches of 1"),
    )
    named = [text for axis, value, text in free if pins.allows(axis, value)]
    return [f"{', '.join(named)} (all in the space searched)"] if named else []


def attempts(subject: Subject, request: Request, least_limit_bytes: int) -> Iterator[Attempt]:
    """Changes worth trying, cheapest to check first; of one family the smallest change first."""

    def change(family: str, text: str, **fields: object) -> Attempt:
        return Attempt(family, text, lambda: (subject, replace(request, **fields)))  # type: ignore[arg-type]

    for pin in request.pins:
        yield change(f"pin {pin}", f"without {pin}", pins=request.pins.without(pin))
    if len(request.pins.pins) > 1:
        yield change("all pins", "without any pin", pins=NO_PINS)
    whole = ceil(least_limit_bytes / GIB)
    yield change("memory", f"--memory-limit {whole}", memory_limit_bytes=whole * GIB)
    if request.optimizer == "adamw":
        yield change("optimizer", "--optimizer sgd", optimizer="sgd")
    factor = 2
    while factor <= MOST_GPUS:
        yield change("gpus", f"--gpus {request.gpus * factor}", gpus=request.gpus * factor)
        factor *= 2
    yield from _traced_anew(subject, request)


def _traced_anew(subject: Subject, request: Request) -> Iterator[Attempt]:
    """Changes that need another trace."""
    retrace = subject.retrace
    if retrace is None:
        return
    if request.precision == "fp32":
        wanted = replace(request, precision="bf16")
        yield Attempt("precision", "--precision bf16", lambda: (retrace(request.sequence_length, "bf16"), wanted))
    parts = 2
    while parts <= SHORTEST and request.sequence_length // parts >= 1:
        length = request.sequence_length // parts
        shorter = replace(request, sequence_length=length)
        yield Attempt(
            "sequence",
            f"--seq-len {length}",
            lambda length=length, shorter=shorter: (retrace(length, request.precision), shorter),
        )
        parts *= 2


def _repair(text: str, solved: Solved) -> Repair:
    best = solved.best
    assert best is not None
    mesh = Mesh(*best.key)
    layout = f"{mesh.describe()}, microbatch {mesh.microbatch_size}"
    return Repair(text, layout, best.evaluation.step_time_s, solved.device_bytes(best))
