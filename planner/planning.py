"""One request solved: a traced model on a hardware profile, its meshes, and what the search proves about them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hardware_profiles.catalog import Profile
from .assemble import build_plan
from .choices import CostModel
from .graph import ModelGraph
from .impossible import no_mesh
from .layer_pins import bind_layers
from .mesh import Mesh, enumerate_meshes
from .plan import Plan
from .request import Request
from .search import Progress, Ranked, SearchResult, search
from .sharding import Sharding
from .space_bounds import space_candidates
from .workers import default_workers


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned: a traced model, its tensor-parallel layout and the hardware.

    sequence : the layout under sequence parallelism, None where the model does not allow it
    retrace : traces the model again at another sequence length and precision (None where that cannot be done)
    """

    graph: ModelGraph
    sharding: Sharding
    profile: Profile
    sequence: Sharding | None = None
    retrace: Callable[[int, str], Subject] | None = None

    def costs(self, request: Request) -> CostModel:
        """The cost model of a request, its layer pins bound to the units."""
        bound = replace(request, pins=bind_layers(request.pins, self.graph, self.sharding))
        return CostModel(self.graph, self.sharding, self.profile, bound, sequence=self.sequence)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search, beside what: layouts to rank, worker processes (0: one a core), and who is told of progress."""

    top: int = 1
    workers: int = 0
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True)
class Solved:
    """A request with its cost model, the meshes that were searched, and the search's result."""

    model: CostModel
    meshes: Sequence[Mesh]
    result: SearchResult

    @property
    def request(self) -> Request:
        """The request that was solved."""
        return self.model.request

    @property
    def best(self) -> Ranked | None:
        """The fastest plan, None if there is none."""
        return self.result.best

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the fastest plan."""
        return Mesh(*self.result.best.key) if self.result.best is not None else None

    def device_bytes(self, ranked: Ranked) -> int:
        """Bytes of the fullest device under a plan, everything included."""
        active = max(ranked.evaluation.stage_bytes)
        return active + self.model.reserve_bytes(active) + sum(self.model.fixed_bytes(Mesh(*ranked.key)).values())

    def plan(self, ranked: Ranked, fields: dict[str, Any]) -> Plan:
        """The plan file of one ranked layout; see `assemble.build_plan`."""
        return build_plan(self.model, Mesh(*ranked.key), ranked.assignment, ranked.evaluation, fields)


def prepare(subject: Subject, request: Request) -> tuple[CostModel, list[Mesh]]:
    """The cost model of a request and the meshes of its space.

    Raises
    ------
    UsageError, InfeasibleError
        If the pins (or the batch) leave no mesh; the constraint that they break is named.
    """
    model = subject.costs(request)

    def meshes_of(wanted: Request) -> list[Mesh]:
        return enumerate_meshes(wanted, model.space, model.links)

    meshes = meshes_of(model.request)
    if not meshes:
        raise no_mesh(model.request, subject.graph.name, subject.sharding, model.space, meshes_of)
    return model, meshes


def solve_for(
    subject: Subject,
    request: Request,
    options: SearchOptions = SearchOptions(),
    prepared: tuple[CostModel, list[Mesh]] | None = None,
) -> Solved:
    """Search the space of a request for its fastest plan.

    Parameters
    ----------
    subject, request : Subject, Request
        What to plan, and under which limits. The request's gap and time limit end the search.
    options : SearchOptions
    prepared : (CostModel, meshes), optional
        What `prepare` returned for this request, or a part of its meshes.
    """
    model, meshes = prepared or prepare(subject, request)
    result = search(
        space_candidates(model, meshes),
        gap=request.gap,
        time_limit_s=request.time_limit_s,
        on_progress=options.on_progress,
        top=options.top,
        group=layout_key if options.top > 1 else None,
        workers=options.workers or default_workers(),
    )
    return Solved(model, meshes, result)


def layout_key(key: tuple) -> Hashable:
    """What makes two meshes different layouts: the degrees and the chunks a rank, not microbatches or trifles."""
    mesh = Mesh(*key)
    return (mesh.tp, mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.virtual)
