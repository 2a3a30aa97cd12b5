"""Batched products of tensors that are split along a batch dimension (heads): each rank multiplies its own.

torch merges (batch, heads) into one dimension on the way; DTensor of torch 2.11 cannot follow that, and that of
2.13 pays two views an operand for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .packed_products import matmul_of_packed_rows

torch_matmul = torch.matmul
torch_einsum = torch.einsum


def matmul_on_local_batches(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.matmul`; operands split along one batch dimension give a result split along it."""
    packed = matmul_of_packed_rows(input, other)
    if packed is not None:
        return packed
    rank = max(input.ndim, other.ndim)
    dims = [_split_dim(t) for t in (input, other)]
    places = {d + rank - t.ndim for d, t in zip(dims, (input, other), strict=True) if d is not None}
    if len(places) != 1 or max(places) >= rank - 2:
        return torch_matmul(input, other)
    place = places.pop()

    def serves_all(tensor: torch.Tensor) -> bool:
        own = place - (rank - tensor.ndim)
        return own < 0 or tensor.shape[own] == 1

    local = [_local(t, d, serves_all(t)) for d, t in zip(dims, (input, other), strict=True)]
    if local[0] is None or local[1] is None:
        return torch_matmul(input, other)
    mesh = next(t.device_mesh for t in (input, other) if isinstance(t, DTensor))
    return DTensor.from_local(torch_matmul(local[0], local[1]), mesh, [Shard(place)], run_check=False)


def einsum_on_local_batches(equation: Any, *operands: Any) -> torch.Tensor:
    """`torch.einsum`; where one letter of the output is split in all operands that have it, each rank does its part."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    dims = [_split_dim(t) if isinstance(t, torch.Tensor) else None for t in tensors]
    if all(d is None for d in dims) or not isinstance(equation, str) or "->" not in equation or "." in equation:
        return torch_einsum(equation, *operands)
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters = {term[d] for term, d in zip(terms, dims, strict=True) if d is not None}
    if len(letters) != 1 or not letters <= set(output):
        return torch_einsum(equation, *operands)
    letter = letters.pop()
    local = [_local(t, d, letter not in term) for t, d, term in zip(tensors, dims, terms, strict=True)]
    if any(part is None for part in local):
        return torch_einsum(equation, *operands)
    mesh = next(t.device_mesh for t in tensors if isinstance(t, DTensor))
    return DTensor.from_local(torch_einsum(equation, *local), mesh, [Shard(output.index(letter))], run_check=False)


def _split_dim(tensor: torch.Tensor) -> int | None:
    """The dimension along which a DTensor is split over tp."""
    if isinstance(tensor, DTensor) and len(tensor.placements) == 1 and type(tensor.placements[0]) is Shard:
        return tensor.placements[0].dim % tensor.ndim
    return None


def _local(tensor: torch.Tensor, dim: int | None, serves_all: bool) -> torch.Tensor | None:
    """This rank's part of an operand: its own batches, or the whole if it is equal for all of them."""
    if dim is not None and isinstance(tensor, DTensor):
        return tensor.to_local()
    if not serves_all:
        return None
    if not isinstance(tensor, DTensor):
        return tensor
    if not isinstance(tensor.placements[0], Replicate):
        return None
    return tensor.to_local(grad_placements=[Partial()])


@contextmanager
def matmul_operators() -> Iterator[None]:
    """Inside, `a @ b` and `a.matmul(b)` of DTensors are `matmul_on_local_batches`."""
    own: dict[str, Callable[..., torch.Tensor]] = {
        "__matmul__": lambda self, other: matmul_on_local_batches(self, other),
        "__rmatmul__": lambda self, other: matmul_on_local_batches(other, self),
        "matmul": lambda self, other: matmul_on_local_batches(self, other),
    }
    names = [name for name in own if name not in vars(DTensor)]
    for name in names:
        setattr(DTensor, name, own[name])
    try:
        yield
    finally:
        for name in names:
            delattr(DTensor, name)
