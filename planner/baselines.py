"""The layouts that people use without a planner, priced by the same cost model: plain FSDP and the rule of thumb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .assemble import mesh_section
from .choices import CostModel
from .evaluate import Evaluation, evaluate
from .mesh import Mesh
from .pins import RECOMPUTE
from .plan import Baseline
from .problem import Assignment, Choice, Problem


def uniform_assignment(problem: Problem, recompute: str, zero_stage: int) -> Assignment | None:
    """Equal layer counts per stage (moved to the nearest legal cut), one recomputation and ZeRO level everywhere.

    None where the legal cuts do not allow as many stages.
    """
    n = len(problem.layers)
    cuts = [i + 1 for i, layer in enumerate(problem.layers[:-1]) if layer.cut_after]
    boundaries: list[int] = []
    for stage in range(1, problem.stages):
        wanted = n * stage / problem.stages
        free = [c for c in cuts if not boundaries or c > boundaries[-1]]
        if not free:
            return None
        boundaries.append(min(free, key=lambda c: (abs(c - wanted), c)))
    asked = (recompute, zero_stage)
    choices = [
        max(range(len(layer.choices)), key=lambda o: _likeness(layer.choices[o], asked)) for layer in problem.layers
    ]
    return Assignment((*boundaries, n), tuple(choices))


def _likeness(choice: Choice, asked: tuple[str, int]) -> tuple[bool, bool, bool]:
    """How well a choice is the one asked for (max takes the first of the best)."""
    return choice.name == asked[0], choice.zero_stage == asked[1], choice.sharding == "tp"


@dataclass(frozen=True, slots=True)
class Uniform:
    """A layout that is the same everywhere."""

    mesh: Mesh
    recompute: str
    zero_stage: int
    evaluation: Evaluation


def best_uniform(model: CostModel, meshes: Sequence[Mesh], zero_stages: Sequence[int]) -> Uniform | None:
    """The fastest of `meshes` that fits, with equal stages, one recomputation mode and one ZeRO level."""
    best: Uniform | None = None
    for mesh in meshes:
        problem = model.problem(mesh)
        for zero in zero_stages:
            for mode in RECOMPUTE:
                assignment = uniform_assignment(problem, mode, zero)
                if assignment is None:
                    continue
                evaluation = evaluate(problem, assignment)
                if evaluation.fits and (best is None or evaluation.step_time_s < best.evaluation.step_time_s):
                    best = Uniform(mesh, mode, zero, evaluation)
                if evaluation.fits:
                    break
    return best


def plain_fsdp(model: CostModel, meshes: Sequence[Mesh]) -> Baseline | None:
    """The best layout with FSDP alone: dp_shard = GPUs, ZeRO-3 or ZeRO-2, any microbatch size and recomputation."""
    gpus = model.request.gpus
    only = [m for m in meshes if m.dp_shard == gpus]
    model.prepare(only)
    return _baseline("plain FSDP", only, best_uniform(model, only, (2, 3)))


def rule_of_thumb(model: CostModel, meshes: Sequence[Mesh]) -> Baseline | None:
    """Folklore's layout: the least pp, then the least tp, that fits; then the largest microbatch that fits.

    Megatron-LM's guidance (Narayanan et al. 2021): tensor parallelism inside the node first, pipeline stages only
    where that does not fit, data parallelism for the rest; recomputation (selective, then full) only where needed;
    optimizer state sharded over the replicas, gradients reduced once a step.
    """
    usable = [m for m in meshes if m.dp_replicate == 1 and m.schedule == "1f1b" and not m.sequence_parallel]
    usable = [m for m in usable if m.gradient_sync == "last" and m.order == 0]
    usable.sort(key=lambda m: (m.pp, m.tp, -m.microbatch_size))
    for _, group in groupby(usable, key=lambda m: (m.pp, m.tp)):
        same_degrees = list(group)
        model.prepare(same_degrees)
        for mode in RECOMPUTE:
            for mesh in same_degrees:
                problem = model.problem(mesh)
                assignment = uniform_assignment(problem, mode, 2)
                if assignment is not None and (evaluation := evaluate(problem, assignment)).fits:
                    return _baseline("rule of thumb", usable, Uniform(mesh, mode, 2, evaluation))
    return _baseline("rule of thumb", usable, None)


def _baseline(name: str, meshes: Sequence[Mesh], found: Uniform | None) -> Baseline | None:
    """A plan's entry for a baseline; None where the space holds no such layout."""
    if not meshes:
        return None
    mesh = found.mesh if found is not None else meshes[-1]
    return Baseline(
        name=name,
        mesh=mesh_section(mesh),
        microbatch_size=mesh.microbatch_size,
        recompute=found.recompute if found is not None else "full",
        zero_stage=found.zero_stage if found is not None else 3,
        step_time_s=found.evaluation.step_time_s if found is not None else None,
        fits=found is not None,
    )
