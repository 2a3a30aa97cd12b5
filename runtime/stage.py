"""This rank's stages of the model: checked against the plan, stubbed, sharded over tp, wrapped, given their weights
and sharded over data parallel ranks.

Order: meta build, stubs, tensor parallelism, compile and recomputation, weights and `fully_shard` unit by unit,
`fully_shard` of the rest, exit hooks. A rank has one stage, or with an interleaved schedule several chunks, each
with a model of its own: with pp 2 and 2 chunks a rank,

    rank 0:  [stage 0]           [stage 2]
    rank 1:            [stage 1]           [stage 3] -> loss
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import PlanFileError
from ..planner.inputs import Inputs
from ..planner.plan import Plan, StageSection
from ..planner.target import Target
from .batch_norm import keep_batch_norm_in_float32
from .data_parallel import kept_gathered, shard_parameters, wrappable_units
from .gradients import SharedParameters
from .initialise import Materialiser, initial_tensors
from .mesh import RankMesh
from .part import Part
from .recompute import wrap_units
from .sequence import split_wire
from .stubs import Border, answer_for_parameters, hollow_parameter, hook_own_units, parse_wire, stub_unit
from .tensor_parallel import apply_tensor_parallel
from .unit_outputs import UnitOutputs, record_unit_outputs


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How weights are made and where the stages live.

    float64 : parameters, buffers and compute in float64, whatever the plan's precision (numeric checks)
    compiled : blocks run under torch.compile
    """

    device: torch.device
    seed: int = 0
    init_from: Path | None = None
    float64: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage ready to train; ``part.model`` is a copy of the user's module that holds this stage's parameters."""

    section: StageSection
    part: Part
    border: Border


@dataclass(frozen=True, slots=True)
class RankStages:
    """All stages of one rank: one, or the chunks of an interleaved schedule in their order."""

    stages: tuple[Stage, ...]
    shared: SharedParameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the user's FQNs, each once."""
        everything = (item for stage in self.stages for item in stage.part.model.named_parameters())
        return {name: parameter for name, parameter in everything if id(parameter) not in self.shared.followers}


def build_stages(target: Target, plan: Plan, mesh: RankMesh, example: Inputs, options: BuildOptions) -> RankStages:
    """Build the stages of this rank; a collective call.

    Parameters
    ----------
    example : Inputs
        One microbatch on the CPU, for the shapes of what crosses stage borders.

    Raises
    ------
    PlanFileError
        If the plan is for another model.
    """
    sections = sections_of(plan, mesh.rank("pp"))
    first = _build_on_meta(target, options)
    check_plan_fits(first, plan)
    # Each stage stubs the others' units: it needs a model of its own.
    models = [first, *(_build_on_meta(target, options) for _ in sections[1:])]
    aliases, holders = parameter_aliases(first), parameter_holders(first, plan)
    compute_dtype = torch.float64 if options.float64 else getattr(torch, plan.precision.compute_dtype)
    outputs: UnitOutputs = {}
    if len(plan.stages) > 1:
        everyone = [fqn for stage in plan.stages for fqn in stage.modules]
        outputs = record_unit_outputs(first, [*everyone, *modules_around(plan)], example, compute_dtype, target)
    stages = []
    for model, section in zip(models, sections, strict=True):
        border = _cut_out(model, plan, section, outputs, holders, options.device)
        _apply_to_units(model, plan, section, mesh, compute_dtype, options.compiled)
        stages.append(Stage(section, Part(model, target, border, mesh, compute_dtype), border))
    dtype = torch.float64 if options.float64 else None
    with initial_tensors(target, options.seed, options.init_from, dtype) as tensors:
        for stage in stages:
            model = stage.part.model
            units, kept = wrappable_units(model, stage.section.fsdp_units), kept_gathered(plan, stage.section)
            materialiser = Materialiser(tensors, plan.tensor_parallel, options.device)
            shard_parameters(stage.part, model, units, kept, mesh, compute_dtype, materialiser)
    for stage in stages:
        if stage.section.index + 1 < len(plan.stages):
            sent, received = stage.border.sends, stage.border.receives
            ended_here = modules_around(plan) & ({wire.fqn for wire in sent} - {wire.fqn for wire in received})
            units = [*stage.section.modules, *sorted(ended_here)]
            hook_own_units(stage.part.model, units, outputs, stage.border)
    mine = [{aliases[name]: p for name, p in stage.part.model.named_parameters()} for stage in stages]
    ranks = [section.pipeline_rank for section in plan.stages]
    return RankStages(tuple(stages), SharedParameters(holders, mine, ranks, mesh))


def sections_of(plan: Plan, pipeline_rank: int) -> list[StageSection]:
    """The stages of one pipeline rank: stage i runs on rank i modulo the pipeline degree.

    Raises
    ------
    PlanFileError
        If the plan's stages are not as many as its degrees say, or lie on other ranks.
    """
    degree, chunks = plan.mesh.pipeline_parallel_degree, plan.schedule.virtual_stages
    for i, section in enumerate(plan.stages):
        if section.index != i or section.pipeline_rank != i % degree:
            raise PlanFileError(
                f"Stage {i} of the plan has index {section.index} on pipeline rank {section.pipeline_rank}; it must be "
                f"on rank {i % degree}.",
                "Write the plan again with `tpplan suggest`, or undo the edit.",
            )
    if len(plan.stages) != degree * chunks:
        raise PlanFileError(
            f"The plan has {len(plan.stages)} stages for {degree} pipeline ranks with {chunks} each.",
            "Write the plan again with `tpplan suggest`, or undo the edit.",
        )
    return [section for section in plan.stages if section.pipeline_rank == pipeline_rank]


