"""What operators make, remembered by what their arguments are like: equal calls of one run ask torch only once.

`FakeTensorMode` remembers too, but prepares every call for its symbols, constants and devices first. Here a key holds
all that shapes and strides can follow from: the operator, its plain arguments, and of every tensor its layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .kernels import OpInfo

Key = tuple[Any, ...]
Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, stride, dtype
_CPU = torch.device("cpu")
_PLAIN = (bool, int, float, str, torch.dtype, torch.memory_format)


class _Unlike(Exception):
    """An argument that a key cannot stand for, or a result that is more than new tensors."""


class EqualCalls:
    """The results of one run's operators that make new tensors on the CPU.

    Parameters
    ----------
    mode : FakeTensorMode
        Owns the results.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._results: dict[Key, tuple[type, list[Made | None]]] = {}

    def key(self, func: Any, info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Key | None:
        """What equal calls share; None where the result may be more than new tensors of known shapes."""
        if not info.makes_new:
            return None
        try:
            return (func, _like(args), _like(kwargs.values()), tuple(kwargs), torch.get_default_dtype())
        except _Unlike:
            return None

    def again(self, key: Key) -> Any:
        """New tensors like those of an equal call before, or `NotImplemented`."""
        found = self._results.get(key)
        if found is None:
            return NotImplemented
        kind, leaves = found
        made = [None if leaf is None else self._tensor(leaf) for leaf in leaves]
        return made[0] if kind is FakeTensor else kind(made)

    def keep(self, key: Key, args: Sequence[Any], result: Any) -> None:
        """Remember a result, if it is made of new tensors and of nothing else."""
        several = type(result) in (tuple, list)
        if not several and type(result) is not FakeTensor:
            return
        taken = {t.untyped_storage()._cdata for t in _tensors(args)}
        leaves: list[Made | None] = []
        for leaf in result if several else [result]:
            if leaf is not None and not self._is_new(leaf, taken):
                return
            leaves.append(None if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype))
        self._results[key] = (type(result), leaves)

    def _is_new(self, leaf: Any, taken: set[int]) -> bool:
        """Whether a result is all that `_tensor` would make, on a storage of its own."""
        if type(leaf) is not FakeTensor or leaf.constant is not None or leaf.fake_device != _CPU:
            return False
        if leaf.layout is not torch.strided or leaf.requires_grad or leaf.storage_offset():
            return False
        storage = leaf.untyped_storage()
        if storage._cdata in taken:
            return False
        taken.add(storage._cdata)
        return storage.nbytes() == self._tensor((leaf.shape, leaf.stride(), leaf.dtype)).untyped_storage().nbytes()

    def _tensor(self, made: Made) -> FakeTensor:
        shape, stride, dtype = made
        return FakeTensor(self.mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), _CPU)


def _like(values: Any) -> Key:
    """Arguments as far as shapes and strides of results can follow from them."""
    found: list[Any] = []
    for value in values:
        if type(value) is FakeTensor:
            if value.constant is not None or value.fake_device != _CPU or value.layout is not torch.strided:
                raise _Unlike
            found.append((value.shape, value.stride(), value.dtype, value.requires_grad))
        elif value is None:
            found.append(None)
        elif isinstance(value, _PLAIN):
            found.append((type(value), value))  # 1, 1.0 and True are equal, and promote to other dtypes
        elif isinstance(value, (list, tuple)):
            found.append(_like(value))
        elif value == _CPU or value is torch.strided:
            found.append(str(value))
        else:
            raise _Unlike
    return tuple(found)


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
