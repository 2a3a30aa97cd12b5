"""`nn.MultiheadAttention` under tensor parallelism: torch's own module keeps its projections as raw parameters.

Each rank projects to its heads (the packed rows of `in_proj_weight`, or the rows of three weights), attends, and
multiplies with its columns of the output projection; the sum over tp and the bias come last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import PlanFileError
from .experts import local_parameters
from .placements import sum_of_ranks, to_each_rank, unwrap_activation, wrap_activation


def use_local_heads(module: nn.Module, fqn: str, mesh: DeviceMesh) -> None:
    """Let an `nn.MultiheadAttention`, whose parameters are DTensors by now, run on this rank's heads.

    Raises
    ------
    PlanFileError
        If it is no such module, or has options that need all heads.
    """
    if not isinstance(module, nn.MultiheadAttention) or module.bias_k is not None or module.add_zero_attn:
        raise PlanFileError(
            f"{fqn} has the style heads, but is no nn.MultiheadAttention without added keys.",
            "Give its module the style replicate, or plan again with `tpplan suggest`.",
        )
    module.forward = partial(_run, module, mesh)  # type: ignore[method-assign]


def _run(
    module: nn.MultiheadAttention,
    mesh: DeviceMesh,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The module's forward; averaged weights are summed over the ranks, weights by head cannot be had."""
    if need_weights and not average_attn_weights:
        raise PlanFileError(
            "A module with the style heads is asked for the attention weights of each head.",
            "Give it the style replicate, or plan again without tensor parallelism: --fix tp=1.",
        )
    batched = query.ndim == 3
    sources: list[torch.Tensor] = []
    for tensor in (query, key, value):
        local = to_each_rank(tensor, mesh)
        local = local if batched else local.unsqueeze(0 if module.batch_first else 1)
        sources.append(local if module.batch_first else local.transpose(0, 1))
    out_bias = module.out_proj.bias
    with local_parameters(module, mesh):
        q, k, v = (_heads_first(t, module.head_dim) for t in _projected(module, sources))
        mask = _mask(attn_mask, key_padding_mask, q, module.num_heads, mesh)
        attended, weights = _attend(module, q, k, v, mask, need_weights)
        partial_out = F.linear(attended, module.out_proj.weight)
    out = sum_of_ranks(partial_out, mesh)
    if out_bias is not None:
        out = out + wrap_activation(out_bias, mesh)
    if not module.batch_first:
        out = out.transpose(0, 1)
    averaged = None if weights is None else sum_of_ranks(weights.sum(1) / module.num_heads, mesh)
    if not batched:
        out = out.squeeze(0 if module.batch_first else 1)
        averaged = None if averaged is None else averaged.squeeze(0)
    return out, averaged


def _projected(module: nn.MultiheadAttention, sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values of this rank's heads, (batch, length, heads x head_dim)."""
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    bias = module.in_proj_bias
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return [F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True)]


def _heads_first(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _mask(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    query: torch.Tensor,
    heads: int,
    mesh: DeviceMesh,
) -> torch.Tensor | None:
    """Both masks as one float mask of this rank's heads, broadcast to (batch, heads, query, key)."""

    def to_float(mask: torch.Tensor) -> torch.Tensor:
        whole = unwrap_activation(mask)
        if whole.dtype is not torch.bool:
            return whole.to(query.dtype)
        return torch.zeros_like(whole, dtype=query.dtype).masked_fill(whole, float("-inf"))

    total = None
    if attn_mask is not None:
        total = to_float(attn_mask)
        if total.ndim == 3:  # (batch x heads, query, key)
            total = total.view(-1, heads, *total.shape[1:])
            total = total.narrow(1, mesh.get_local_rank() * query.shape[1], query.shape[1])
    if key_padding_mask is not None:
        padding = to_float(key_padding_mask)
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        total = padding if total is None else total + padding
    return total


def _attend(
    module: nn.MultiheadAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, need_weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dropout = module.dropout if module.training else 0.0
    if not need_weights:
        out, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout), None
    else:
        scores = (q * module.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        out = weights @ v
    return out.transpose(1, 2).flatten(2), weights
