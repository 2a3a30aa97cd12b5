"""Element-wise operators without a DTensor rule (activations' backwards, most of all) on operands that tp splits.

Each rank runs the operator on its part: all tensors are brought to the split of the first split one. DTensor of
every torch lacks some of them (`hardtanh_backward`, `hardswish_backward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..planner.sharding_rules import POINTWISE
from .compat import tree_flatten, tree_map_only
from .placements import split_dim

_BACKWARDS = frozenset(f"{base}_backward" for base in POINTWISE) | {"log_sigmoid_backward"}


def is_elementwise(operator: Any) -> bool:
    """Whether every element of the result needs only the elements at its place."""
    name = _name(operator).removesuffix("_")
    return name in POINTWISE or name in _BACKWARDS


def run_split(operator: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`operator` on this rank's parts; None if no operand is split along one dimension of the result."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    first = next((t for t in tensors if split_dim(t) is not None), None)
    in_place = _name(operator).endswith("_")
    if not isinstance(first, DTensor) or (in_place and first is not args[0]):
        return None
    mesh, from_end = first.device_mesh, first.ndim - (split_dim(first) or 0)
    rank = max(t.ndim for t in tensors)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        dim = tensor.ndim - from_end
        whole = dim < 0 or tensor.shape[dim] == 1  # broadcast along the split
        if isinstance(tensor, DTensor):
            wanted = Replicate() if whole else Shard(dim)
            if tensor.placements != (wanted,):  # redistribute runs operators of its own
                tensor = tensor.redistribute(placements=[wanted])
            return tensor._local_tensor
        return tensor if whole else tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()]

    output = operator(*tree_map_only(torch.Tensor, part, args), **tree_map_only(torch.Tensor, part, kwargs))
    if in_place:
        return args[0]
    place = Shard(rank - from_end)
    return tree_map_only(torch.Tensor, lambda t: DTensor.from_local(t, mesh, [place], run_check=False), output)


def _name(operator: Any) -> str:
    return str(operator).split(".")[1]
