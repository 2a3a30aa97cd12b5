"""Replays repeated layers while tracing: a layer like one already traced returns the same kind of outputs at once.

Of equal members of a list, called with equally shaped arguments after equal operators of their parent, the first
two and the last run for real; the ones between only make outputs of the shapes that the second returned, joined
to their inputs by one autograd node. The chain then gives them the second's class, and folding checks the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .graph import Ref
from .recorder import Recorder
from .signature import LISTS, plain_arguments, rate

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
    """A call that ran for real and may stand for later ones.

    `strides` are those of the gradients that the last of the equal calls gave its arguments, by their place.
    """

    call: int
    spec: TreeSpec
    outputs: list[_Output]
    differentiable: list[int]
    strides: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    members: list[nn.Module]
    traced: dict[Any, list[_Template | None]] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)


class _Stand(torch.autograd.Function):
    """The autograd node of a replayed call: gradients of the shapes of its inputs."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Any], gradient: Callable[..., Any], *inputs: torch.Tensor) -> Any:
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
        made = [ctx.gradient(i, *ctx.like[i]) if w else None for i, w in enumerate(wanted)]
        return (None, None, *made)


class Replayer:
    """Replaces the forward of repeated modules while its context is open.

    Parameters
    ----------
    repeated : mapping
        What `repeated_lists` found.
    opened : collection
        FQNs of modules that are looked into (`expandable`); a member that any other module calls is not replayed.
    recorder : Recorder
    empty : callable
        ``empty(shape, stride, dtype)`` makes a fake tensor.
    """

    def __init__(
        self,
        repeated: Mapping[str, Sequence[list[nn.Module]]],
        opened: Collection[str],
        recorder: Recorder,
        empty: Callable[..., torch.Tensor],
    ) -> None:
        self.recorder = recorder
        self.opened = opened
        self.empty = empty
        self.replayed = 0
        self._barrier = 0
        self._groups: list[_Group] = []
        for groups in repeated.values():
            for members in groups:
                self._add(members)

    def _add(self, members: Sequence[nn.Module]) -> None:
        """A group of equal members; of members that are lists, which nobody calls, their children's groups."""
        if len(members) < _FEWEST or any(_watched(m) for m in members):
            return
        if all(isinstance(m, LISTS) and not isinstance(m, nn.Sequential) for m in members):
            for children in zip(*(m.children() for m in members), strict=True):
                self._add(children)
        else:
            self._groups.append(_Group(list(members)))

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
            if not self._is_unit():
                return original(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            key = (str(spec), *_structure(leaves, index), self._glue(leaves))
            traced = group.traced.setdefault(key, [])
            repeated = index in group.called
            group.called.add(index)
            template = traced[1] if len(traced) >= 2 else None
            if template is not None:
                if index != last and not repeated:
                    return self._replay(template, leaves, group.members[index])
                self.recorder.recording.calls[self.recorder.current_call].like = template.call
                _watch_gradients(template, leaves)
            output = original(*args, **kwargs)
            traced.append(self._template(leaves, output))
            return output

        return forward

    def _is_unit(self) -> bool:
        """Whether the innermost open call is called by modules that are looked into."""
        calls = self.recorder.recording.calls
        parent = calls[self.recorder.current_call].parent
        while parent >= 0 and calls[parent].fqn in self.opened:
            parent = calls[parent].parent
        return parent < 0

    def _glue(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The operators that opened modules ran since the last unit, with tensors numbered by first use."""
        rec = self.recorder.recording
        start = len(rec.ops)
        while start > self._barrier and self._is_glue(rec.ops[start - 1].call):
            start -= 1
        numbers: dict[int, int] = {}
        items: list[Any] = []
        for op in rec.ops[start:]:
            items.append(
                (
                    op.name,
                    rec.calls[op.call].fqn if op.call >= 0 else "",
                    _numbered(plain_arguments(op.name, op.args), numbers),
                )
            )
            items.append(tuple(numbers.setdefault(t, len(numbers)) for t in op.outputs))
        for raw in numbers:
            t = rec.tensors[raw]
            items.append((t.shape, t.dtype, t.kind, t.requires_grad, t.contiguous, t.fqn))
        if items:
            ids = (self.recorder.known(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
            items.append(tuple(numbers.get(i, -1) for i in ids))
        return tuple(items)

    def _is_glue(self, call: int) -> bool:
        return call < 0 or self.recorder.recording.calls[call].fqn in self.opened

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
        self._barrier = len(self.recorder.recording.ops)
        self.recorder.recording.clock += 1
        self.recorder.recording.calls[self.recorder.current_call].replay_of = template.call
        new = [o for o in template.outputs if o.shape is not None]

        def make() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            made = [self.empty(o.shape, o.stride, o.dtype) for o in new]
            return made, [t for t, o in zip(made, new, strict=True) if not o.requires_grad]

        def gradient(place: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            with self.recorder.pause():
                made = self.empty(shape, strides.get(place, stride), dtype)
                self.recorder.recording.clock += 1
                self.recorder.register(made, "activation")
                return made

        wanted, strides = [leaves[i] for i in template.differentiable], template.strides
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


def _watch_gradients(template: _Template, leaves: Sequence[Any]) -> None:
    """Note how the gradients of a real call's arguments lie in memory, for the replayed calls before it."""

    def noting(place: int) -> Callable[[torch.Tensor], None]:
        return lambda gradient: template.strides.__setitem__(place, gradient.stride())

    for place, i in enumerate(template.differentiable):
        leaves[i].register_hook(noting(place))


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
        elif isinstance(leaf, float):
            items.append(rate(leaf))
        elif leaf is None or isinstance(leaf, (bool, int, str, torch.dtype, torch.device)):
            items.append((type(leaf).__name__, leaf))
        else:
            items.append((type(leaf).__name__, id(leaf)))
    return items


def _numbered(value: Any, numbers: dict[int, int]) -> Any:
    """Arguments of an operator with its tensors numbered by first use."""
    if isinstance(value, Ref):
        return Ref(numbers.setdefault(value.tensor, len(numbers)))
    if isinstance(value, tuple):
        return tuple(_numbered(v, numbers) for v in value)
    return (type(value).__name__, value)
