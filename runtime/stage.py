"""This rank's stage of the model: checked against the plan, stubbed, sharded over tp, wrapped, given its weights
and sharded over data parallel ranks.

Order: meta build, stubs, tensor parallelism, compile and recomputation, weights and `fully_shard` unit by unit,
`fully_shard` of the rest, exit hooks.
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
from .data_parallel import shard_parameters, wrappable_units
from .gradients import SharedParameters
from .initialise import Materialiser, initial_tensors
from .mesh import RankMesh
from .part import Part
from .recompute import wrap_units
from .stubs import Border, answer_for_parameters, hollow_parameter, hook_own_units, parse_wire, stub_unit
from .tensor_parallel import apply_tensor_parallel
from .unit_outputs import record_unit_outputs


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How weights are made and where the stage lives.

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
    """A stage ready to train."""

    section: StageSection
    part: Part
    border: Border
    shared: SharedParameters
    compute_dtype: torch.dtype

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the user's FQNs."""
        return dict(self.part.model.named_parameters())


def build_stage(target: Target, plan: Plan, mesh: RankMesh, example: Inputs, options: BuildOptions) -> Stage:
    """Build the stage of this rank; a collective call.

    Parameters
    ----------
    example : Inputs
        One microbatch on the CPU, for the shapes of what crosses stage borders.

    Raises
    ------
    PlanFileError
        If the plan is for another model.
    """
    model = target.build("meta")
    check_plan_fits(model, plan)
    index = mesh.rank("pp")
    section = plan.stages[index]
    compute_dtype = torch.float64 if options.float64 else getattr(torch, plan.precision.compute_dtype)
    if options.float64:
        model = model.to(torch.float64)
    aliases = parameter_aliases(model)
    holders = parameter_holders(model, plan)
    outputs, border = {}, Border()
    if len(plan.stages) > 1:
        everyone = [fqn for stage in plan.stages for fqn in stage.modules]
        around = modules_around(plan)
        whole = dict(model.named_parameters())
        outputs = record_unit_outputs(model, [*everyone, *around], example, compute_dtype, target)
        border.receives = tuple(parse_wire(name, outputs) for name in section.receives)
        border.sends = tuple(parse_wire(name, outputs) for name in section.sends)
        for fqn in everyone:
            if fqn not in section.modules:
                stub_unit(model, fqn, outputs, border, options.device)
        for fqn in around & {wire.fqn for wire in border.receives}:  # it ended in an earlier stage
            stub_unit(model, fqn, outputs, border, options.device)
        for name in [n for n, _ in model.named_parameters(remove_duplicate=False)]:
            if index not in holders[aliases[name]]:
                hollow_parameter(model, name, options.device)
        answer_for_parameters(model, whole, options.device)
    blocks = [fqn for fqn in section.modules if fqn.rpartition(".")[2].isdigit()] if options.compiled else []
    if mesh.degree("tp") > 1:
        apply_tensor_parallel(model, plan.tensor_parallel, mesh.tp, section.fsdp_units, blocks)
    if compute_dtype.itemsize < 4:
        keep_batch_norm_in_float32(model)
    wrap_units(model, section.recompute, frozenset(blocks))
    part = Part(model, target, border, mesh, compute_dtype)
    dtype = torch.float64 if options.float64 else None
    with initial_tensors(target, options.seed, options.init_from, dtype) as tensors:
        units = wrappable_units(model, section.fsdp_units)
        materialiser = Materialiser(tensors, plan.tensor_parallel, options.device)
        shard_parameters(part, model, units, plan, mesh, compute_dtype, materialiser)
    if index + 1 < len(plan.stages):
        ended_here = modules_around(plan) & ({w.fqn for w in border.sends} - {w.fqn for w in border.receives})
        hook_own_units(model, [*section.modules, *sorted(ended_here)], outputs, border)
    mine = {aliases[name]: p for name, p in model.named_parameters()}
    return Stage(section, part, border, SharedParameters(holders, mine, mesh), compute_dtype)


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
    groups = [(s.modules, s.replicated_modules, s.recompute, s.fsdp_units) for s in plan.stages]
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
