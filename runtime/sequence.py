"""Sequence parallelism: between row and col layers each tp rank has its tokens of the stream only.

The stream (batch, tokens, features) is a DTensor split along its tokens, so that norms, dropouts and residual sums
run on 1/tp of them. What changes its placement:

    where                                 forward            backward
    into the stream's first modules       slice              all-gather
    into a module that holds col layers   all-gather         reduce-scatter
    out of a row layer                    reduce-scatter     all-gather
    out of the stream's last unit         all-gather         slice
    into a module that runs whole         all-gather         slice
    out of it                             slice              all-gather

A border between pipeline stages inside the stretch sends each rank's tokens.

Weights that the stream's modules read stay whole; each rank has the part of their gradient that its tokens give,
and `fully_shard` sums these over tp when it reduces them over data parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..planner.plan import TensorParallelSection
from .compat import tree_map_only
from .placements import mark_summed, split_over_ranks, unwrap_activation, wrap_activation
from .stubs import Wire

TOKENS = 1  # dimension of the stream (batch, tokens, features)
_STREAM_RANK = 3
# Attribute of a split activation: itself gathered, for the next projection that reads it.
_GATHERED = "_tpplan_gathered"


def split_stream(model: nn.Module, section: TensorParallelSection, mesh: DeviceMesh) -> None:
    """Hook where the stream of `model` is split along its tokens, and where it is whole again.

    Parameters
    ----------
    section : TensorParallelSection
        `sequence_modules` work on 1/tp of the tokens, what `sequence_ends` return is gathered.
    mesh : DeviceMesh
        The one-dimensional tp mesh.
    """
    inside = frozenset(section.sequence_modules)
    for fqn, module in model.named_modules():
        if fqn in inside and not _around(fqn) & inside:
            module.register_forward_pre_hook(partial(_enter, mesh), with_kwargs=True)
        if fqn in section.sequence_ends:
            module.register_forward_hook(_leave)


def use_whole_tokens(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let `module` run on the whole stream inside the stretch: its inputs are gathered, its outputs cut."""
    module.register_forward_pre_hook(_gather_inputs, with_kwargs=True, prepend=True)
    module.register_forward_hook(partial(_cut_outputs, mesh))


def is_stream(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a stream split along its tokens."""
    return isinstance(tensor, DTensor) and tensor.ndim == _STREAM_RANK and tensor.placements == (Shard(TOKENS),)


def gathered(tensor: Any) -> Any:
    """A split stream whole, for projections; anything else as it is.

    The gradients of all that read it are summed and scattered in one step.
    """
    if not is_stream(tensor):
        return tensor
    return mark_summed(tensor.redistribute(placements=[Replicate()]))


def each_once(place: Callable[[Any], Any], arguments: Any) -> Any:
    """`place` applied to the tensors among `arguments`, once to one that is given several times."""
    done: list[tuple[Any, Any]] = []

    def placed(tensor: Any) -> Any:
        for before, after in done:
            if before is tensor:
                return after
        done.append((tensor, place(tensor)))
        return done[-1][1]

    return tree_map_only(torch.Tensor, placed, arguments)


def gathered_once(tensor: DTensor) -> DTensor:
    """`gathered`, once for all the projections that read `tensor`."""
    known = getattr(tensor, _GATHERED, None)
    if known is None:
        known = gathered(tensor)
        setattr(tensor, _GATHERED, known)
    return known


def scatter_output(module: nn.Module, args: Any, output: DTensor) -> DTensor:
    """Hook of a row layer: its partial sums are added, each rank keeps its tokens."""
    return output.redistribute(placements=[Shard(TOKENS) if output.ndim == _STREAM_RANK else Replicate()])


def split_wire(wire: Wire, section: TensorParallelSection, degree: int) -> Wire:
    """The wire, of which each of `degree` tp ranks sends its tokens if the stream is split where it was made."""
    shape, made = wire.meta.shape, wire.fqn in section.sequence_modules and wire.fqn not in section.sequence_ends
    stream = wire.meta.requires_grad and len(shape) == _STREAM_RANK and shape[TOKENS] % degree == 0
    if degree == 1 or not (section.sequence_parallel and made and stream):
        return wire
    local = (shape[0], shape[TOKENS] // degree, shape[2])
    return replace(wire, meta=replace(wire.meta, shape=local), tokens=True)


def received_part(tensor: torch.Tensor, wire: Wire, mesh: DeviceMesh) -> torch.Tensor:
    """What came over a wire as the model is to see it."""
    return split_over_ranks(tensor, TOKENS, mesh) if wire.tokens else wrap_activation(tensor, mesh)


def sent_part(tensor: torch.Tensor, wire: Wire) -> torch.Tensor:
    """The plain tensor that this rank sends over a wire."""
    if not wire.tokens:
        return unwrap_activation(tensor)
    return cast(DTensor, tensor).redistribute(placements=[Shard(TOKENS)]).to_local()


def _around(fqn: str) -> set[str]:
    """The modules that `fqn` is in."""
    parts = fqn.split(".")
    return {".".join(parts[:n]) for n in range(len(parts))}


def _gather_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return each_once(_whole, (args, kwargs))


def _cut_outputs(mesh: DeviceMesh, module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(torch.Tensor, partial(_split, mesh), output)


def _enter(mesh: DeviceMesh, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(torch.Tensor, partial(_split, mesh), (args, kwargs))


def _split(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    """A whole stream with a gradient split along its tokens; tables, masks and positions stay whole."""
    whole = isinstance(tensor, DTensor) and tensor.placements == (Replicate(),) and tensor.requires_grad
    if not whole or tensor.ndim != _STREAM_RANK or tensor.shape[TOKENS] % mesh.size():
        return tensor
    # A copy: a slice would keep the whole alive, and its strides would ask for compiled code of its own.
    return cast(DTensor, tensor).redistribute(placements=[Shard(TOKENS)]).clone(memory_format=torch.contiguous_format)


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(torch.Tensor, _whole, output)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.redistribute(placements=[Replicate()]) if is_stream(tensor) else tensor
