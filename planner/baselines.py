"""The layouts that people use without a planner, priced by the same cost model: plain FSDP and the rule of thumb."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from .assemble import mesh_section
from .choices import CostModel
from .evaluate import Evaluation, evaluate
from .mesh import Mesh
from .pins import RECOMPUTE
from .plan import Baseline
from .problem import Assignment, Problem


def uniform_assignment(problem: Problem, recompute: str) -> Assignment | None:
    """Equal layer counts per stage (moved to the nearest legal cut), one recomputation mode everywhere.

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
    choices = []
    for layer in problem.layers:
        names = [c.name for c in layer.choices]
        choices.append(names.index(recompute) if recompute in names else 0)
    return Assignment((*boundaries, n), tuple(choices))


def best_uniform(model: CostModel, meshes: Sequence[Mesh]) -> tuple[Mesh, str, Evaluation] | None:
    """The fastest of `meshes` that fits, with equal stages and one recomputation mode."""
    best: tuple[Mesh, str, Evaluation] | None = None
    for mesh in meshes:
        problem = model.problem(mesh)
        for mode in RECOMPUTE:
            assignment = uniform_assignment(problem, mode)
            if assignment is None:
                continue
            evaluation = evaluate(problem, assignment)
            if evaluation.fits and (best is None or evaluation.step_time_s < best[2].step_time_s):
                best = (mesh, mode, evaluation)
                break
    return best


def plain_fsdp(model: CostModel, meshes: Sequence[Mesh]) -> Baseline | None:
    """The best layout with FSDP alone: dp_shard = GPUs, ZeRO-3 or ZeRO-2, any microbatch size and recomputation."""
    gpus = model.request.gpus
    only = [m for m in meshes if m.dp_shard == gpus]
    return _baseline("plain FSDP", only, best_uniform(model, only))


def rule_of_thumb(model: CostModel, meshes: Sequence[Mesh]) -> Baseline | None:
    """Folklore's layout: the least pp, then the least tp, that fits; then the largest microbatch that fits.

    Megatron-LM's guidance (Narayanan et al. 2021): tensor parallelism inside the node first, pipeline stages only
    where that does not fit, data parallelism for the rest; recomputation (selective, then full) only where needed;
    optimizer state sharded over the replicas, gradients reduced once a step.
    """
    usable = [m for m in meshes if m.dp_replicate == 1 and m.zero_stage == 2 and m.schedule == "1f1b"]
    usable = [m for m in usable if m.gradient_sync == "last"]
    usable.sort(key=lambda m: (m.pp, m.tp, -m.microbatch_size))
    for _, group in groupby(usable, key=lambda m: (m.pp, m.tp)):
        same_degrees = list(group)
        for mode in RECOMPUTE:
            for mesh in same_degrees:
                problem = model.problem(mesh)
                assignment = uniform_assignment(problem, mode)
                if assignment is not None and (evaluation := evaluate(problem, assignment)).fits:
                    return _baseline("rule of thumb", usable, (mesh, mode, evaluation))
    return _baseline("rule of thumb", usable, None)


def _baseline(name: str, meshes: Sequence[Mesh], found: tuple[Mesh, str, Evaluation] | None) -> Baseline | None:
    """A plan's entry for a baseline; None where the space holds no such layout."""
    if found is None:
        if not meshes:
            return None
        mesh = meshes[-1]
        return Baseline(
            name=name,
            mesh=mesh_section(mesh),
            microbatch_size=mesh.microbatch_size,
            recompute="full",
            zero_stage=mesh.zero_stage,
            step_time_s=None,
            fits=False,
        )
    mesh, mode, evaluation = found
    return Baseline(
        name=name,
        mesh=mesh_section(mesh),
        microbatch_size=mesh.microbatch_size,
        recompute=mode,
        zero_stage=mesh.zero_stage,
        step_time_s=evaluation.step_time_s,
        fits=True,
    )
