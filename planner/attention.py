"""Attention as one operator while tracing, also where the CPU would fall back to products and a softmax.

GPUs have fused kernels for values of another width than the keys (multi-head latent attention); the CPU has none.
Two operators stand in for them. Tracing reads shapes only: on real tensors their gradients are zeros. For a mask that
needs a gradient (a learned position bias) torch takes products and a softmax on GPUs too, in float32 (measured on T5).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .gpu_dropout import dropout

_library = torch.library.Library("tpplan", "DEF")
_library.define(
    "_scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal,"
    " float? scale) -> (Tensor, Tensor)"
)
_library.define(
    "_scaled_dot_product_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor logsumexp, Tensor? attn_mask, bool is_causal, bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor?)"
)


def _forward_fake(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _forward(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    return out.contiguous(), query.new_zeros(query.shape[:-1], dtype=torch.float32)


def _backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, attn_mask: Any, is_causal: bool,
    mask_gradient: bool,
) -> Any:  # fmt: skip
    made = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    return (*made, torch.zeros_like(attn_mask) if mask_gradient else None)


_library.impl("_scaled_dot_product_attention", _forward_fake, "Meta")
_library.impl("_scaled_dot_product_attention", _forward, "CPU")
_library.impl("_scaled_dot_product_attention_backward", _backward, "Meta")
_library.impl("_scaled_dot_product_attention_backward", _backward, "CPU")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: Any) -> Any:
        out, logsumexp = torch.ops.tpplan._scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale)
        ctx.save_for_backward(query, key, value, out, logsumexp, attn_mask)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_out = grads[0]
        *tensors, attn_mask = ctx.saved_tensors
        wants_mask = bool(attn_mask is not None and ctx.needs_input_grad[3])
        made = torch.ops.tpplan._scaled_dot_product_attention_backward(
            grad_out, *tensors, attn_mask, ctx.is_causal, wants_mask
        )
        return (*made, None, None)


def stays_whole(query: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None) -> bool:
    """Whether the CPU's own operator runs such attention as one operator (dropout aside)."""
    if query.dim() != 4:
        return True  # no GPU kernel is fused for it either
    return query.shape[-1] == value.shape[-1] and (attn_mask is None or not attn_mask.requires_grad)


def falls_apart(query: torch.Tensor, attn_mask: torch.Tensor | None) -> bool:
    """Whether a GPU runs such attention as products and a softmax, because of its mask.

    The memory-efficient kernel has a gradient for its mask if the mask's last dimension is contiguous (seen on H200
    with torch 2.11: a permuted table of biases goes to the math path, its contiguous copy does not).
    """
    return attn_mask is not None and attn_mask.requires_grad and query.dim() == 4 and attn_mask.stride(-1) != 1


def learned_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention with a mask that needs a gradient and no kernel takes (`falls_apart`): products, softmax in float32.

    The operators and what they save are those of torch's `_scaled_dot_product_attention_math`.
    """
    dtype = query.dtype
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    query, key, value, attn_mask = (t.to(wide) for t in (query, key, value, attn_mask))
    if enable_gqa and query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    factor = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.matmul(query * factor, key.transpose(-2, -1) * factor) + attn_mask
    weights = torch._safe_softmax(scores, -1)  # pyright: ignore[reportPrivateImportUsage]
    if dropout_p:
        weights = dropout(weights, dropout_p)
    return torch.matmul(weights, value).to(dtype)


def whole_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention of [batch, heads, tokens, width] as one operator forward and one backward.

    Takes what `torch.nn.functional.scaled_dot_product_attention` takes; dropout is left out.
    """
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)  # type: ignore[return-value]
