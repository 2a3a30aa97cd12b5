"""Traces a model: runs its own forward, loss and backward on fake tensors and records what happens.

Nothing is captured or rewritten. Parameters, buffers and inputs become fake tensors (shapes without memory), the
user's code runs with the fake mode inactive, and a dispatch mode records every operator. Three microbatch sizes
are traced: two give every figure as a function of the size, the third proves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from .affine import NotAffine, fit, merge
from .chain import ReplayInexact, Span, build_chain, expandable, output_leaf, sources
from .fold import Folded, fold, relative
from .graph import ModelGraph, ModelInput, Parameter, Unit
from .graph_view import absolute, shared_saved
from .inputs import Inputs
from .recorder import Recorder, Recording
from .replay import Replayer
from .signature import repeated_lists
from .target import Target
from .user_module import user_code

BATCHES = (2, 3, 5)


@dataclass(slots=True)
class _Run:
    """One traced run, folded."""

    recording: Recording
    spans: list[Span]
    folded: Folded
    inputs: dict[str, int]
    replayed: int
    dropout: tuple[str, ...]


class _Attention(TorchFunctionMode):
    """Keeps scaled-dot-product attention one operator: the CPU kernel has no dropout, so it is noted, not drawn."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.dropout: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, attention without its dropout."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            if p:
                call = self.recorder.current_call
                self.dropout[self.recorder.recording.calls[call].fqn if call >= 0 else ""] = None
                args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
                kwargs.update({} if len(args) > 4 else {"dropout_p": 0.0})
        return func(*args, **kwargs)


class _FakeModel:
    """The model with parameters and buffers replaced by fake tensors, in the dtype of the run's compute."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model = model
        self.repeated = repeated_lists(model)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.compute = torch.bfloat16 if precision == "bf16" else None
        made: dict[int, Any] = {}
        for module in model.modules():
            for tensors, wrap in ((module._parameters, True), (module._buffers, False)):
                for name, tensor in tensors.items():
                    if tensor is None or (not wrap and not tensor.is_meta):
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = self._replace(tensor, wrap)
                    tensors[name] = made[id(tensor)]

    def _replace(self, tensor: torch.Tensor, parameter: bool) -> torch.Tensor:
        dtype = self.cast(tensor.dtype) if parameter else tensor.dtype
        new = self.empty(tensor.shape, tensor.stride(), dtype)
        if parameter:  # nn.Parameter(new) would dispatch a detach; this is what it leaves behind
            new._is_param = True
            new.requires_grad_(tensor.requires_grad)
        return new

    def cast(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of `dtype` computes in."""
        return self.compute if self.compute is not None and dtype.is_floating_point else dtype

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> FakeTensor:
        """A fake tensor on the CPU."""
        meta = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
        return FakeTensor(self.mode, meta, torch.device("cpu"))

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake stand-in for a real input."""
        return self.empty(tensor.shape, tensor.stride(), self.cast(tensor.dtype))


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


@contextmanager
def _random_state() -> Iterator[None]:
    """The same random draws every time, the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _run_once(
    fake: _FakeModel, target: Target, batch: int, seq: int, parameters: Mapping[str, Parameter], full: bool
) -> _Run:
    """Forward, loss and backward at one microbatch size."""
    model = fake.model
    recorder = Recorder(model)
    for name, tensor in model.named_parameters():
        recorder.storage_of(recorder.register(tensor, "parameter", name)).weight_like = True
    for name, tensor in model.named_buffers():
        recorder.register(tensor, "buffer", name)
    replayer = Replayer(fake.repeated, recorder, fake.empty)
    attention = _Attention(recorder)
    with _random_state():
        inputs = target.example_inputs(model, batch, seq).map(fake.fake)
        named = {name: recorder.register(tensor, "input", name) for name, tensor in inputs.tensors().items()}
        with user_code(f"{target.name} failed while being traced", target._source.folder):
            _forward_backward(recorder, replayer, attention, target, inputs, full)
    for parameter in model.parameters():
        parameter.grad = None
    spans = build_chain(recorder.recording, expandable(model, fake.repeated))
    folded = fold(recorder.recording, spans, parameters)
    return _Run(recorder.recording, spans, folded, named, replayer.replayed, tuple(attention.dropout))


def _forward_backward(
    recorder: Recorder, replayer: Replayer, attention: _Attention, target: Target, inputs: Inputs, full: bool
) -> None:
    model = recorder.model
    with recorder.watch(), attention:
        if full:
            output = model(*inputs.args, **inputs.kwargs)
        else:
            with replayer.active():
                output = model(*inputs.args, **inputs.kwargs)
        loss = target.loss(output, inputs)
        del output
        if not loss.requires_grad:
            raise ModelError(
                f"The loss of {target.name} depends on no trainable parameter.",
                "Return a loss computed from the model's output, without detach() or no_grad().",
            )
        recorder.in_backward = True
        loss.backward()


