"""Tensor parallelism on the user's eager module: parameters and activations become DTensors over tp.

The model's code is kept. Each parameter is sharded by the style of its module, or replicated; hooks on the
styled modules fix the placements at their borders:

    style    weight     input         output
    col      Shard(0)   Replicate     Shard(-1), or gathered to Replicate
    packed   Shard(0)   Replicate     PackedOutput (see packed.py)
    row      Shard(1)   Shard(-1)     Partial, summed to Replicate (or scattered: sequence.py)
    vocab    Shard(0)   token ids     Partial, summed to Replicate
    channel  Shard(0)   see channels.py (as for col and row on convolutions)
    region   by name    see experts.py
    heads    by name    see heads.py

(Hugging Face's Conv1D stores its weight transposed: dimensions 0 and 1 change places.) Integer inputs and
buffers stay plain tensors; inside `step_context` they count as replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.placement_types import Placement
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..errors import PlanFileError
from ..planner.plan import ModuleStyle, TensorParallelSection
from .experts import use_summed_region
from .full_tensors import listed_split, part_of_rank, segments_of, shard_dim
from .heads import use_local_heads
from .interpose import find_names, interposed
from .local_region import runs_locally, use_local_region, use_local_regions
from .packed import PackedOutput, name_in_messages
from .packed_products import note_packed_weight
from .placements import sum_gradient, sum_unmarked, wrap_activation
from .sequence import each_once, gathered, gathered_once, is_stream, scatter_output, split_stream, use_whole_tokens
from .split_loss import loss_on_split_classes
from .whole_operators import whole_operands_run_locally

_REPLICATE = ModuleStyle(style="replicate")


def apply_tensor_parallel(
    model: nn.Module,
    section: TensorParallelSection,
    tp_mesh: DeviceMesh,
    units: Collection[str] = (),
    compiled: Collection[str] = (),
) -> None:
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
    units : collection of str
        FQNs of the modules that `fully_shard` will wrap one by one.
    compiled : collection of str
        FQNs of the modules that will be compiled.

    Raises
    ------
    PlanFileError
        If a style does not fit its module, tp does not divide a sharded dimension, or tied modules disagree.
    """
    dims = _sharded_dims(model, section)
    names = list(model.named_parameters(remove_duplicate=False))
    divided = {name.rpartition(".")[0] for name, parameter in names if id(parameter) in dims}
    inside = {fqn for fqn, style in section.styles.items() if style.style in ("heads", "region")}
    done: dict[int, nn.Parameter] = {}
    for fqn, module in model.named_modules():
        style = section.styles.get(fqn, _REPLICATE)
        owned = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in owned:
            if id(parameter) not in done:
                split = dims.get(id(parameter)) or Split(None, None, f"{fqn}.{name}".lstrip("."))
                new = _sharded_parameter(parameter, split, tp_mesh)
                done[id(parameter)] = done[id(new)] = new
            module._parameters[name] = done[id(parameter)]
            found = dims.get(id(parameter))
            if style.style == "parameters" and found is not None and found.segments and parameter.ndim == 2:
                note_packed_weight(module, name, found.segments)
        if style.output == "sequence" and style.style != "row":
            use_whole_tokens(module, tp_mesh)
        within = any(fqn.startswith(f"{name}.") for name in inside)
        if (owned or fqn in section.styles) and not within:
            _set_borders(module, fqn, style, tp_mesh)
        children = (section.styles.get(f"{fqn}.{name}".lstrip(".")) for name, _ in module.named_children())
        if any(child is not None and child.style in ("col", "packed") for child in children):
            # A module that works on the stream itself leaves the gathering to its projections.
            place = sum_unmarked if fqn in section.sequence_modules else _gathered_or_summed
            module.register_forward_pre_hook(partial(_at_the_door, place), with_kwargs=True)
    if section.sequence_parallel:
        split_stream(model, section, tp_mesh)
    use_local_regions(model, divided | inside, tp_mesh, units, compiled)
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
            stack.enter_context(loss_on_split_classes())
        yield


@dataclass(frozen=True, slots=True)
class Split:
    """How tp divides a parameter: along `dim`, each of `segments` where it is packed; `where` it was said."""

    dim: int | None
    segments: list[int] | None
    where: str


