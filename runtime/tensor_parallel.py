"""Tensor parallelism on the user's eager module: parameters and activations become DTensors over tp.

The model's code is kept. Each parameter is sharded by the style of its module, or replicated; hooks on the
styled modules fix the placements at their borders:

    style    weight     input         output
    col      Shard(0)   Replicate     Shard(-1), or gathered to Replicate
    packed   Shard(0)   Replicate     PackedOutput (see packed.py)
    row      Shard(1)   Shard(-1)     Partial, summed to Replicate
    vocab    Shard(0)   token ids     Partial, summed to Replicate

(Hugging Face's Conv1D stores its weight transposed: dimensions 0 and 1 change places.) Integer inputs and
buffers stay plain tensors; inside `step_context` they count as replicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_map

from ..errors import PlanFileError
from ..planner.plan import ModuleStyle, TensorParallelSection
from .full_tensors import part_of_rank, shard_dim
from .interpose import find_names, interposed
from .local_region import runs_locally, use_local_region, use_local_regions
from .packed import PackedOutput
from .whole_operators import whole_operands_run_locally

# Attribute of an activation: itself behind the sum of its gradients, or True if it is behind it already.
_SUMMED = "_tpplan_summed"
_REPLICATE = ModuleStyle(style="replicate")


def apply_tensor_parallel(model: nn.Module, section: TensorParallelSection, tp_mesh: DeviceMesh) -> None:
    """Shard `model` over `tp_mesh` in place, as `section` says.

    Parameters may be on meta or real; real ones are cut from their full values (each rank must hold equal
    ones). Modules of other pipeline stages (without parameters, or absent) are passed over. Apply before
    `fully_shard`, compile and checkpoint wrappers.

    Parameters
    ----------
    model : nn.Module
        The whole model, or one stage of it.
    section : TensorParallelSection
        Styles by module FQN.
    tp_mesh : DeviceMesh
        One-dimensional, its dimension named "tp".

    Raises
    ------
    PlanFileError
        If a style does not fit its module, tp does not divide a sharded dimension, or tied modules disagree.
    """
    dims = _sharded_dims(model, section)
    divided = {name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in dims}
    done: dict[int, nn.Parameter] = {}
    for fqn, module in model.named_modules():
        style = section.styles.get(fqn, _REPLICATE)
        owned = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in owned:
            where = f"{fqn}.{name}".lstrip(".")
            if id(parameter) not in done:
                dim, owner_style, owner = dims.get(id(parameter), (None, style, where))
                new = _sharded_parameter(parameter, dim, owner_style, tp_mesh, owner)
                done[id(parameter)] = done[id(new)] = new
            module._parameters[name] = done[id(parameter)]
        if owned:
            _set_borders(module, fqn, style, tp_mesh)
        children = (section.styles.get(f"{fqn}.{name}".lstrip(".")) for name, _ in module.named_children())
        if any(child is not None and child.style in ("col", "packed") for child in children):
            module.register_forward_pre_hook(_sum_at_the_door, with_kwargs=True)
    use_local_regions(model, divided, tp_mesh)
    find_names(model)


@contextmanager
def step_context(section: TensorParallelSection) -> Iterator[None]:
    """Around forward and backward of a step, and nothing else.

    Plain tensors count as replicated, attention runs on local heads, and the loss on sharded logits if the plan
    says so.
    """
    with ExitStack() as stack:
        stack.enter_context(implicit_replication())
        stack.enter_context(interposed())
        stack.enter_context(whole_operands_run_locally())
        if section.loss_parallel:
            stack.enter_context(loss_parallel())
        yield


def wrap_activation(tensor: torch.Tensor, tp_mesh: DeviceMesh) -> torch.Tensor:
    """A float activation from outside (another stage) as a replicated DTensor; others are returned unchanged.

    Its gradient comes back summed over tp, as a plain tensor.
    """
    if isinstance(tensor, DTensor) or not tensor.is_floating_point():
        return tensor
    return DTensor.from_local(tensor, tp_mesh, [Replicate()], run_check=False)


def unwrap_activation(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor activation as a plain, whole tensor (to send to another stage, or to log)."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()


def _sharded_dims(model: nn.Module, section: TensorParallelSection) -> dict[int, tuple[int, ModuleStyle, str]]:
    """Which parameters tp divides, by identity: tied names must agree, names without a style follow."""
    dims: dict[int, tuple[int, ModuleStyle, str]] = {}
    for fqn, module in model.named_modules():
        style = section.styles.get(fqn, _REPLICATE)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            where = f"{fqn}.{name}".lstrip(".")
            dim = shard_dim(module, name, style, where)
            known = dims.get(id(parameter))
            if known is not None and dim is not None and (known[0] != dim or known[1].sizes != style.sizes):
                raise PlanFileError(
                    f"{where} and {known[2]} are one tensor, but the plan splits them differently.",
                    "Give tied modules the same split, or plan again with `tpplan suggest`.",
                )
            if dim is not None:
                dims[id(parameter)] = (dim, style, where)
    return dims


def _sharded_parameter(
    parameter: nn.Parameter, dim: int | None, style: ModuleStyle, mesh: DeviceMesh, where: str
) -> nn.Parameter:
    """`parameter` as a DTensor that holds this rank's part."""
    placement: Placement = Replicate() if dim is None else Shard(dim)
    local = part_of_rank(parameter.detach(), dim, style, mesh.size(), mesh.get_local_rank(), where)
    sharded = DTensor.from_local(
        local.contiguous().clone(),
        mesh,
        [placement],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    new = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    for name, value in vars(parameter).items():  # marks that the user's code left on it
        setattr(new, name, value)
    return new


def _set_borders(module: nn.Module, fqn: str, style: ModuleStyle, mesh: DeviceMesh) -> None:
    """Hook the placements of `module`'s input and output."""
    if style.style == "replicate":
        if runs_locally(module):
            use_local_region(module, mesh)
        return
    if style.style == "vocab":
        return  # embedding_on_local_rows sees the sharded weight
    wanted = Shard(-1) if style.style == "row" else Replicate()
    module.register_forward_pre_hook(partial(_place_input, mesh, wanted))
    if style.style == "packed":
        module.register_forward_hook(partial(_pack_output, fqn, tuple(style.sizes)))
    elif style.style == "row" or style.output == "replicate":
        module.register_forward_hook(_replicate_output)


def _place_input(mesh: DeviceMesh, wanted: Placement, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    first = cast(DTensor, wrap_activation(args[0], mesh))
    placement = Shard(first.ndim - 1) if wanted.is_shard() else wanted
    if first.placements != (placement,):
        first = first.redistribute(placements=[placement])
    elif placement.is_replicate():
        first = _sum_gradient(first)
    return (first, *args[1:])


def _sum_gradient(tensor: Any) -> Any:
    """`tensor`, with its gradient summed over tp here, once for all the projections that read it.

    Left to itself DTensor carries the partial sums further, through norms and into the weight gradients of the
    row-sharded layers before (16 all-gathers and 12 reduce-scatters instead of 9 all-reduces in a 4-layer
    Llama). What is no replicated DTensor with a gradient is returned as it is.
    """
    if not isinstance(tensor, DTensor) or not tensor.requires_grad or tensor.placements != (Replicate(),):
        return tensor
    seen = getattr(tensor, _SUMMED, None)
    if seen is True:
        return tensor
    if seen is None:
        seen = _summed(tensor)
        setattr(tensor, _SUMMED, seen)
    return seen


def _summed(tensor: DTensor) -> DTensor:
    local = tensor.to_local()
    summed = DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False)
    setattr(summed, _SUMMED, True)
    return summed


def _sum_at_the_door(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Sum the gradients of the inputs of a module that holds projections.

    They may come from outside a compiled region, where the projections inside must not leave a mark on them.
    """
    return tree_map(_sum_unmarked, (args, kwargs))


def _sum_unmarked(tensor: Any) -> Any:
    wanted = isinstance(tensor, DTensor) and tensor.requires_grad and tensor.placements == (Replicate(),)
    return _summed(tensor) if wanted and getattr(tensor, _SUMMED, None) is None else tensor


def _replicate_output(module: nn.Module, args: Any, output: DTensor) -> DTensor:
    return output.redistribute(placements=[Replicate()])


def _pack_output(fqn: str, sizes: tuple[int, ...], module: nn.Module, args: Any, output: DTensor) -> PackedOutput:
    return PackedOutput(output.to_local(), output.device_mesh, output.ndim - 1, sizes, fqn)
