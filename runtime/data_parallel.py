"""Data parallelism: FSDP2 over the (dp_replicate, dp_shard) mesh, also where both degrees are 1.

Gradients are summed, not averaged: the loss of every microbatch is already divided by what the whole global
batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..planner.plan import Plan, StageSection
from .mesh import RankMesh


def wrappable_units(model: nn.Module, units: Iterable[str]) -> list[str]:
    """Those of `units` that `fully_shard` can wrap alone: they own parameters and share none with the rest.

    A tied parameter has one owner in FSDP, the root.
    """
    owners: dict[int, set[str]] = {}
    names = list(units)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((unit for unit in names if name.startswith(f"{unit}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    shared = {owner for group in owners.values() if len(group) > 1 for owner in group}
    owning = {owner for group in owners.values() for owner in group}
    return [unit for unit in names if unit in owning and unit not in shared]


def scalar_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of `module` without dimensions (a logit scale), which FSDP2 does not take."""
    return {parameter for parameter in module.parameters() if parameter.ndim == 0}


def sum_scalar_gradients(module: nn.Module, mesh: RankMesh) -> None:
    """Sum the gradients of the scalar parameters over the replicas, as FSDP does for all others."""
    if mesh.replicas == 1:
        return
    for _, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        if parameter.ndim == 0 and parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            for axis in ("dp_replicate", "dp_shard"):
                dist.all_reduce(gradient, group=mesh.whole[axis].get_group())


def shard_parameters(
    root: nn.Module,
    model: nn.Module,
    units: Iterable[str],
    kept: Collection[str],
    mesh: RankMesh,
    compute_dtype: torch.dtype,
    materialise: Callable[[nn.Module, str], None],
) -> None:
    """Apply `fully_shard` to each of `units`, then to `root`, which takes what is left.

    Those of `units` that are in `kept` stay gathered from forward to backward, as the root does.
    ``materialise(module, fqn)`` is called just before a module is sharded, so that a rank holds the
    whole tensors of one unit at a time.
    """
    reduced = compute_dtype in (torch.bfloat16, torch.float16)
    dtypes = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32} if reduced else {}
    dp = mesh.data_parallel
    for fqn in units:
        module = model.get_submodule(fqn)
        materialise(module, fqn)
        fully_shard(
            module,
            mesh=dp,
            reshard_after_forward=fqn not in kept,
            mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=True),
            ignored_params=scalar_parameters(module),
        )
    materialise(model, "")
    # What the root owns (tied embeddings, loose parameters) stays gathered; received tensors are not cast.
    fully_shard(
        root,
        mesh=dp,
        reshard_after_forward=False,
        mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False),
        ignored_params=scalar_parameters(root),
    )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def kept_gathered(plan: Plan, section: StageSection) -> list[str]:
    """The units of a stage that keep their gathered weights from forward to backward (ZeRO-2)."""
    return section.kept_gathered if plan.sharding.reshard_after_forward else section.fsdp_units


class GradientSync:
    """When FSDP reduces a stage's gradients and lets weights go, microbatch by microbatch.

    gradient_sync "every" reduces after each microbatch, "last" accumulates whole gradients and reduces once.
    With "last", weights that stay gathered through a microbatch stay so until the last one; the others, gathered
    again for each backward, go after each.

    Parameters
    ----------
    root : FSDPModule
        What `shard_parameters` was given as the root.
    model : nn.Module
        The user's model inside it.
    kept : iterable of str
        Its units that stay gathered; the root always does.
    """

    def __init__(self, root: FSDPModule, model: nn.Module, kept: Iterable[str], plan: Plan) -> None:
        self._root = root
        self._every = plan.schedule.gradient_sync == "every"
        units = [model.get_submodule(fqn) for fqn in kept]
        self._kept = [root, *(unit for unit in units if isinstance(unit, FSDPModule))]

    def before_backward(self, last: bool) -> None:
        """Set the switches for the backward of one microbatch; `last` in this step or not."""
        reduces = last or self._every
        # "Last" for FSDP is each backward that reduces: only then does it let the reduction's buffers go. Told so of
        # the step's last one alone, it kept a second copy of all sharded gradients.
        self._root.set_is_last_backward(reduces)
        self._root.set_requires_gradient_sync(reduces)
        for module in self._kept:
            module.set_reshard_after_backward(reduces, recurse=False)
