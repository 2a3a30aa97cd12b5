"""Convolutions and channel norms whose weights or inputs are divided along the channels: each rank its part.

    convolution     weight               input         output
    col             Shard(0)             Replicate     Shard(channels)
    row             Shard(1)             Shard(ch.)    Partial, summed to Replicate; then the bias
    grouped         Shard(0)             Shard(ch.)    Shard(ch.), with groups / tp
    batch norm, group norm               Shard(ch.)    Shard(ch.), group norm with groups / tp

(A transposed convolution keeps its weight as (in, out / groups): col and row change places.) DTensor is not
asked: its convolutions have a silently wrong bias gradient on torch 2.11, and it has no rule for the norms.
Operands that are all whole run whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .placements import (
    part_of_each_rank,
    split_dim,
    split_over_ranks,
    sum_of_ranks,
    to_each_rank,
    unwrap_activation,
    wrap_activation,
)

torch_convolutions = (F.conv1d, F.conv2d, F.conv3d)
torch_transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
torch_batch_norm, torch_group_norm = F.batch_norm, F.group_norm


def _convolve(torch_convolution: Callable[..., torch.Tensor], transposed: bool, *args: Any, **kwargs: Any) -> Any:
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = dict(zip(names, args, strict=False)) | kwargs
    input, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    operands = [t for t in (input, weight, bias) if isinstance(t, DTensor)]
    if not operands:
        return torch_convolution(input, weight, bias, **given)
    mesh, groups, cut = operands[0].device_mesh, given.pop("groups", 1), split_dim(weight)
    channels = input.ndim - weight.ndim + 1
    if cut is None:
        whole = [t if t is None else unwrap_activation(t) for t in (input, weight, bias)]
        return wrap_activation(torch_convolution(*whole, groups=groups, **given), mesh)
    local = cast(DTensor, weight).to_local()
    if groups > 1:
        part = part_of_each_rank(input, channels, mesh)
        own = None if bias is None else part_of_each_rank(bias, 0, mesh)
        return split_over_ranks(
            torch_convolution(part, local, own, groups=groups // mesh.size(), **given), channels, mesh
        )
    if cut == int(transposed):  # its outputs are divided
        own = None if bias is None else part_of_each_rank(bias, 0, mesh)
        return split_over_ranks(torch_convolution(to_each_rank(input, mesh), local, own, **given), channels, mesh)
    summed = sum_of_ranks(torch_convolution(part_of_each_rank(input, channels, mesh), local, None, **given), mesh)
    if bias is None:
        return summed
    return summed + wrap_activation(bias, mesh).view(-1, *([1] * (weight.ndim - 2)))


def _standing_for(torch_convolution: Callable[..., torch.Tensor], transposed: bool) -> Callable[..., Any]:
    """`_convolve` for one of torch's functions, under its name: the compiler asks functions for theirs."""

    @wraps(torch_convolution)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _convolve(torch_convolution, transposed, *args, **kwargs)

    return run


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{function: _standing_for(function, False) for function in torch_convolutions},
    **{function: _standing_for(function, True) for function in torch_transposed},
}


def batch_norm_of_local_channels(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`torch.nn.functional.batch_norm`; an input whose channels are split gives such an output."""
    others = (running_mean, running_var, weight, bias)
    return _normalise(input, others, lambda x, *rest: torch_batch_norm(x, *rest, *args, **kwargs))


def group_norm_of_local_channels(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.group_norm`; an input whose channels are split, in whole groups, gives such an output."""
    degree = cast(DTensor, input).device_mesh.size() if split_dim(input) == 1 else 1
    return _normalise(
        input, (weight, bias), lambda x, scale, shift: torch_group_norm(x, num_groups // degree, scale, shift, eps)
    )


def _normalise(input: torch.Tensor, others: tuple[torch.Tensor | None, ...], norm: Callable[..., Any]) -> torch.Tensor:
    """`norm` of the channels of each rank, or of all of them; `others` have one number a channel."""
    mesh = _mesh_of(input, *others)
    if mesh is None:
        return norm(input, *others)
    if split_dim(input) == 1:
        parts = [None if t is None else part_of_each_rank(t, 0, mesh) for t in others]
        return split_over_ranks(norm(cast(DTensor, input).to_local(), *parts), 1, mesh)
    whole = [None if t is None else unwrap_activation(t) for t in (input, *others)]
    return DTensor.from_local(norm(*whole), mesh, [Replicate()], run_check=False)


def _mesh_of(*tensors: Any) -> DeviceMesh | None:
    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)
