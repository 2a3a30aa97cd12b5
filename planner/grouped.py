"""Grouped products (experts) in dtypes other than bfloat16 while tracing: torch's fake kernel refuses them.

Real CPU and CUDA kernels take float32. This operator has the same shapes, gradients and saved tensors.
"""

from __future__ import annotations

from typing import Any

import torch

_library = torch.library.Library("tpplan", "FRAGMENT")
_library.define("_grouped_mm(Tensor a, Tensor b, Tensor offs) -> Tensor")


def _fake(a: Any, b: Any, offs: Any) -> Any:
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


_library.impl("_grouped_mm", _fake, "Meta")
_library.impl("_grouped_mm", lambda a, b, offs: torch.nn.functional.grouped_mm(a, b, offs=offs), "CPU")


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, offs: Any) -> Any:
        ctx.save_for_backward(a, b, offs)
        return torch.ops.tpplan._grouped_mm(a, b, offs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b, offs = ctx.saved_tensors
        grad = grads[0]
        grad_a = torch.ops.tpplan._grouped_mm(grad, b.transpose(-2, -1), offs) if ctx.needs_input_grad[0] else None
        grad_b = torch.ops.tpplan._grouped_mm(a.t(), grad, offs) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None


def takes(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> bool:
    """Whether `grouped_mm` serves this call: rows of `a` in groups, one matrix of `b` [groups, k, n] for each."""
    plain = bias is None and out_dtype in (None, a.dtype)
    return plain and a.dtype != torch.bfloat16 and a.dim() == 2 and b.dim() == 3 and offs is not None


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, **_: None) -> torch.Tensor:
    """Rows of `a` [rows, k] times `b` [groups, k, n]; `offs` [groups] are the ends of the groups."""
    return _Grouped.apply(a, b, offs)  # type: ignore[return-value]
