"""Records every operator, module call, saved tensor and storage lifetime of one forward and backward run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .graph import Ref
from .kernels import OpInfo, op_info, price
from .recording import RawCall, RawOp, RawStorage, RawTensor, Recording

_SKIPPED = ("prim::device", "prim::layout")
_NO_NODE = 2**64 - 1  # the sequence number of AccumulateGrad


class Recorder(TorchDispatchMode):
    """Dispatch mode that fills a `Recording`; module hooks tell it where in the model it is.

    Parameters
    ----------
    model : nn.Module
        Its modules name the calls, its parameters and buffers are known by FQN.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.recording = Recording()
        self.paused = False
        self.in_backward = False
        self._infos: dict[Any, OpInfo] = {}
        self._ids: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[torch.Tensor]] = {}
        self._storages: dict[int, int] = {}
        self._on_storage: dict[int, dict[int, None]] = {}
        self._stack: list[int] = []
        self._by_sequence: dict[int, int] = {}
        self._packed: list[tuple[int, int]] = []
        self._numbers: dict[str, int] = {}
        self._fqns = {id(m): name for name, m in model.named_modules()}

    # tensors and storages

    def known(self, tensor: torch.Tensor) -> int:
        """The id of `tensor`, registering a tensor never seen before as a constant."""
        found = self._ids.get(id(tensor))
        if found is None:
            return self.register(tensor, "constant")
        if tensor.requires_grad:  # autograd says so only after the operator that made the tensor is recorded
            self.recording.tensors[found].requires_grad = True
        return found

    def register(self, tensor: torch.Tensor, kind: str, fqn: str = "") -> int:
        """Give `tensor` a new id (again, if it was written in place)."""
        rec = self.recording
        cdata = tensor.untyped_storage()._cdata
        storage = self._storages.get(cdata)
        if storage is None:
            storage = len(rec.storages)
            rec.storages.append(RawStorage(tensor.untyped_storage().nbytes(), kind, rec.clock))
            self._storages[cdata] = storage
        new = RawTensor(
            len(rec.tensors),
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            storage,
            tensor.is_contiguous(),
            tensor.requires_grad,
            kind,
            fqn,
        )
        rec.tensors.append(new)
        key = id(tensor)
        if key not in self._refs:
            rec.storages[storage].live += 1
            self._on_storage.setdefault(storage, {})[key] = None

            def released(_: Any, key: int = key, storage: int = storage, cdata: int = cdata) -> None:
                self._ids.pop(key, None)
                self._refs.pop(key, None)
                self._on_storage[storage].pop(key, None)
                entry = rec.storages[storage]
                entry.live -= 1
                if entry.live == 0:
                    entry.died = rec.clock
                    self._storages.pop(cdata, None)

            self._refs[key] = weakref.ref(tensor, released)
        self._ids[key] = new.id
        return new.id

    def storage_of(self, tensor_id: int) -> RawStorage:
        """The storage of a recorded tensor."""
        return self.recording.storages[self.recording.tensors[tensor_id].storage]

    # operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and record it."""
        kwargs = kwargs or {}
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = op_info(func)
        if self.paused or info.namespace == "prim":
            return func(*args, **kwargs)
        inputs = [self.known(t) for t in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        self.recording.clock += 1
        outputs = self._outputs(info, args, inputs, result)
        if self.in_backward:
            self._record_backward(info, args, kwargs, inputs, result)
        else:
            self._record_forward(info, args, kwargs, inputs, outputs, result)
        return result

    def _outputs(self, info: OpInfo, args: tuple[Any, ...], inputs: list[int], result: Any) -> list[int]:
        made_from_inputs = any(self.recording.tensors[i].kind != "constant" for i in inputs)
        kind = "activation" if made_from_inputs else "constant"
        weights = bool(inputs) and all(self.storage_of(i).weight_like for i in inputs)
        outputs = []
        for position in info.written:
            target = args[position] if position < len(args) else None
            if isinstance(target, torch.Tensor):
                outputs += self._rewritten(target, kind)
        for tensor in _tensors(result):
            if id(tensor) in self._ids:  # its own argument, written or only handed through
                continue
            new = self.register(tensor, kind)
            outputs.append(new)
            if weights:
                self.storage_of(new).weight_like = True
        return outputs

    def _rewritten(self, target: torch.Tensor, kind: str) -> list[int]:
        """New ids of `target` and of every live tensor on its storage: what is read later depends on the write."""
        before = self.known(target)
        storage = self.recording.tensors[before].storage
        if self.storage_of(before).kind in ("parameter", "buffer"):
            return []
        found = [self.register(target, kind)]
        for key in tuple(self._on_storage[storage]):
            alias = self._refs[key]()
            if alias is not None and alias is not target:
                found.append(self.register(alias, kind))
        return found

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
            rec.opaque[rec.calls[call].fqn if call >= 0 else ""] = unknown
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
        rec.ops.append(op)
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
        index = len(rec.ops) - 1 if sequence is None else self._by_sequence.get(sequence)
        if index is None or index < 0:
            return
        op = rec.ops[index]
        kernels, unknown = price(info, args, kwargs, result, self._wrt(op, inputs))
        if unknown:
            rec.opaque[rec.calls[op.call].fqn if op.call >= 0 else ""] = unknown
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

    def _finish(self) -> None:
        """Give saved tensors to their operators; drop the detached aliases that autograd makes of outputs."""
        rec = self.recording
        used = {t for op in rec.ops for t in op.inputs} | {t for c in rec.calls for t in c.outputs}
        alias: dict[int, int] = {}
        for op in rec.ops:
            if op.name == "aten.detach.default" and not used & set(op.outputs):
                op.dead = True
                alias[op.outputs[0]] = alias.get(op.inputs[0], op.inputs[0])
        for sequence, tensor in self._packed:
            index = self._by_sequence.get(sequence)
            if index is not None and index >= 0:
                saved = rec.ops[index].saved
                t = alias.get(tensor, tensor)
                if t not in saved:
                    saved.append(t)
        rec.produced = {t for op in rec.ops if not op.dead for t in op.outputs}
        rec.produced |= {t for c in rec.calls if c.replay_of >= 0 for t in c.outputs if t not in c.inputs}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                entry = self._storages.get(parameter.grad.untyped_storage()._cdata)
                if entry is not None:
                    rec.storages[entry].parameter_gradient = True

    # module calls

    def enter(self, module: nn.Module, args: Any, kwargs: Any, replay_of: int = -1) -> int:
        """Open a module call."""
        rec = self.recording
        fqn = self._fqns[id(module)]
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
        call = self.recording.calls[self._stack.pop()]
        call.end = len(self.recording.ops)
        call.outputs = tuple(self.known(t) for t in _tensors(output))

    @property
    def current_call(self) -> int:
        """Index of the innermost open module call, -1 outside the model."""
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


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Tensor leaves of nested containers, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
