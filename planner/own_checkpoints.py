"""What a model keeps and computes again by itself: torch.utils.checkpoint, and attributes of autograd Functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

from .recording import RawOp, Recording


class Again:
    """Follows a recomputation in backward: which forward operator each recomputed one repeats."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._open: list[tuple[int, list[RawOp]]] = []
        self._ops_of: dict[str, list[RawOp]] | None = None

    def enter(self, fqn: str) -> None:
        """A module runs again."""
        if self._ops_of is None:
            self._ops_of = self._index()
        self._open.append((_node(), list(reversed(self._ops_of.get(fqn, ())))))

    def leave(self) -> None:
        """It is through."""
        if self._open:
            self._open.pop()

    def match(self, name: str) -> RawOp | None:
        """The forward operator that an operator called `name` repeats, None if it is no recomputation of a module."""
        node = _node()
        while self._open and self._open[-1][0] != node:  # it stopped early, without leaving
            self._open.pop()
        if not self._open or not torch.is_grad_enabled():
            return None
        waiting = self._open[-1][1]
        while waiting:
            op = waiting.pop()
            if op.name == name:
                return op
        return None

    def _index(self) -> dict[str, list[RawOp]]:
        """The operators of the last call of each module, in order."""
        last = {call.fqn: call.index for call in self.recording.calls}
        found: dict[str, list[RawOp]] = {}
        for op in self.recording.ops:
            if op.call >= 0:
                fqn = self.recording.calls[op.call].fqn
                if last[fqn] == op.call:
                    found.setdefault(fqn, []).append(op)
        return found


def _node() -> int:
    node = torch._C._current_autograd_node()
    return node._sequence_nr() if node is not None else -1


@contextlib.contextmanager
def checkpoint_inputs(keep: Callable[[list[torch.Tensor]], None]) -> Iterator[None]:
    """Tell `keep` the tensors that a checkpoint holds for its recomputation without autograd knowing."""
    name = "_checkpoint_without_reentrant_generator"
    original = getattr(torch_checkpoint, name)

    def generator(*args: Any, **kwargs: Any) -> Any:
        keep([t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)])
        return original(*args, **kwargs)

    setattr(torch_checkpoint, name, generator)
    try:
        yield
    finally:
        setattr(torch_checkpoint, name, original)


def function_attributes(loss: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(sequence number of its node, tensor) for each tensor that an autograd Function holds as an attribute of ctx."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            for value in vars(node).values():
                if isinstance(value, torch.Tensor):
                    yield node._sequence_nr(), value
