"""The least memory of a device under which any plan of a request exists, and what fills it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .assemble import memory_parts
from .choices import CostModel
from .mesh import Mesh
from .planning import Solved, Subject, prepare, solve_for
from .request import Request


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
    """What an infeasible search is short of; the plan that needs least is solved for, so that its parts are real."""
    model, result = solved.model, solved.result
    mesh = Mesh(*result.shortfall_key)
    limit = _device_limit(model, mesh, result.shortfall_bytes)
    wider = subject.costs(replace(model.request, memory_limit_bytes=limit))
    least = solve_for(subject, wider.request, prepared=(wider, [mesh]))
    missing = limit - model.request.memory_limit_bytes
    if least.best is None:
        return Shortfall(limit, missing, mesh, result.shortfall_stage, ())
    parts = memory_parts(least.model, mesh, least.best.assignment, least.best.evaluation)
    rank = max(range(len(parts)), key=lambda r: sum(parts[r].values()))
    largest = sorted(((n, b) for n, b in parts[rank].items() if b), key=lambda item: -item[1])
    return Shortfall(limit, missing, mesh, rank, tuple(largest))


def least_limit(subject: Subject, request: Request) -> int | None:
    """The least limit of a device [B] under which any plan exists; None where no mesh can be cut.

    Meshes with the same fixed bytes (context, communicators) are searched under a limit that none of them meets, one
    byte above these: the excess that is least over all candidates is what must be added to it.
    """
    model, meshes = prepare(subject, request)
    groups: dict[int, list[Mesh]] = {}
    for mesh in meshes:
        groups.setdefault(sum(model.fixed_bytes(mesh).values()), []).append(mesh)
    found = []
    for fixed, members in sorted(groups.items()):
        wider = subject.costs(replace(request, memory_limit_bytes=fixed + 1, time_limit_s=None))
        result = solve_for(subject, wider.request, prepared=(wider, members)).result
        if result.shortfall_key:
            found.append(_device_limit(wider, Mesh(*result.shortfall_key), result.shortfall_bytes))
    return min(found, default=None)


def _device_limit(model: CostModel, mesh: Mesh, excess_bytes: int) -> int:
    """The device's bytes when a mesh exceeds its active limit by `excess_bytes`."""
    active = model.active_limit(mesh) + excess_bytes
    return active + model.reserve_bytes(active) + sum(model.fixed_bytes(mesh).values())
