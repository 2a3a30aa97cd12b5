"""What one rank runs of the model: the user's forward, entered with received tensors, left with the loss or
with the tensors to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..planner.inputs import Inputs
from ..planner.target import Target
from .mesh import RankMesh
from .pipeline import pack, unpack
from .placements import unwrap_activation
from .sequence import received_part, sent_part
from .stubs import Border, StageExit


class Part(nn.Module):
    """The user's model with the border of its stage; `fully_shard` is applied to this module as the root.

    Call `load` once a step, then the module once a microbatch.

    Parameters
    ----------
    model : nn.Module
        The user's model, stubbed to one stage.
    target : Target
        Where its loss comes from.
    border : Border
        What the stage receives and sends (nothing without a pipeline).
    mesh : RankMesh
    float_dtype : torch.dtype
        What floating-point inputs are cast to.
    """

    def __init__(
        self, model: nn.Module, target: Target, border: Border, mesh: RankMesh, float_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self._target, self._border, self._float_dtype = target, border, float_dtype
        self._tp = mesh.tp if mesh.degree("tp") > 1 else None
        self._microbatches: Sequence[Inputs] = ()
        self._next = 0
        self._num_items: torch.Tensor | None = None
        self._loss_scale = 1.0
        # A received tensor is a leaf of autograd, which nothing may change in place.
        self._in_place = any(getattr(module, "inplace", False) for module in model.modules())

    def load(self, microbatches: Sequence[Inputs], num_items: torch.Tensor | None, loss_scale: float) -> None:
        """Set the microbatches of the coming step, on the device.

        The loss of each is multiplied by `loss_scale`; a loss that is a sum over targets is divided by
        `num_items`, the number of them in the global batch.
        """
        self._microbatches, self._num_items, self._loss_scale = microbatches, num_items, loss_scale
        self._next = 0

    def forward(self, *received: torch.Tensor, placeholder: bool = True) -> Any:
        """Run the next microbatch: its loss with shape (1,), or the tensors that the next stage needs.

        `placeholder` is not used: on CUDA, the root hook of torch 2.11's FSDP2 fails on a call without arguments.
        """
        inputs = self._microbatches[self._next].map(self._cast)
        self._next += 1
        tensors = unpack(received, self._border.receives)
        if self._in_place:
            tensors = tuple(tensor.clone() for tensor in tensors)
        if self._tp is not None:
            wires = zip(tensors, self._border.receives, strict=True)
            tensors = tuple(received_part(tensor, wire, self._tp) for tensor, wire in wires)
        self._border.enter(tensors)
        extra = {} if self._num_items is None else self._target.forward_kwargs(self._num_items)
        try:
            output = self.model(*inputs.args, **inputs.kwargs, **extra)
        except StageExit as exit:
            wires = zip(exit.tensors, self._border.sends, strict=True)
            return pack([sent_part(tensor, wire) for tensor, wire in wires], self._border.sends)
        self._border.leave()
        loss = unwrap_activation(self._target.loss(output, inputs, self._num_items))
        return (loss.reshape(1) * self._loss_scale).to(self.loss_dtype)

    @property
    def loss_dtype(self) -> torch.dtype:
        """float32, or float64 where the model computes in it."""
        return torch.promote_types(self._float_dtype, torch.float32)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._float_dtype) if tensor.is_floating_point() else tensor


class Shell(nn.Module):
    """A plain module around a `Part`, so that torch's pipeline leaves FSDP's switches to `GradientSync`."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, *received: torch.Tensor) -> Any:
        """The part's forward."""
        return self.part(*received, placeholder=True)
