"""Runs the most frequent operators on fake tensors by their meta kernels alone: a tenth of the time of a dispatch.

`FakeTensorMode` prepares every call for its cache, for constants and for mixed devices. Here all tensors are fake,
on one device and without constants, and the operators listed have meta kernels that say all about their results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from .kernels import OpInfo

_ALIKE = "add sub mul div neg exp sqrt rsqrt reciprocal sigmoid tanh silu gelu relu sigmoid_backward tanh_backward"
ALIKE = frozenset(f"{_ALIKE} silu_backward gelu_backward".split())  # one element out for each in, of their dtype
_VIEWS = "view select slice unsqueeze squeeze expand permute transpose t detach alias split split_with_sizes unbind"
_POINTWISE = "add sub mul div neg exp log sqrt rsqrt reciprocal pow sigmoid tanh silu gelu relu softplus cos sin"
_BACKWARD = "sigmoid_backward tanh_backward silu_backward gelu_backward threshold_backward softplus_backward"
_PRODUCTS = "mm bmm addmm baddbmm"
_OTHERS = "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data sum mean cat select_backward"
_OTHERS += " add_ mul_ _unsafe_view clone _to_copy native_group_norm native_group_norm_backward"
_OTHERS += " native_layer_norm native_layer_norm_backward"
QUICK = frozenset(" ".join((_VIEWS, _POINTWISE, _BACKWARD, _PRODUCTS, _OTHERS)).split())
_CPU = torch.device("cpu")


def quick(mode: FakeTensorMode, func: Any, info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result, or `NotImplemented` where only `FakeTensorMode` knows it."""
    if info.base not in QUICK or info.namespace != "aten" or not _plain(args) or not _plain(kwargs.values()):
        return NotImplemented
    if info.base in ALIKE and not kwargs and (alike := _alike(args)) is not None:
        return FakeTensor(mode, torch.empty(alike[0], dtype=alike[1], device="meta"), _CPU)
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
        if info.base == "native_layer_norm":  # the CPU keeps its statistics in the input's dtype
            result = [result[0], *(t.to(args[0].dtype) for t in result[1:])]
    if info.written:
        return args[0]
    if isinstance(result, (list, tuple)):
        return type(result)([None if t is None else FakeTensor(mode, t, _CPU) for t in result])
    return FakeTensor(mode, result, _CPU)


def _alike(args: Sequence[Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of an element-wise result, if all that it reads is contiguous and of that floating dtype."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    dtype, largest = tensors[0].dtype, max(tensors, key=torch.Tensor.dim)
    shape = tuple(largest.shape)
    if not dtype.is_floating_point or any(isinstance(a, (str, complex)) for a in args):
        return None
    for t in tensors:
        if t.dtype != dtype or not t.dim() or not t.is_contiguous():
            return None
        if any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False)):
            return None
    return shape, dtype


def _plain(values: Any) -> bool:
    """Whether all tensors are fake, on the CPU, and no constants."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None or value.fake_device != _CPU:
                return False
        elif isinstance(value, (list, tuple)):
            if not _plain(value):
                return False
        elif isinstance(value, (torch.Tensor, torch.device)):
            return False
    return True
