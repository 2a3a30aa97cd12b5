"""What one traced run showed: tensors, storages, operators and module calls at concrete sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .graph import Kernel

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class RawTensor:
    """One tensor at concrete shape; `storage` indexes `Recording.storages`."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    storage: int
    contiguous: bool
    requires_grad: bool
    kind: str
    fqn: str = ""


@dataclass(slots=True)
class RawStorage:
    """One allocation: its size and the clock ticks between which it lived."""

    nbytes: int
    kind: str
    born: int
    died: int = -1
    weight_like: bool = False
    parameter_gradient: bool = False
    live: int = 0


@dataclass(slots=True)
class RawOp:
    """One forward operator call, with what autograd saved for it and its backward kernels."""

    index: int
    name: str
    call: int
    args: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: Kernel
    clock: int
    dead: bool = False
    backward: list[Kernel] = field(default_factory=list)
    backward_clocks: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)


@dataclass(slots=True)
class RawCall:
    """One module call: operators [start, end) ran inside it.

    `replay_of` is the call that it repeats without running, `like` the call that it must turn out to be like, or -1.
    """

    index: int
    fqn: str
    number: int
    module_type: str
    parent: int
    start: int
    end: int = -1
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    replay_of: int = -1
    like: int = -1


@dataclass(frozen=True, slots=True)
class DataRead:
    """A place where the model's code looked at the values of tensors.

    `fqn` is the innermost module that ran, `where` "file.py, line N", `what` the operator. `sizes` says whether
    values became sizes of tensors (else they chose a branch), `drawn` whether they depend on weights or
    activations, which were drawn at random (else on inputs, constants and chance alone).
    """

    fqn: str
    where: str
    what: str
    sizes: bool
    drawn: bool


@dataclass(slots=True)
class Recording:
    """Everything one run showed; `produced` are the tensors that an operator or a replayed call made.

    `computed_again` counts operators that the model's own checkpointing runs a second time, in backward.
    """

    ops: list[RawOp] = field(default_factory=list)
    tensors: list[RawTensor] = field(default_factory=list)
    storages: list[RawStorage] = field(default_factory=list)
    calls: list[RawCall] = field(default_factory=list)
    produced: set[int] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    reads: dict[DataRead, None] = field(default_factory=dict)
    clock: int = 0
    computed_again: int = 0

    def storage_of(self, tensor: int) -> RawStorage:
        """The storage of a recorded tensor."""
        return self.storages[self.tensors[tensor].storage]

    def add_tensor(self, tensor: torch.Tensor, storage: int, kind: str, fqn: str) -> int:
        """Note a tensor, and return its number."""
        new = RawTensor(
            len(self.tensors),
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            storage,
            tensor.is_contiguous(),
            tensor.requires_grad,
            kind,
            fqn,
        )
        self.tensors.append(new)
        return new.id
