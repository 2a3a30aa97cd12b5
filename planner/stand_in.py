"""The model as it is traced: on fake tensors (shapes without memory), or on real ones where its data decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .borders import Borders
from .budget import Limits
from .graph import Parameter
from .signature import repeated_lists


class RealModel:
    """The model on real tensors, its floating parameters in the dtype of the run's compute.

    Attributes
    ----------
    model : nn.Module
    repeated : dict
        Its lists of structurally equal members (`repeated_lists`).
    borders : Borders
        Which modules are looked into.
    data_decides : bool
        Whether sizes may depend on values.
    limits : Limits
        How runs treat loops over time steps.
    """

    data_decides = True
    limits = Limits()

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model = model
        self.repeated = repeated_lists(model)
        self.borders = Borders(model, self.repeated)
        self.compute = torch.bfloat16 if precision == "bf16" else None
        self.convert()

    def convert(self) -> None:
        """Cast the parameters."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.cast(parameter.dtype))

    def cast(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a parameter or input of `dtype` computes in."""
        return self.compute if self.compute is not None and dtype.is_floating_point else dtype

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with nothing in it."""
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype)

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input as the model gets it."""
        return tensor.to(self.cast(tensor.dtype))


class FakeModel(RealModel):
    """The model with parameters, buffers and inputs replaced by fake tensors on the CPU.

    The CPU and not the meta device, because attention falls apart into products and a softmax there.

    Attributes
    ----------
    values : list
        (fake, real) pairs of what has values: real buffers, and the inputs of the latest run.
    """

    data_decides = False

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().__init__(model, precision)

    def convert(self) -> None:
        """Replace the tensors, one for one."""
        made: dict[int, torch.Tensor] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = self._parameter(parameter)
                    module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in made:
                        made[id(buffer)] = self.empty(buffer.shape, buffer.stride(), buffer.dtype)
                        self.values.append((made[id(buffer)], buffer))
                    module._buffers[name] = made[id(buffer)]

    def _parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        """What nn.Parameter(fake) makes, without the detach that it would dispatch."""
        new: Any = self.empty(parameter.shape, parameter.stride(), self.cast(parameter.dtype))
        new._is_param = True
        return new.requires_grad_(parameter.requires_grad)

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> FakeTensor:
        """A fake tensor on the CPU."""
        meta = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
        return FakeTensor(self.mode, meta, torch.device("cpu"))

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake stand-in for a real input."""
        fake = self.empty(tensor.shape, tensor.stride(), self.cast(tensor.dtype))
        self.values.append((fake, super().input(tensor)))
        return fake


def describe_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Every distinct parameter and buffer of `model` by its first FQN, in the dtype the model's code gives it."""
    found: dict[str, Parameter] = {}
    for tensors, is_buffer in ((model.named_parameters(), False), (model.named_buffers(), True)):
        for fqn, tensor in tensors:
            owner = type(model.get_submodule(fqn.rpartition(".")[0])).__name__
            dtype = str(tensor.dtype).removeprefix("torch.")
            found[fqn] = Parameter(fqn, tuple(tensor.shape), dtype, tensor.requires_grad, owner, is_buffer)
    return found


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of FQNs that name one parameter, the one of `named_parameters()` first."""
    names: dict[int, list[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
