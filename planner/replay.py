"""Replays repeated layers while tracing: a layer like one already traced returns the same kind of outputs at once.

Of equal members of a list, called with equally shaped arguments, the first two and the last run for real; the
ones between only make outputs of the shapes that the second returned, joined to their inputs by one autograd
node. The chain then gives them the second's class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .recorder import Recorder

_FEWEST = 4  # first two and last are real: with fewer members there is nothing between


@dataclass(slots=True)
class _Output:
    """One output leaf: an input leaf passed through, a new tensor, or a plain value."""

    passed: int = -1
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    value: Any = None


@dataclass(slots=True)
class _Template:
    """A call that ran for real and may stand for later ones."""

    call: int
    spec: TreeSpec
    outputs: list[_Output]
    differentiable: list[int]


@dataclass(slots=True)
class _Group:
    members: list[nn.Module]
    traced: dict[Any, list[_Template | None]] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)


class _Stand(torch.autograd.Function):
    """The autograd node of a replayed call: gradients of the shapes of its inputs."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Any], gradient: Callable[[Any], Any], *inputs: torch.Tensor) -> Any:
        """Make the outputs."""
        ctx.set_materialize_grads(False)  # an output without a gradient would get real zeros of its size
        outputs, fixed = make()
        ctx.gradient = gradient
        ctx.like = [(tuple(t.shape), t.stride(), t.dtype) for t in inputs]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of the inputs that need one."""
        wanted = ctx.needs_input_grad[2:]
        made = [ctx.gradient(like) if w else None for like, w in zip(ctx.like, wanted, strict=True)]
        return (None, None, *made)


class Replayer:
    """Replaces the forward of repeated modules while its context is open.

    Parameters
    ----------
    repeated : mapping
        What `repeated_lists` found.
    recorder : Recorder
    empty : callable
        ``empty(shape, stride, dtype)`` makes a fake tensor.
    """

    def __init__(
        self, repeated: Mapping[str, Sequence[list[nn.Module]]], recorder: Recorder, empty: Callable[..., torch.Tensor]
    ) -> None:
        self.recorder = recorder
        self.empty = empty
        self.replayed = 0
        self._groups: list[_Group] = []
        for groups in repeated.values():
            for members in groups:
                if len(members) >= _FEWEST and not any(_watched(m) for m in members):
                    self._groups.append(_Group(members))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Replay inside."""
        changed: list[nn.Module] = []
        try:
            for group in self._groups:
                for index, member in enumerate(group.members):
                    if "forward" not in vars(member):
                        member.forward = self._wrap(group, index, member.forward)
                        changed.append(member)
            yield
        finally:
            for member in changed:
                del member.forward

    def _wrap(self, group: _Group, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        last = len(group.members) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            key = (str(spec), *_structure(leaves, index))
            traced = group.traced.setdefault(key, [])
            repeated = index in group.called
            group.called.add(index)
            if len(traced) >= 2 and traced[1] is not None and index != last and not repeated:
                return self._replay(traced[1], leaves, group.members[index])
            output = original(*args, **kwargs)
            traced.append(self._template(leaves, output))
            return output

        return forward

    def _template(self, leaves: Sequence[Any], output: Any) -> _Template | None:
        """What a replay of this call must return; None if that cannot be known."""
        rec, call = self.recorder.recording, self.recorder.current_call
        out_leaves, spec = tree_flatten(output)
        place = {id(t): i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
        storages = {t.untyped_storage()._cdata for t in leaves if isinstance(t, torch.Tensor)}
        outputs: list[_Output] = []
        for leaf in out_leaves:
            if not isinstance(leaf, torch.Tensor):
                if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                    return None
                outputs.append(_Output(value=leaf))
            elif id(leaf) in place:
                outputs.append(_Output(passed=place[id(leaf)]))
            else:
                storage = leaf.untyped_storage()._cdata
                if storage in storages:
                    return None
                storages.add(storage)
                outputs.append(_Output(-1, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad))
        ops = rec.ops[rec.calls[call].start :]
        return _Template(call, spec, outputs, [i for i in place.values() if self._reaches(leaves[i], out_leaves, ops)])

    def _reaches(self, leaf: torch.Tensor, outputs: Sequence[Any], ops: Sequence[Any]) -> bool:
        """Whether a differentiable output depends on `leaf`."""
        if not leaf.requires_grad:
            return False
        tensors = self.recorder.recording.tensors
        reached = {self.recorder.known(leaf)}
        for op in ops:
            if any(t in reached and tensors[t].requires_grad for t in op.inputs):
                reached.update(op.outputs)
        differentiable = (t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad)
        return any(self.recorder.known(t) in reached for t in differentiable)

    def _replay(self, template: _Template, leaves: Sequence[Any], member: nn.Module) -> Any:
        self.replayed += 1
        self.recorder.recording.clock += 1
        self.recorder.recording.calls[self.recorder.current_call].replay_of = template.call
        new = [o for o in template.outputs if o.shape is not None]

        def make() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            made = [self.empty(o.shape, o.stride, o.dtype) for o in new]
            return made, [t for t, o in zip(made, new, strict=True) if not o.requires_grad]

        def gradient(like: tuple[Any, ...]) -> torch.Tensor:
            with self.recorder.pause():
                made = self.empty(*like)
                self.recorder.recording.clock += 1
                self.recorder.register(made, "activation")
                return made

        wanted = [leaves[i] for i in template.differentiable]
        if not wanted and any(o.requires_grad for o in new):
            wanted = [next(p for p in member.parameters() if p.requires_grad)]
        with self.recorder.pause():
            made = iter(_Stand.apply(make, gradient, *wanted)) if new else iter(())
        self.recorder.disown_last_node()
        outputs = []
        for o in template.outputs:
            if o.shape is not None:
                tensor = next(made)
                self.recorder.register(tensor, "activation")
                outputs.append(tensor)
            else:
                outputs.append(leaves[o.passed] if o.passed >= 0 else o.value)
        return tree_unflatten(outputs, template.spec)


def _watched(module: nn.Module) -> bool:
    """Whether the user hangs hooks on the module or inside it: they may collect what a replay does not make."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def _structure(leaves: Sequence[Any], index: int) -> list[Any]:
    """What two calls must share to be of one kind; an integer equal to the layer's index is no difference."""
    first: dict[int, int] = {}
    items: list[Any] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            alias = first.setdefault(id(leaf), i)
            items.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad, alias))
        elif type(leaf) is int and leaf == index:
            items.append("index")
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            items.append((type(leaf).__name__, leaf))
        else:
            items.append((type(leaf).__name__, id(leaf)))
    return items
