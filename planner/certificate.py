"""The certificate of a plan: what was proven and in which time, its audit, and the programme as a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .assemble import model_section
from .graph import ModelGraph
from .mesh import Mesh
from .objectives import Goal
from .plan import SolverSection
from .plan_notes import space_description
from .planning import Solved

Say = Callable[[str, str], None]


class Clock:
    """Seconds of each part of the job."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Close the part `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin


def model_fields(graph: ModelGraph, loaded: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a plan that say what was planned, and with which versions."""
    return {
        "tpplan_version": _version("tpplan"),
        "torch_version": _version("torch"),
        "model": model_section(
            graph,
            layers=len(graph.units),
            loss=graph.loss or loaded.loss_description,
            loss_weighting=loaded.loss_weighting,
            **asked,
        ),
    }


def audited(solved: Solved, wanted: bool, workers: int, say: Say) -> list[str]:
    """What an audit of the search says, if one is wanted.

    Raises
    ------
    TpplanError
        If a pruned combination beats the proven bound.
    """
    if not wanted:
        return []
    from .audit import audit, demand

    found = audit(solved, workers, say)
    demand(found, solved)
    return [found.text()]


def write_programme(solved: Solved, path: Path) -> None:
    """Write the integer programme of the best plan's combination."""
    from .audit import dump_lp

    best = solved.best
    assert best is not None
    dump_lp(solved.model.problem(Mesh(*best.key)), path, solved.request.gap)


def solver_section(solved: Solved, goal: Goal, proofs: Sequence[str], clock: Clock) -> SolverSection:
    """The certificate of the search; the parts of the search are summed over its processes."""
    model, result = solved.model, solved.result
    parts = {f"search: {part}": seconds for part, seconds in result.seconds.items()}
    assert result.best is not None
    import highspy

    fields = {
        "status": "optimal" if result.status == "optimal" else "feasible",
        "objective_s": result.best.evaluation.step_time_s,
        "lower_bound_s": result.lower_bound_s,
        "gap": result.gap,
        "wall_s": clock.total(),
        "name": "HiGHS through PuLP",
        "version": highspy.Highs().version(),
        "candidates": result.candidates,
        "pruned": dict(result.pruned),
        "solved": result.solved,
        "infeasible": result.infeasible,
        "seconds": {name: round(s, 3) for name, s in {**clock.seconds, **parts}.items()},
        "objective": goal.objective,
        "proofs": list(proofs),
        "space": space_description(model.request, model.space, model.sharding),
    }
    return SolverSection.model_validate(fields)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