def _build_on_meta(target: Target, options: BuildOptions) -> nn.Module:
    model = target.build("meta")
    return model.to(torch.float64) if options.float64 else model


def _cut_out(
    model: nn.Module,
    plan: Plan,
    section: StageSection,
    outputs: UnitOutputs,
    holders: Mapping[str, tuple[int, ...]],
    device: torch.device,
) -> Border:
    """Leave only one stage of `model`: stubs for the units of others, and no parameters but its own."""
    border = Border()
    if len(plan.stages) == 1:
        return border
    aliases, whole = parameter_aliases(model), dict(model.named_parameters())
    tp = plan.mesh.tensor_parallel_degree
    wires = [[parse_wire(name, outputs) for name in names] for names in (section.receives, section.sends)]
    border.receives, border.sends = (tuple(split_wire(w, plan.tensor_parallel, tp) for w in side) for side in wires)
    for fqn in (fqn for stage in plan.stages for fqn in stage.modules):
        if fqn not in section.modules:
            stub_unit(model, fqn, outputs, border, device)
    for fqn in modules_around(plan) & {wire.fqn for wire in border.receives}:  # it ended in an earlier stage
        stub_unit(model, fqn, outputs, border, device)
    for name in [n for n, _ in model.named_parameters(remove_duplicate=False)]:
        if section.index not in holders[aliases[name]]:
            hollow_parameter(model, name, device)
    answer_for_parameters(model, whole, device)
    return border


def _apply_to_units(
    model: nn.Module,
    plan: Plan,
    section: StageSection,
    mesh: RankMesh,
    compute_dtype: torch.dtype,
    compiled: bool,
) -> None:
    """Tensor parallelism, then compile and recomputation of the units of one stage."""
    blocks = [fqn for fqn in section.modules if fqn.rpartition(".")[2].isdigit()] if compiled else []
    if mesh.degree("tp") > 1:
        apply_tensor_parallel(model, plan.tensor_parallel, mesh.tp, section.fsdp_units, blocks)
    if compute_dtype.itemsize < 4:
        keep_batch_norm_in_float32(model)
    wrap_units(model, section.recompute, frozenset(blocks))


def modules_around(plan: Plan) -> set[str]:
    """Modules around several units whose own results cross stage borders: levels that reshape what their units made."""
    units = {fqn for stage in plan.stages for fqn in stage.modules}
    return {name.rsplit(":", 2)[0] for stage in plan.stages for name in stage.sends} - units


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter to the canonical one, the first of `named_parameters()`."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def parameter_holders(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Canonical parameter name to the stages that hold it.

    A parameter of a unit is held by the unit's stage; one outside all units by those that the plan names, or
    by all if it names none.
    """
    stage_of = {fqn: stage.index for stage in plan.stages for fqn in stage.modules}
    holders: dict[str, set[int]] = {}
    for name, canonical in parameter_aliases(model).items():
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        owner = next((stage_of[prefix] for prefix in prefixes if prefix in stage_of), None)
        named = plan.parameters.get(canonical)
        loose = named.stages if named and named.stages else range(len(plan.stages))
        holders.setdefault(canonical, set()).update(loose if owner is None else [owner])
    return {name: tuple(sorted(stages)) for name, stages in holders.items()}


def check_plan_fits(model: nn.Module, plan: Plan) -> None:
    """Raise PlanFileError unless `model` has the modules and parameters that the plan speaks of."""
    remedy = f"The plan is for {plan.model.name}: plan this model again with `tpplan suggest`."
    modules = dict(model.named_modules())
    named: Mapping[str, object] = dict(model.named_parameters(remove_duplicate=False))
    groups = [(s.modules, s.replicated_modules, s.recompute, s.fsdp_units, s.kept_gathered) for s in plan.stages]
    listed = [fqn for group in groups for names in group for fqn in names] + list(plan.tensor_parallel.styles)
    for fqn in listed:
        if fqn not in modules:
            raise PlanFileError(f"This model has no module {fqn}, which the plan places.", remedy)
    for name in plan.parameters:
        if name not in named:
            raise PlanFileError(f"This model has no parameter {name}, which the plan places.", remedy)
    count = sum(p.numel() for p in model.parameters())
    if plan.model.parameters and count != plan.model.parameters:
        raise PlanFileError(f"This model has {count} parameters, the plan's {plan.model.parameters}.", remedy)
    owners: dict[str, int] = {}
    for stage in plan.stages:
        for fqn in stage.modules:
            if owners.setdefault(fqn, stage.index) != stage.index:
                raise PlanFileError(
                    f"{fqn} runs in stages {owners[fqn]} and {stage.index}; a module can run in one only.",
                    "Plan again with another pp (--fix pp=N).",
                )
