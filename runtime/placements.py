"""Between plain tensors and DTensors on the tp axis, with the gradient's placement said each time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

# Attribute of an activation: itself behind the sum of its gradients, or True if it is behind it already.
_SUMMED = "_tpplan_summed"


def split_dim(tensor: Any) -> int | None:
    """The dimension along which a DTensor is split over tp; None for what is whole or plain."""
    if isinstance(tensor, DTensor) and len(tensor.placements) == 1 and type(tensor.placements[0]) is Shard:
        return tensor.placements[0].dim % max(tensor.ndim, 1)
    return None


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


def sum_gradient(tensor: Any) -> Any:
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
    if tensor.is_leaf:  # a parameter outlives the microbatch, whose sum must not
        return _summed(tensor)
    if seen is None:
        seen = _summed(tensor)
        setattr(tensor, _SUMMED, seen)
    return seen


def sum_unmarked(tensor: Any) -> Any:
    """`sum_gradient` that leaves no mark on `tensor`, and does nothing for what is summed already."""
    wanted = isinstance(tensor, DTensor) and tensor.requires_grad and tensor.placements == (Replicate(),)
    return _summed(tensor) if wanted and getattr(tensor, _SUMMED, None) is None else tensor


def mark_summed(tensor: DTensor) -> DTensor:
    """`tensor`, noted to be behind what sums its gradient over tp."""
    setattr(tensor, _SUMMED, True)
    return tensor


def _summed(tensor: DTensor) -> DTensor:
    local = tensor.to_local()
    return mark_summed(DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False))


def to_each_rank(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A whole tensor as a plain one whose use differs between ranks: its gradient is summed over tp."""
    if not isinstance(tensor, DTensor):
        if not tensor.is_floating_point():
            return tensor
        tensor = wrap_activation(tensor, mesh)
    whole = cast(DTensor, tensor)
    if whole.placements != (Replicate(),):
        whole = whole.redistribute(placements=[Replicate()])
    return cast(DTensor, sum_gradient(whole)).to_local(grad_placements=[Partial()])


def part_of_each_rank(tensor: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part of `tensor` along `dim` as a plain tensor: cut from a whole one, or what it holds.

    The gradient of a whole tensor is summed over tp.
    """
    if split_dim(tensor) == dim % tensor.ndim:
        return cast(DTensor, tensor).to_local()
    whole = to_each_rank(tensor, mesh)
    size = whole.shape[dim] // mesh.size()
    return whole.narrow(dim, mesh.get_local_rank() * size, size)


def split_over_ranks(local: torch.Tensor, dim: int, mesh: DeviceMesh) -> DTensor:
    """The whole tensor of which each rank holds `local` along `dim`."""
    return DTensor.from_local(local, mesh, [Shard(dim % local.ndim)], run_check=False)


def sum_of_ranks(local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """The sum over tp of what each rank computed, whole on all of them."""
    return DTensor.from_local(local, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
