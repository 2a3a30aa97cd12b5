"""Attention under tensor parallelism: `scaled_dot_product_attention` on this rank's heads.

DTensor has no complete rule for attention on every backend, and needs none: heads are independent. The
wrapper takes each operand's local heads, calls torch's own function on plain tensors and wraps the result.
Calls without DTensors pass through untouched.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..errors import ModelError

torch_attention = F.scaled_dot_product_attention


def attention_on_local_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with the same arguments, run on the local heads of DTensor operands.

    Shapes (batch, heads, length, head_dim). If the query's heads are sharded so is the result; keys and
    values with replicated heads give each rank the heads that its queries attend to.

    Raises
    ------
    ModelError
        If an operand is sharded over anything but the heads.
    """
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    operands = [t for t in (query, key, value, attn_mask) if isinstance(t, DTensor)]
    if not operands:
        return torch_attention(query, key, value, attn_mask, **options)
    mesh = operands[0].device_mesh
    heads_dim = query.ndim - 3
    sharded = isinstance(query, DTensor) and query.placements == (Shard(heads_dim),)
    if not sharded:
        plain: list[Any] = [None if t is None else _replicated(t) for t in (query, key, value, attn_mask)]
        out = torch_attention(plain[0], plain[1], plain[2], plain[3], **options)
        return DTensor.from_local(out, mesh, [Replicate()], run_check=False)
    heads = query.shape[heads_dim]
    mask = None if attn_mask is None else _local_mask(attn_mask, heads, mesh)
    local = [_local_heads(t, heads, mesh) for t in (query, key, value)]
    out = torch_attention(local[0], local[1], local[2], mask, **options)
    return DTensor.from_local(out, mesh, [Shard(heads_dim)], run_check=False)


def _replicated(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()]).to_local()


def _local_heads(tensor: torch.Tensor, query_heads: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's heads of a query, key or value."""
    dim = tensor.ndim - 3
    if isinstance(tensor, DTensor) and tensor.placements == (Shard(dim),):
        return tensor.to_local()
    if isinstance(tensor, DTensor) and not isinstance(tensor.placements[0], Replicate):
        raise ModelError(
            f"attention received a tensor placed {tensor.placements[0]}; only heads can be split over tp.",
            "Plan again without tensor parallelism: --fix tp=1.",
        )
    # Replicated heads (fewer key/value heads than tp): the gradient of each rank is a part of the whole.
    whole = tensor.to_local(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor
    return whole.narrow(dim, *_heads_of_rank(whole.shape[dim], query_heads, mesh))


def _heads_of_rank(heads: int, query_heads: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Start and number of the (key/value) heads that this rank's query heads attend to."""
    per_rank = query_heads // mesh.size()
    group = query_heads // heads
    if per_rank % group and group % per_rank:
        raise ModelError(
            f"tp={mesh.size()} cannot divide {heads} key/value heads for {query_heads} query heads.",
            "Choose a tp that divides the key/value heads: --fix tp=N.",
        )
    return mesh.get_local_rank() * per_rank // group, max(per_rank // group, 1)


def _local_mask(mask: torch.Tensor, heads: int, mesh: DeviceMesh) -> torch.Tensor:
    """The mask for this rank's heads; a mask without a heads dimension serves all of them."""
    dim = mask.ndim - 3
    if isinstance(mask, DTensor):
        if dim >= 0 and mask.placements == (Shard(dim),):
            return mask.to_local()
        if not isinstance(mask.placements[0], Replicate):
            mask = mask.redistribute(placements=[Replicate()])
        mask = cast(DTensor, mask).to_local(grad_placements=[Partial()])
    if dim < 0 or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, *_heads_of_rank(mask.shape[dim], heads, mesh))
