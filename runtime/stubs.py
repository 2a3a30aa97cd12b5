"""Pipeline stages out of the user's own model: stubs for the units of other stages, and an early exit.

Every stage runs the user's forward from its beginning. With four units over two stages:

    stage 0:  [unit 0] [unit 1] -> exit with what unit 1 returned
    stage 1:  (stub 0) (stub 1: returns what was received) [unit 2] [unit 3] -> loss

A stub owns no parameters and returns tensors of the right shape that occupy one element each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import PlanFileError
from .compat import tree_flatten
from .unit_outputs import Leaf, UnitOutput, UnitOutputs


@dataclass(frozen=True, slots=True)
class Wire:
    """One tensor that crosses a border between stages: leaf `leaf` of what call `call` of unit `fqn` returns.

    `tokens`: a split stream, of which each tp rank sends its tokens (`meta` has the shape that it sends).
    """

    fqn: str
    call: int
    leaf: int
    meta: Leaf
    tokens: bool = False

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the tensor."""
        return self.fqn, self.call, self.leaf


def parse_wire(name: str, outputs: UnitOutputs) -> Wire:
    """The wire that the plan calls "fqn:call:leaf".

    Raises
    ------
    PlanFileError
        If the model makes no such tensor.
    """
    fqn, call, leaf = name.rsplit(":", 2)
    output = outputs.get((fqn, int(call)))
    meta = output.leaves[int(leaf)] if output is not None and int(leaf) < len(output.leaves) else None
    if not isinstance(meta, Leaf):
        raise PlanFileError(
            f"The plan sends {name} between stages, but this model makes no such tensor.",
            "The plan is for another model: plan again with `tpplan suggest`.",
        )
    return Wire(fqn, int(call), int(leaf), meta)


class StageExit(BaseException):
    """Ends a stage's forward; carries the tensors to send. No Exception, so that user code does not catch it."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors


@dataclass
class Border:
    """The two borders of a stage, and what has crossed them in the forward that is running."""

    receives: tuple[Wire, ...] = ()
    sends: tuple[Wire, ...] = ()
    received: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    captured: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def enter(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start a forward with `tensors` received, in the order of `receives`."""
        self.received = {wire.key: tensor for wire, tensor in zip(self.receives, tensors, strict=True)}
        self.captured = {}
        self.calls = {}

    def next_call(self, fqn: str) -> int:
        """The index of this call of unit `fqn` in the running forward."""
        call = self.calls.get(fqn, 0)
        self.calls[fqn] = call + 1
        return call

    def leave(self) -> tuple[torch.Tensor, ...]:
        """The tensors to send, in the order of `sends`; those of earlier stages are passed on.

        Everything that the forward holds is let go, so that only autograd keeps activations.
        """
        known = {**self.received, **self.captured}
        tensors = tuple(known[wire.key] for wire in self.sends)
        self.received, self.captured = {}, {}
        return tensors


def stub_unit(model: nn.Module, fqn: str, outputs: UnitOutputs, border: Border, device: torch.device) -> None:
    """Replace the forward of unit `fqn` by a replay of its outputs, and its parameters by one-element tensors."""
    module = model.get_submodule(fqn)
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None:
                    del table[name]
                    # A plain attribute: code of other modules may still read its shape and dtype.
                    owner.__dict__[name] = _hollow(tuple(tensor.shape), tensor.dtype, device)

    def replay(*args: Any, **kwargs: Any) -> Any:
        call = border.next_call(fqn)
        output: UnitOutput = outputs[fqn, call]

        def make(index: int, leaf: Leaf) -> torch.Tensor:
            received = border.received.get((fqn, call, index))
            if received is None and leaf.first is not None:
                received = border.received.get(leaf.first)  # handed on, as a position bias from layer to layer
            if received is not None:
                return received.clone() if leaf.written else received  # a leaf of autograd cannot be changed
            if leaf.written:
                return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
            return _hollow(leaf.shape, leaf.dtype, device)

        return output.rebuild(make)

    module.forward = replay  # type: ignore[method-assign]


def hollow_parameter(model: nn.Module, name: str, device: torch.device) -> None:
    """Replace one parameter, which another stage holds, by a one-element tensor."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = module._parameters.pop(attribute)
    assert tensor is not None
    module.__dict__[attribute] = _hollow(tuple(tensor.shape), tensor.dtype, device)


def answer_for_parameters(model: nn.Module, before: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Let modules inside `model` that lost all their parameters still say what dtype and device they had.

    `before` are the model's parameters by name when it was whole. (`next(self.visual.parameters()).dtype`)
    """
    for fqn, module in model.named_modules():
        first = next((p for name, p in before.items() if name.startswith(f"{fqn}.")), None)
        if fqn and first is not None and next(module.parameters(), None) is None:
            stand_in = _hollow(tuple(first.shape), first.dtype, device)
            module.__dict__["parameters"] = partial(_one, stand_in)


def _one(tensor: torch.Tensor, recurse: bool = True) -> Iterator[torch.Tensor]:
    return iter((tensor,))


def hook_own_units(model: nn.Module, units: Collection[str], outputs: UnitOutputs, border: Border) -> None:
    """Capture the tensors that this stage sends, and leave the forward after the call of `units` that ends last.

    Call it after `fully_shard`, whose own hooks on these modules must run before the exit.
    """
    wanted: Mapping[str, list[Wire]] = {fqn: [wire for wire in border.sends if wire.fqn == fqn] for fqn in units}
    final = [key for key in outputs if key[0] in wanted][-1]  # noted in the order in which they ended

    def make_hook(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = border.next_call(fqn)
            leaves = tree_flatten(output)[0] if wanted[fqn] else []
            for wire in wanted[fqn]:
                if wire.call == call:
                    border.captured[wire.key] = leaves[wire.leaf]
            if (fqn, call) == final:
                raise StageExit(border.leave())

        return hook

    for fqn in units:
        if wanted[fqn] or fqn == final[0]:
            model.get_submodule(fqn).register_forward_hook(make_hook(fqn))


def _hollow(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of any shape that occupy one element."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)
