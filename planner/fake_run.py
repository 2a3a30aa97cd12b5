"""Runs one operator on fake tensors, with the help of values where its result depends on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from .equal_calls import EqualCalls
from .kernels import OpInfo
from .quick_fake import quick
from .recording import DataRead
from .registry import Registry
from .values import Origin, Values, real_tensors

NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_CPU = torch.device("cpu")
_CACHED = 2**20  # elements of tensors whose values are kept from run to run


def mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """An operator's argument or result with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(v, change) for v in value])
    return value


class FakeRun:
    """Runs operators on fake tensors only: real ones that the model holds or makes are stood for by twins.

    Parameters
    ----------
    mode : FakeTensorMode
    registry : Registry
    values : Values
    place : callable
        ``place()`` is (FQN of the running module, "file.py, line N" of the user's code).
    """

    def __init__(
        self, mode: FakeTensorMode, registry: Registry, values: Values, place: Callable[[], tuple[str, str]]
    ) -> None:
        self.mode = mode
        self.registry = registry
        self.values = values
        self.place = place
        self.equal = EqualCalls(mode)

    def run(
        self, func: Any, info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[int]
    ) -> Any:
        """The operator's result; `numbers` are those of its tensors, in order.

        Raises
        ------
        ModelError
            If it depends on the values of too large a tensor.
        """
        if info.base == "_local_scalar_dense":
            return self._read(func, info, args, numbers[0])
        twins: dict[int, torch.Tensor] = {}

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            twin = self._twin(tensor)
            twins[id(twin)] = tensor
            return twin

        fake_args = [mapped(a, fake) for a in args]
        fake_kwargs = {k: mapped(v, fake) for k, v in kwargs.items()}
        device = fake_kwargs.get("device")
        if device is not None and device != _CPU:
            fake_kwargs["device"] = _CPU
        try:
            result = self._shaped(func, info, fake_args, fake_kwargs, bool(numbers))
        except (*NEEDS_DATA, NotImplementedError):
            result = self._with_data(func, info, fake_args, fake_kwargs, numbers)
        if twins and info.written:
            if torch.Tag.inplace_view in func.tags:
                self._change_layout(func, args, kwargs)
            return mapped(result, lambda t: twins.get(id(t), t))
        return result

    def _shaped(
        self, func: Any, info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any], has_tensors: bool
    ) -> Any:
        """The result from shapes alone, in the least costly way there is."""
        if not has_tensors:
            with self.mode:
                return func(*args, **kwargs)
        key = self.equal.key(func, info, args, kwargs)
        if key is not None and (again := self.equal.again(key)) is not NotImplemented:
            return again
        result = quick(self.mode, func, info, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if key is not None:
            self.equal.keep(key, (*args, *kwargs.values()), result)
        return result

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.registry.id_of(tensor)
        if number is None:
            number = self.registry.known(tensor)
            self.values.tell(number, tensor)
        elif self.registry.recording.tensors[number].kind == "constant" and not self.values.has(number):
            self.values.tell(number, tensor)
        return self.registry.twin(tensor)

    def _change_layout(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Operators such as `unsqueeze_` change the real tensor's shape too."""
        with real_tensors():
            func(*args, **kwargs)
        self.registry.forget_twin(args[0])

    def cached(self, model: nn.Module, known: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(fake, real) of small tensors computed from constants that modules keep for later runs."""
        seen = {id(t) for t in known}
        found = []
        for module in model.modules():
            for tensor in (*vars(module).values(), *module._buffers.values()):
                if isinstance(tensor, FakeTensor) and id(tensor) not in seen and tensor.numel() <= _CACHED:
                    seen.add(id(tensor))
                    number = self.registry.id_of(tensor)
                    if number is not None and self.values.origin(number) == Origin.EXACT and self.values.has(number):
                        found.append((tensor, self.values.read(number)))
        return found

    # results that depend on data

    def _read(self, func: Any, info: OpInfo, args: Sequence[Any], number: int) -> Any:
        """A number that Python asks for."""
        if not isinstance(args[0], FakeTensor):
            self._twin(args[0])
        value = self.values.read(number, scalar=True)
        self.note(info.base, value.dtype in (torch.int64, torch.int32), (number,))
        with real_tensors():
            return value.item()

    def read_whole(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The values of a tensor that leaves torch (`tolist`, `numpy`)."""
        if not isinstance(tensor, FakeTensor):
            self._twin(tensor)
        number = self.registry.known(tensor)
        value = self.values.read(number, scalar=True)
        self.note(what, not value.dtype.is_floating_point and value.dtype != torch.bool, (number,))
        return value

    def note(self, what: str, sizes: bool, numbers: Sequence[int]) -> None:
        """Remember that data was looked at, unless it was known before the run (constants)."""
        tensors = self.registry.recording.tensors
        origin = max((self.values.origin(n) for n in numbers), default=Origin.EXACT)
        if origin == Origin.EXACT and all(tensors[n].kind == "constant" for n in numbers):
            return
        if origin == Origin.CHANCE:
            return
        fqn, where = self.place()
        self.registry.recording.reads[DataRead(fqn, where, what, sizes, origin == Origin.DRAWN)] = None

    def _with_data(
        self, func: Any, info: OpInfo, args: list[Any], kwargs: Mapping[str, Any], numbers: Sequence[int]
    ) -> Any:
        if info.base in _INDEXING and not all(_is_index(i) for i in args[1]):
            return self._masked_index(func, args, kwargs, numbers)
        if info.base == "masked_select":
            self.note(info.base, True, numbers[1:2])
            return self._masked_select(args, numbers)
        tensors = self.registry.recording.tensors
        whole = [n for n in numbers if "float" not in tensors[n].dtype]  # of several tensors, these hold sizes
        if info.namespace == "aten":  # others are listed because they have no cost formula
            self.note(info.base, True, whole or numbers)
        rest = iter(numbers)

        def real(_: torch.Tensor) -> torch.Tensor:
            return self.values.read(next(rest))

        real_args = [mapped(a, real) for a in args]
        real_kwargs = {k: mapped(v, real) for k, v in kwargs.items()}
        with real_tensors():
            torch.manual_seed(0)
            result = func(*real_args, **real_kwargs)
        return mapped(result, self._empty_like)

    def _empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.registry.empty(tensor.shape, tensor.stride(), tensor.dtype)

    def _masked_index(self, func: Any, args: list[Any], kwargs: Mapping[str, Any], numbers: Sequence[int]) -> Any:
        """Indexing with boolean masks is indexing with the places where they hold."""
        indices: list[Any] = []
        rest = iter(numbers[1:])
        for index in args[1]:
            if index is None:
                indices.append(None)
                continue
            number = next(rest)
            if _is_index(index):
                indices.append(index)
                continue
            self.note("index by a mask", True, (number,))
            places = self.values.read(number).nonzero(as_tuple=True)
            indices += [self._empty_like(p) for p in places]
        return func(args[0], indices, *args[2:], **kwargs)

    def _masked_select(self, args: Sequence[Any], numbers: Sequence[int]) -> torch.Tensor:
        mask = self.values.read(numbers[1])
        with real_tensors():
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            count = int(mask.expand(shape).sum())
        return self.registry.empty((count,), (1,), args[0].dtype)


def _is_index(value: Any) -> bool:
    return value is None or value.dtype not in (torch.bool, torch.uint8)