def _units(run: _Run) -> tuple[Unit, ...]:
    rec, spans = run.recording, run.spans
    leaves = {t: k for k, t in enumerate(run.inputs.values())}
    seen: set[str] = set()
    units = []
    for span, where in zip(spans, sources(spans, leaves), strict=True):
        names = [rec.calls[c].fqn for c in span.calls]
        if span.template >= 0:
            template = spans[span.template]
            inner = [relative(rec.calls[c].fqn, template.call.fqn) for c in template.calls]
            names += [f"{span.call.fqn}.{name}" for name in inner if name and not name.startswith("/")]
        modules = tuple(name for name in dict.fromkeys(names) if name not in seen)
        seen.update(modules)
        units.append(
            Unit(
                span.position,
                span.call.fqn,
                span.call.number,
                run.folded.class_of[span.position],
                where,
                span.replicated,
                span.cut_after,
                span.wire,
                modules,
                tuple(output_leaf(rec, span, t) for t in span.outputs),
            )
        )
    return tuple(units)


def _used_parameters(graph_units: Sequence[Unit], folded: Folded) -> set[str]:
    used = set()
    for unit in graph_units:
        for p in folded.classes[unit.class_index].parameters:
            used.add(absolute(p.fqn, unit.fqn))
    return used


def trace(target: Target, *, sequence_length: int, precision: str = "bf16", full: bool = False) -> ModelGraph:
    """Trace a model into units, classes and figures that hold for every microbatch size.

    Parameters
    ----------
    target : Target
    sequence_length : int
        Tokens, or the side of images.
    precision : {"bf16", "fp32"}
        "bf16": parameters and floating inputs compute in bfloat16; masters stay what the model's code makes.
    full : bool
        Run every repeated layer instead of replaying those between the second and the last.

    Raises
    ------
    ModelError
        If the model's code fails, or a figure is no affine function of the microbatch size.
    """
    model = target.build("meta").train()
    parameters = describe_parameters(model)
    tied = tied_parameters(model)
    fake = _FakeModel(model, precision)
    notes: list[str] = []
    try:
        runs = [_run_once(fake, target, b, sequence_length, parameters, full) for b in BATCHES]
    except ReplayInexact as error:
        notes.append(f"every repeated layer was traced: {error}")
        runs = [_run_once(fake, target, b, sequence_length, parameters, True) for b in BATCHES]
    return _assemble(target, model, runs, parameters, tied, notes, sequence_length, precision)


def _assemble(
    target: Target,
    model: nn.Module,
    runs: Sequence[_Run],
    parameters: Mapping[str, Parameter],
    tied: tuple[tuple[str, ...], ...],
    notes: list[str],
    sequence_length: int,
    precision: str,
) -> ModelGraph:
    first = runs[0]
    units = _units(first)
    if any(_units(run) != units for run in runs[1:]):
        raise ModelError(
            f"{target.name} runs other modules, or joins them otherwise, at other microbatch sizes.",
            "Make its forward run the same operators at every batch size.",
        )
    owners = [next(u.fqn for u in units if u.class_index == i) for i in range(len(first.folded.classes))]
    classes = merge(BATCHES, [run.folded for run in runs], owners)
    used = _used_parameters(units, first.folded)
    unused = tuple(f for f, p in parameters.items() if p.requires_grad and not p.is_buffer and f not in used)
    if first.replayed:
        notes.append(f"{first.replayed} repeated layers have the figures of an equal layer that was traced")
    if first.dropout:
        notes.append(f"attention dropout is not drawn while tracing ({len(first.dropout)} modules)")
    if unused:
        notes.append(f"{len(unused)} trainable parameters are never used, the first: {unused[0]}")
    graph = ModelGraph(
        name=target.name,
        precision=precision,
        sequence_length=sequence_length,
        classes=classes,
        units=units,
        inputs=_model_inputs(runs),
        parameters=parameters,
        tied=tied,
        unused=unused,
        batch_norm=tuple(n for n, m in model.named_modules() if isinstance(m, _BatchNorm)),
        loss=target.loss_description,
        traced_batches=BATCHES,
        notes=(*target.notes, *notes),
    )
    shared = zip(units, shared_saved(graph), strict=True)
    units = tuple(replace(unit, shared_saved=kept) for unit, kept in shared)
    return replace(graph, units=units, opaque=_opaque(graph, first.recording))


def _model_inputs(runs: Sequence[_Run]) -> tuple[ModelInput, ...]:
    found = []
    for name in runs[0].inputs:
        tensors = [run.recording.tensors[run.inputs[name]] for run in runs]
        try:
            shape = tuple(fit(BATCHES, sizes) for sizes in zip(*(t.shape for t in tensors), strict=True))
        except (NotAffine, ValueError):
            raise ModelError(
                f"The input {name} is no linear function of the batch size.",
                "Let example_inputs(batch, seq) make dimensions of batch, seq or constant size.",
            ) from None
        found.append(ModelInput(name, shape, tensors[0].dtype))
    return tuple(found)


def _opaque(graph: ModelGraph, rec: Recording) -> tuple[tuple[str, str, float], ...]:
    """(FQN, reason, share of the model's forward FLOPs) of modules with operators that have no cost formula."""
    total = graph.flops_forward.at(1)
    found = []
    for fqn, reason in rec.opaque.items():
        inside = 0.0
        for unit in graph.units:
            for op in graph.classes[unit.class_index].ops:
                name = absolute(op.fqn, unit.fqn)
                if name == fqn or name.startswith(fqn + "."):
                    inside += op.forward.flops.at(1)
        found.append((fqn, reason, inside / total if total else 0.0))
    return tuple(found)
