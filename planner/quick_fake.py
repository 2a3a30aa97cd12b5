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

_VIEWS = "view select slice unsqueeze squeeze expand permute transpose t detach alias split split_with_sizes unbind"
_POINTWISE = "add sub mul div neg exp log sqrt rsqrt reciprocal pow sigmoid tanh silu gelu relu softplus cos sin"
_BACKWARD = "sigmoid_backward tanh_backward silu_backward gelu_backward threshold_backward softplus_backward"
_PRODUCTS = "mm bmm addmm baddbmm"
_OTHERS = "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data sum mean cat select_backward"
_OTHERS += " add_ mul_ _unsafe_view clone"
QUICK = frozenset(" ".join((_VIEWS, _POINTWISE, _BACKWARD, _PRODUCTS, _OTHERS)).split())
_CPU = torch.device("cpu")


def quick(mode: FakeTensorMode, func: Any, info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result, or `NotImplemented` where only `FakeTensorMode` knows it."""
    if info.base not in QUICK or info.namespace != "aten" or not _plain(args) or not _plain(kwargs.values()):
        return NotImplemented
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    if info.written:
        return args[0]
    if isinstance(result, (list, tuple)):
        return type(result)([FakeTensor(mode, t, _CPU) for t in result])
    return FakeTensor(mode, result, _CPU)


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