def _sharded_dims(model: nn.Module, section: TensorParallelSection) -> dict[int, Split]:
    """Which parameters tp divides, by identity: tied names must agree, names without a style follow."""
    dims: dict[int, Split] = {}
    for fqn, module in model.named_modules():
        style = section.styles.get(fqn, _REPLICATE)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            where = f"{fqn}.{name}".lstrip(".")
            listed = listed_split(where, section)
            dim = listed[0] if listed is not None else shard_dim(module, name, style, where)
            if dim is None:
                continue
            split = Split(dim, segments_of(where, section), where)
            known = dims.setdefault(id(parameter), split)
            if (known.dim, known.segments) != (split.dim, split.segments):
                raise PlanFileError(
                    f"{where} and {known.where} are one tensor, but the plan splits them differently.",
                    "Give tied modules the same split, or plan again with `tpplan suggest`.",
                )
    return dims


def _sharded_parameter(parameter: nn.Parameter, split: Split, mesh: DeviceMesh) -> nn.Parameter:
    """`parameter` as a DTensor that holds this rank's part."""
    new = nn.Parameter(_sharded(parameter.detach(), split, mesh), requires_grad=parameter.requires_grad)
    for name, value in vars(parameter).items():  # marks that the user's code left on it
        setattr(new, name, value)
    return new


def _sharded(tensor: torch.Tensor, split: Split, mesh: DeviceMesh) -> DTensor:
    placement: Placement = Replicate() if split.dim is None else Shard(split.dim)
    local = part_of_rank(tensor, split.dim, split.segments, mesh.size(), mesh.get_local_rank(), split.where)
    return DTensor.from_local(
        local.contiguous().clone(), mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _set_borders(module: nn.Module, fqn: str, style: ModuleStyle, mesh: DeviceMesh) -> None:
    """Hook the placements of `module`'s input and output."""
    if style.style == "replicate":
        if runs_locally(module):
            use_local_region(module, mesh)
        return
    if style.style == "region":
        use_summed_region(module, fqn, style, mesh)
        return
    if style.style == "heads":
        use_local_heads(module, fqn, mesh)
        return
    if style.style == "channel" and isinstance(module, _NormBase):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.ndim == 1:  # running statistics
                module._buffers[name] = _sharded(buffer, Split(0, None, f"{fqn}.{name}"), mesh)
    if style.style == "packed":
        name_in_messages(module, fqn)
    if style.style in ("vocab", "channel", "parameters"):
        return  # the functions that they call see the sharded parameters
    if isinstance(module, _ConvNd):
        channels = module.weight.ndim - 1  # from the end
        if style.style == "packed":
            module.register_forward_hook(partial(_pack_output, tuple(style.sizes), channels))
        elif style.style == "col" and style.output == "replicate":
            module.register_forward_hook(_replicate_output)
        return
    wanted = Shard(-1) if style.style == "row" else Replicate()
    module.register_forward_pre_hook(partial(_place_input, mesh, wanted))
    if style.style == "packed":
        module.register_forward_hook(partial(_pack_output, tuple(style.sizes), 1))
    elif style.output == "sequence":
        module.register_forward_hook(scatter_output)
    elif style.style == "row" or style.output == "replicate":
        module.register_forward_hook(_replicate_output)


def _place_input(mesh: DeviceMesh, wanted: Placement, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    first = cast(DTensor, wrap_activation(args[0], mesh))
    placement = Shard(first.ndim - 1) if wanted.is_shard() else wanted
    if placement.is_replicate() and is_stream(first):
        first = gathered_once(first)
    elif first.placements != (placement,):
        first = first.redistribute(placements=[placement])
    elif placement.is_replicate():
        first = sum_gradient(first)
    return (first, *args[1:])


def _at_the_door(place: Callable[[Any], Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Sum the gradients of the inputs of a module that holds projections; gather a stream that is split.

    They may come from outside a compiled region, where the projections inside must not leave a mark on them.
    """
    return each_once(place, (args, kwargs))


def _gathered_or_summed(tensor: Any) -> Any:
    return gathered(tensor) if is_stream(tensor) else sum_unmarked(tensor)


def _replicate_output(module: nn.Module, args: Any, output: DTensor) -> DTensor:
    return output.redistribute(placements=[Replicate()])


def _pack_output(sizes: tuple[int, ...], from_end: int, module: nn.Module, args: Any, output: DTensor) -> PackedOutput:
    return PackedOutput(output.to_local(), output.device_mesh, output.ndim - from_end, sizes, module)
