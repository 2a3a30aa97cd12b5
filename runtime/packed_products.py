"""Products with a packed weight that is no linear module's own: `F.linear(x, self.qkv.weight, bias)`, `x @ w.t()`.

The result waits to be cut into its segments, as that of a packed linear module (see packed.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from .packed import PackedOutput, packed_part
from .placements import split_dim, to_each_rank

torch_linear = F.linear
# Sizes of the segments of packed weights by owner and name: a property of the modules, which FSDP gives new tensors.
_sizes: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def note_packed_weight(module: nn.Module, name: str, sizes: Sequence[int]) -> None:
    """Parameter `name` of `module` holds, on each rank, its rows of segments of `sizes`."""
    _sizes.setdefault(module, {})[name] = tuple(sizes)


def any_packed_weight() -> bool:
    """Whether a model of this process has one."""
    return bool(_sizes)


def linear_of_packed_rows(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """`torch.nn.functional.linear`; a noted weight gives a `PackedOutput`."""
    sizes = _sizes_of(weight)
    if sizes is None or not isinstance(weight, DTensor):
        return torch_linear(input, weight, bias)
    return _packed_product(input, weight, bias, sizes)


def matmul_of_packed_rows(input: Any, other: Any) -> Any:
    """``input @ weight.t()`` with a noted weight gives a `PackedOutput`; None for other operands."""
    sizes = segments_behind(other) if isinstance(other, DTensor) and split_dim(other) == 1 else None
    return None if sizes is None else _packed_product(input, cast(DTensor, other.t()), None, sizes)


def segments_behind(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The segments of the noted weight that `tensor` is or views; None if it is another's."""
    if not _sizes or not isinstance(tensor, DTensor):
        return None
    storage = tensor._local_tensor.untyped_storage().data_ptr()
    for module, names in _sizes.items():
        for name, sizes in names.items():
            weight = module._parameters.get(name)
            if isinstance(weight, DTensor) and weight._local_tensor.untyped_storage().data_ptr() == storage:
                return sizes
    return None


def _packed_product(input: torch.Tensor, weight: DTensor, bias: torch.Tensor | None, sizes: tuple[int, ...]) -> Any:
    mesh, own = weight.device_mesh, bias
    if isinstance(bias, DTensor) and split_dim(bias) == 0:
        own = bias.to_local()  # packed alike
    elif bias is not None:
        own = packed_part(to_each_rank(bias, mesh), sizes, mesh.size(), mesh.get_local_rank(), 0)
    local = torch_linear(to_each_rank(input, mesh), weight.to_local(), own)
    return PackedOutput(local, mesh, local.ndim - 1, sizes, "a packed weight")


def _sizes_of(weight: torch.Tensor) -> tuple[int, ...] | None:
    if split_dim(weight) != 0:
        return None
    for module, names in _sizes.items():
        for name, sizes in names.items():
            if module._parameters.get(name) is weight:
                return sizes
    return None
