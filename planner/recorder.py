"""Records every operator, module call, saved tensor and storage lifetime of one forward and backward run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _get_sequence_nr
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .fake_run import FakeRun
from .graph import Ref
from .kernels import OpInfo, op_info, price
from .own_checkpoints import Again, function_attributes
from .recording import RawCall, RawOp, Recording
from .registry import Registry
from .values import frozen

_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")
_NO_NODE = 2**64 - 1  # the sequence number of AccumulateGrad


class Recorder(TorchDispatchMode):
    """Dispatch mode that fills a `Recording`; module hooks tell it where in the model it is.

    Parameters
    ----------
    model : nn.Module
        Its modules name the calls, its parameters and buffers are known by FQN.
    empty : callable
        ``empty(shape, stride, dtype)`` makes a tensor of the run's kind with nothing in it.

    Attributes
    ----------
    fake : FakeRun or None
        Runs the operators of a run on fake tensors.
    on_call : callable
        Called whenever a module call begins or ends.
    """

    def __init__(self, model: nn.Module, empty: Callable[..., torch.Tensor] = torch.empty_strided) -> None:
        super().__init__()
        self.model = model
        self.recording = Recording()
        self.registry = Registry(self.recording, empty)
        self.register, self.known = self.registry.register, self.registry.known
        self.storage_of = self.recording.storage_of
        self.fake: FakeRun | None = None
        self.on_call: Callable[[], None] = _nothing
        self.on_operator: Callable[[], None] = _nothing
        self.paused = False
        self.in_backward = False
        self._infos: dict[Any, OpInfo] = {}
        self._stack: list[int] = []
        self._by_sequence: dict[int, int] = {}
        self._packed: list[tuple[int, int]] = []
        self._kept_by_next: list[int] = []
        self._again = Again(self.recording)
        self._numbers: dict[str, int] = {}
        self._fqns = {id(m): name for name, m in model.named_modules()}

    def replace_parameter(self, old: torch.Tensor, new: torch.Tensor) -> Any:
        """`new` as the parameter that `old` was."""
        made: Any = new.detach().requires_grad_(old.requires_grad)
        made._is_param = True
        fqn = self.recording.tensors[self.known(old)].fqn
        self.storage_of(self.register(made, "parameter", fqn)).weight_like = True
        return made

    # operators

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would wrap every dispatch so that Dynamo leaves it alone, and nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and record it."""
        if func is _DEVICE and type(args[0]) is FakeTensor:  # two of three calls: autograd asks for every gradient
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = op_info(func)
        if self.paused or info.namespace == "prim":
            return func(*args, **kwargs)
        inputs = [self.known(t) for t in _operands(args)]
        if kwargs:
            inputs += [self.known(t) for t in _operands(kwargs.values())]
        if self.fake is None:
            result = func(*args, **kwargs)
            self.recording.clock += 1
            outputs = self._outputs(info, args, inputs, result)
        else:
            before = iter(inputs)
            noted = func, info, frozen(args, before), frozen(kwargs, before), inputs
            result = self.fake.run(func, info, args, kwargs, inputs)
            self.recording.clock += 1
            outputs = self._outputs(info, args, inputs, result)
            self._note_values(noted, args, outputs, result)
        if self.in_backward:
            self._record_backward(info, args, kwargs, inputs, result)
        else:
            self._record_forward(info, args, kwargs, inputs, outputs, result)
        return result

    def _outputs(self, info: OpInfo, args: tuple[Any, ...], inputs: list[int], result: Any) -> list[int]:
        rec = self.recording
        made_from_inputs = any(rec.tensors[i].kind != "constant" for i in inputs)
        kind = "activation" if made_from_inputs else "constant"
        weights = bool(inputs) and all(rec.storage_of(i).weight_like for i in inputs)
        outputs = []
        for position in info.written:
            target = args[position] if position < len(args) else None
            if isinstance(target, torch.Tensor):
                outputs += self._rewritten(target, kind)
        for tensor in _operands((result,)):
            if self.registry.id_of(tensor) is not None:  # its own argument, written or only handed through
                continue
            new = self.register(tensor, kind)
            outputs.append(new)
            if weights:
                self.storage_of(new).weight_like = True
        return outputs

    def _rewritten(self, target: torch.Tensor, kind: str) -> list[int]:
        """New ids of `target` and of every live tensor on its storage: what is read later depends on the write."""
        before = self.known(target)
        if self.storage_of(before).kind in ("parameter", "buffer"):
            return []
        written = self.register(target, kind)
        found = [written]
        for alias in self.registry.aliases(target):
            old = self.known(alias)
            found.append(self.register(alias, kind))
            if self.fake is not None:
                self.fake.values.note_alias(alias, target, old, written, found[-1])
        return found

    def _note_values(self, noted: tuple[Any, ...], args: tuple[Any, ...], outputs: list[int], result: Any) -> None:
        """Tell `Values` how the outputs came about."""
        assert self.fake is not None
        values, info, made = self.fake.values, noted[1], {}
        fresh = set(outputs)
        for position in info.written:
            target = args[position] if position < len(args) else None
            if isinstance(target, torch.Tensor) and (number := self.known(target)) in fresh:
                made[number] = -1 - position
        for leaf, tensor in enumerate(_operands((result,))):
            number = self.registry.id_of(tensor)
            if number in fresh and number not in made:
                made[number] = leaf
                if not tensor.is_contiguous():
                    values.note_layout(number, tensor)
        if made:
            where = self.fake.place()[1] if values.chance.decides(info, result) else ""
            values.note(noted[0], info, noted[2], noted[3], noted[4], made, where)

    def _record_forward(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[int],
        outputs: list[int],
        result: Any,
    ) -> None:
        kernels, unknown = price(info, args, kwargs, result, "forward")
        rec = self.recording
        call = self._stack[-1] if self._stack else -1
        if unknown:
            where = f"{self.fake.place()[1]}: " if self.fake is not None else ""
            rec.opaque[rec.calls[call].fqn if call >= 0 else ""] = where + unknown
        op = RawOp(
            len(rec.ops),
            info.name,
            call,
            self._template(args, kwargs, inputs),
            tuple(dict.fromkeys(inputs)),
            tuple(outputs),
            kernels[0],
            rec.clock,
        )
        op.saved += self._kept_by_next
        self._kept_by_next.clear()
        rec.ops.append(op)
        self.on_operator()
        self._by_sequence.setdefault(_get_sequence_nr() - 1, op.index)

    def _template(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[int]) -> tuple[Any, ...]:
        """The arguments with tensors replaced by `Ref`, keyword arguments as (name, value) pairs at the end."""
        ids = iter(inputs)

        def plain(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return Ref(next(ids))
            if isinstance(value, (list, tuple)):
                return tuple(plain(v) for v in value)
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            return str(value).removeprefix("torch.")

        return (*(plain(a) for a in args), *((name, plain(value)) for name, value in kwargs.items()))

    def _record_backward(
        self, info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[int], result: Any
    ) -> None:
        rec = self.recording
        node = torch._C._current_autograd_node()
        sequence = node._sequence_nr() if node is not None else None
        if sequence == _NO_NODE:
            for t in inputs:
                self.storage_of(t).parameter_gradient = True
            return
        op = self._again.match(info.name)
        if op is not None:
            rec.computed_again += 1
        else:
            index = len(rec.ops) - 1 if sequence is None else self._by_sequence.get(sequence)
            if index is None or index < 0:
                return
            op = rec.ops[index]
        if torch.is_grad_enabled():  # computed again: what follows backward through it belongs to it
            self._by_sequence.setdefault(_get_sequence_nr() - 1, op.index)
            kernels, unknown = price(info, args, kwargs, result, "other")
        else:
            kernels, unknown = price(info, args, kwargs, result, self._wrt(op, inputs))
        if unknown:
            rec.opaque.setdefault(rec.calls[op.call].fqn if op.call >= 0 else "", unknown)
        op.backward.extend(k for k in kernels if k.kind != "free")
        op.backward_clocks.append(rec.clock)

    def _wrt(self, op: RawOp, inputs: list[int]) -> str:
        """What a backward kernel of `op` computes: it needs the weight for "input", and not for "weight"."""
        if op.kernel.kind == "embedding":
            return "weight"
        if op.kernel.kind not in ("gemm", "attention"):
            return "other"
        weights = {self.recording.tensors[i].storage for i in op.inputs if self.storage_of(i).weight_like}
        used = {self.recording.tensors[i].storage for i in inputs}
        return "weight" if weights and not weights & used else "input"

    def disown_last_node(self) -> None:
        """The autograd node made last belongs to no operator (it stands for a replayed call)."""
        self._by_sequence.setdefault(_get_sequence_nr() - 1, -1)

    # saved tensors

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook of `saved_tensors_hooks`: note what autograd keeps, and for which node."""
        if not self.paused and not self.in_backward:
            self._packed.append((_get_sequence_nr() - 1, self.known(tensor)))
        return tensor

    def keep(self, tensors: list[torch.Tensor]) -> None:
        """The next operator keeps `tensors` for backward, whatever autograd says."""
        if not self.paused and not self.in_backward:
            self._kept_by_next += [self.known(t) for t in tensors]

    def begin_backward(self, loss: torch.Tensor) -> None:
        """The forward is through; note what Functions keep on their own."""
        with self.pause():
            for sequence, tensor in function_attributes(loss):
                number = self.registry.id_of(tensor)
                if number is not None:  # else nothing traced: a random state
                    self._packed.append((sequence, number))
        self.in_backward = True

    def _finish(self) -> None:
        """Give saved tensors to their operators; drop the detached aliases that autograd makes of outputs."""
        rec = self.recording
        used = {t for op in rec.ops for t in op.inputs} | {t for c in rec.calls for t in c.outputs}
        alias: dict[int, int] = {}
        for op in rec.ops:
            if op.name == "aten.detach.default" and not op.backward and not used & set(op.outputs):
                op.dead = True
                alias[op.outputs[0]] = alias.get(op.inputs[0], op.inputs[0])
        made_by = {t: op.index for op in rec.ops for t in op.outputs}
        for sequence, tensor in self._packed:
            index = self._by_sequence.get(sequence)
            if index is not None and index >= 0:
                t = alias.get(tensor, tensor)
                # an autograd Function is known by its first operator; it may save what a later one made
                saved = rec.ops[max(index, made_by.get(t, index))].saved
                if t not in saved:
                    saved.append(t)
        rec.produced = {t for op in rec.ops if not op.dead for t in op.outputs}
        rec.produced |= {t for c in rec.calls if c.replay_of >= 0 for t in c.outputs if t not in c.inputs}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                entry = self.registry.storage_number(parameter.grad)
                if entry is not None:
                    rec.storages[entry].parameter_gradient = True

    # module calls

    def enter(self, module: nn.Module, args: Any, kwargs: Any, replay_of: int = -1) -> int:
        """Open a module call."""
        self.on_call()
        rec = self.recording
        fqn = self._fqns[id(module)]
        if self.in_backward:
            self._again.enter(fqn)
            return -1
        number = self._numbers[fqn] = self._numbers.get(fqn, -1) + 1
        parent = self._stack[-1] if self._stack else -1
        call = RawCall(len(rec.calls), fqn, number, type(module).__name__, parent, len(rec.ops))
        call.inputs = tuple(self.known(t) for t in _tensors((args, kwargs)))
        call.replay_of = replay_of
        rec.calls.append(call)
        self._stack.append(call.index)
        return call.index

    def leave(self, output: Any) -> None:
        """Close the innermost module call."""
        self.on_call()
        if self.in_backward:
            self._again.leave()
            return
        call = self.recording.calls[self._stack.pop()]
        call.end = len(self.recording.ops)
        call.outputs = tuple(self.known(t) for t in _tensors(output))

    @property
    def open_calls(self) -> Sequence[int]:
        """Indices of the module calls that are running, the outermost first."""
        return self._stack

    @property
    def current_call(self) -> int:
        """Index of the innermost open module call (in backward, of the call whose backward it is), -1 outside."""
        if self.in_backward:
            node = torch._C._current_autograd_node()
            index = self._by_sequence.get(node._sequence_nr(), -1) if node is not None else -1
            return self.recording.ops[index].call if index >= 0 else -1
        return self._stack[-1] if self._stack else -1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Run without recording."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Record inside: module hooks, saved-tensor hooks, and this dispatch mode."""
        handles: list[Any] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter(module, args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.leave(output)

        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        saved = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        try:
            with self, saved:
                yield
            self._finish()
        finally:
            for handle in handles:
                handle.remove()


def _nothing() -> None:
    """What happens at a module call if nobody asked for more."""


def _operands(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results, in order: its only containers are lists and tuples."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _operands(value)
    return found


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Tensor leaves of nested containers, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
