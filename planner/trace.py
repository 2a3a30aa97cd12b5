"""Traces a model: runs its own forward, loss and backward on fake tensors and records what happens.

Nothing is captured or rewritten. Parameters, buffers and inputs become fake tensors (shapes without memory), the
user's code runs with the fake mode inactive, and a dispatch mode records every operator. Three microbatch sizes
are traced: two give every figure as a function of the size, the third proves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ModelError
from .affine import NotAffine, NotLinear, fit, merge
from .budget import Limits, TimeLoop
from .caches import forget_cached
from .chain import ReplayInexact, output_leaf, sources
from .construct import parameters_on_meta
from .fake_run import NEEDS_DATA
from .fold import align, relative
from .graph import ModelGraph, ModelInput, Parameter, Unit
from .graph_view import absolute, shared_saved
from .lengths import grids, trace_loops
from .opaque import opaque_parts, read_notes
from .run_once import Run, run_once, same_draws
from .stand_in import FakeModel, RealModel, describe_parameters, tied_parameters
from .target import Target
from .values import BufferRead

BATCHES = (2, 3, 5)
FOURTH = 7  # traced too where a figure is quadratic
LARGEST_REAL = 500_000_000  # parameters of a model that may be traced on real tensors


def _units(run: Run) -> tuple[Unit, ...]:
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
    try:
        return _traced(target, target.build("meta").train(), sequence_length, precision, full)
    except BufferRead:
        with same_draws(), parameters_on_meta():
            model = target.build("cpu").train()
    try:
        return _traced(target, model, sequence_length, precision, full)
    except BufferRead as read:
        raise ModelError(
            f"{target.name} looks at the values of its buffer {read.fqn}, which it makes on the meta device.",
            "Make the buffer with values, on the CPU.",
        ) from None


class _OtherCalls(Exception):
    """How often these units are called follows the microbatch size (a loop over samples): they must be one unit."""

    def __init__(self, units: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(units)))
        self.units = units


def _other_modules(target: Target) -> ModelError:
    return ModelError(
        f"{target.name} runs other modules, or joins them otherwise, at other microbatch sizes.",
        "Make its forward run the same operators at every batch size.",
    )


def _check_calls(runs: Sequence[Run]) -> None:
    """Every run must have called the same units as often."""
    counts = [Counter(span.call.fqn for span in run.spans) for run in runs]
    units = {fqn for count in counts for fqn in count}
    other = frozenset(fqn for fqn in units if len({count[fqn] for count in counts}) > 1)
    if other:
        raise _OtherCalls(other)


def _traced(target: Target, model: nn.Module, sequence_length: int, precision: str, full: bool) -> ModelGraph:
    """Trace a model that was built with its parameters on meta."""
    parameters = describe_parameters(model)
    tied = tied_parameters(model)
    fake = FakeModel(model, precision)
    forget_cached(model)

    def at(length: int, limits: Limits) -> ModelGraph:
        fake.limits = limits
        every = full or bool(limits.looped)
        try:
            try:
                return _trace(fake, target, length, parameters, tied, precision, every)
            except _OtherCalls as other:
                fake.limits = replace(limits, looped=limits.looped | other.units)
                return _trace(fake, target, length, parameters, tied, precision, True)
        except _OtherCalls:
            raise _other_modules(target) from None

    try:
        return at(sequence_length, Limits(bounded=not full))
    except TimeLoop as loop:
        return trace_loops(at, sequence_length, tuple(grids(model)), loop.fqn)
    finally:
        forget_cached(model)


def _trace(
    fake: FakeModel,
    target: Target,
    sequence_length: int,
    parameters: Mapping[str, Parameter],
    tied: tuple[tuple[str, ...], ...],
    precision: str,
    full: bool,
) -> ModelGraph:
    """Trace at one sequence length, on real tensors if data decides."""
    stand_in: RealModel = fake
    model = fake.model
    notes: list[str] = []
    try:
        runs = _runs(stand_in, target, sequence_length, parameters, full, notes)
    except ModelError as error:
        cause = error.__cause__
        if not _needs_memory(cause) or sum(p.numel for p in parameters.values()) > LARGEST_REAL:
            raise
        notes.append(f"traced with real data, the figures hold for its routing: {type(cause).__name__}: {cause}")
        with same_draws():
            stand_in = RealModel(target.build("cpu").train(), precision)
        full = True
        runs = _runs(stand_in, target, sequence_length, parameters, full, notes)
    try:
        return _assemble(target, model, runs, parameters, tied, notes, sequence_length, precision)
    except NotLinear:
        runs += [
            run_once(stand_in, target, FOURTH, sequence_length, parameters, full or not runs[0].replayed, runs[0].low)
        ]
        notes.append("samples of a microbatch are compared in pairs: splitting the batch changes what the loss means")
        return _assemble(target, model, runs, parameters, tied, notes, sequence_length, precision)


def _needs_memory(error: BaseException | None) -> bool:
    """Whether code outside torch's operators looked into a tensor's memory, which fake ones do not have."""
    return isinstance(error, NEEDS_DATA) or (isinstance(error, RuntimeError) and "data pointer" in str(error))


def _runs(
    stand_in: RealModel,
    target: Target,
    sequence_length: int,
    parameters: Mapping[str, Parameter],
    full: bool,
    notes: list[str],
) -> list[Run]:
    """One run a microbatch size; without replay if replay turns out to be inexact."""

    def runs(full: bool) -> list[Run]:
        def once(batch: int, low: frozenset[str]) -> Run:
            return run_once(stand_in, target, batch, sequence_length, parameters, full, low)

        first, low = _with_all_layers(lambda low: once(BATCHES[0], low), parameters)
        others = [once(b, low) for b in BATCHES[1 : stand_in.limits.batches]]
        if _outline(first) != _outline(others[0]) == _outline(others[-1]):  # its first forward changed the model
            first = once(BATCHES[0], low)
        return [first, *others]

    try:
        found = runs(full)
    except ReplayInexact as error:
        notes.append(f"every repeated layer was traced: {error}")
        found = runs(True)
    if found[0].chance:
        notes.append("layer-drop and stochastic depth drop nothing while tracing")
    return found


def _with_all_layers(
    once: Callable[[frozenset[str]], Run], parameters: Mapping[str, Parameter]
) -> tuple[Run, frozenset[str]]:
    """A run whose draws drop no layer, and the places whose draws must be small for that (`Chance`).

    Large draws keep the layers of most models. Where parameters stay unused, each place that draws is tried with
    small ones, and stays so if that uses more.
    """
    low: frozenset[str] = frozenset()
    run = once(low)
    left, tried = len(_unused(run, parameters)), set()
    while left and (places := [place for place in run.chance if place not in tried]):
        place = places[0]
        tried.add(place)
        other = once(low | {place})
        if len(_unused(other, parameters)) < left:
            run, low = other, low | {place}
            left = len(_unused(run, parameters))
    return run, low


def _outline(run: Run) -> list[tuple[str, int, int]]:
    """Which modules were units, and how many operators each ran."""
    return [(span.call.fqn, span.call.number, len(span.ops)) for span in run.spans]


def _unused(run: Run, parameters: Mapping[str, Parameter]) -> tuple[str, ...]:
    """Trainable parameters that no operator reads."""
    used = set()
    for span, index in zip(run.spans, run.folded.class_of, strict=True):
        used.update(absolute(p.fqn, span.call.fqn) for p in run.folded.classes[index].parameters)
    return tuple(f for f, p in parameters.items() if p.requires_grad and not p.is_buffer and f not in used)


def _assemble(
    target: Target,
    model: nn.Module,
    runs: Sequence[Run],
    parameters: Mapping[str, Parameter],
    tied: tuple[tuple[str, ...], ...],
    notes: list[str],
    sequence_length: int,
    precision: str,
) -> ModelGraph:
    first, batches = runs[0], (*BATCHES, FOURTH)[: len(runs)]
    _check_calls(runs)
    align([run.folded for run in runs])
    units = _units(first)
    if any(_units(run) != units for run in runs[1:]):
        raise _other_modules(target)
    owners = [next(u.fqn for u in units if u.class_index == i) for i in range(len(first.folded.classes))]
    inexact: set[tuple[int, str]] | None = set() if first.data_decides else None
    loops: set[int] = set()
    classes = merge(batches, [run.folded for run in runs], owners, inexact, loops)
    unused = _unused(first, parameters)
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
        inputs=_model_inputs(batches, runs),
        parameters=parameters,
        tied=tied,
        unused=unused,
        batch_norm=tuple(n for n, m in model.named_modules() if isinstance(m, _BatchNorm)),
        loss=first.loss,
        traced_batches=batches,
        notes=(*target.notes, *notes),
    )
    shared = zip(units, shared_saved(graph), strict=True)
    units = tuple(replace(unit, shared_saved=kept) for unit, kept in shared)
    rec = first.recording
    return replace(
        graph,
        units=units,
        opaque=opaque_parts(graph, rec, inexact or (), loops),
        notes=(*graph.notes, *read_notes(graph, rec)),
    )


def _model_inputs(batches: Sequence[int], runs: Sequence[Run]) -> tuple[ModelInput, ...]:
    found = []
    for name in runs[0].inputs:
        tensors = [run.recording.tensors[run.inputs[name]] for run in runs]
        try:
            shape = tuple(fit(batches, sizes) for sizes in zip(*(t.shape for t in tensors), strict=True))
        except (NotAffine, ValueError):
            raise ModelError(
                f"The input {name} is no linear function of the batch size.",
                "Let example_inputs(batch, seq) make dimensions of batch, seq or constant size.",
            ) from None
        found.append(ModelInput(name, shape, tensors[0].dtype))
    return tuple(found)
