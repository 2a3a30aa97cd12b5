"""From one recording to a chain of units: which module calls are units, what crosses between them, where to cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .recording import RawCall, RawOp, Recording


@dataclass(slots=True)
class Span:
    """One unit of one recording: its module call, its operators, and the tensors that cross its border."""

    position: int
    call: RawCall
    calls: list[int]
    ops: list[RawOp] = field(default_factory=list)
    glue: set[int] = field(default_factory=set)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    template: int = -1
    replicated: bool = False
    cut_after: bool = False
    wire: tuple[tuple[int, int], ...] = ()


class ReplayInexact(Exception):
    """A replayed layer is not like the one that stands for it; the caller traces all layers."""


def expandable(model: nn.Module, repeated: Mapping[str, Sequence[Sequence[nn.Module]]]) -> set[str]:
    """FQNs of modules that are looked into: lists, and whatever holds a list of repeated blocks."""
    members = {id(m) for groups in repeated.values() for group in groups for m in group}
    opened = {""}
    for fqn in repeated:
        parts = fqn.split(".")
        opened.update(".".join(parts[: i + 1]) for i in range(len(parts)))

    def walk(module: nn.Module, fqn: str) -> None:
        for name, child in module.named_children():
            path = f"{fqn}.{name}" if fqn else name
            if id(child) in members:
                continue
            if isinstance(child, (nn.Sequential, nn.ModuleList)):
                opened.add(path)
            if path in opened:
                walk(child, path)

    walk(model, "")
    return opened


def _unit_calls(rec: Recording, opened: set[str]) -> list[int]:
    """Indices of the calls that are units, in order of execution."""
    children: dict[int, list[int]] = {}
    for call in rec.calls:
        children.setdefault(call.parent, []).append(call.index)

    def collect(index: int) -> list[int]:
        if rec.calls[index].fqn not in opened:
            return [index]
        inner = [u for child in children.get(index, []) for u in collect(child)]
        return inner or [index]

    return [u for root in children.get(-1, []) for u in collect(root)]


def _inside(rec: Recording, units: Sequence[int]) -> list[int]:
    """For each call, the unit call that contains it (or is it), -1 outside units."""
    chosen = set(units)
    owner = []
    for call in rec.calls:
        owner.append(call.index if call.index in chosen else owner[call.parent] if call.parent >= 0 else -1)
    return owner


def build_chain(rec: Recording, opened: set[str]) -> list[Span]:
    """Cut a recording into units.

    Operators run directly by a module that is looked into (glue) belong to the unit that follows them, those
    after the last unit to the last. A call without operators joins the next unit.
    """
    units = _unit_calls(rec, opened)
    owner = _inside(rec, units)
    spans: list[Span] = []
    start, waiting = 0, []
    for index in units:
        call = rec.calls[index]
        nested = [c for c, o in enumerate(owner) if o == index] if call.replay_of < 0 else [index]
        ops = [op for op in rec.ops[start : call.end] if not op.dead]
        start = call.end
        waiting += nested
        if not ops and call.replay_of < 0:
            continue
        spans.append(Span(len(spans), call, waiting, ops))
        waiting = []
    if not spans:
        raise ReplayInexact("the model runs no operator")
    spans[-1].ops += [op for op in rec.ops[start:] if not op.dead]
    spans[-1].calls += waiting
    for span in spans:
        span.glue = {op.index for op in span.ops if op.call < 0 or owner[op.call] < 0}
    _connect(rec, spans)
    _mark_cuts(rec, spans, _mark_replicated(rec, spans))
    return spans


def _connect(rec: Recording, spans: list[Span]) -> None:
    """Fill the tensors that enter and leave each unit."""
    by_call = {span.call.index: span for span in spans}
    for span in spans:
        made: set[int] = set()
        entering: dict[int, None] = {}
        for op in span.ops:
            own = set(op.outputs) - set(op.inputs)
            for t in (*op.inputs, *op.saved):
                if t not in made and t not in own and rec.tensors[t].kind not in ("parameter", "buffer"):
                    entering[t] = None
            made |= own
        span.inputs = [t for t in entering if t in rec.produced or rec.tensors[t].kind == "input"]
        if span.call.replay_of >= 0:
            template = by_call.get(span.call.replay_of)
            if template is None or span.ops:
                raise ReplayInexact(f"{span.call.fqn}: operators run in its parent between repeated layers")
            span.template = template.position
            renamed = dict(zip(template.call.inputs, span.call.inputs, strict=True))
            span.inputs = [renamed.get(t, t) for t in template.inputs]
    consumed = {t for span in spans for t in span.inputs}
    for span in spans:
        results = [t for op in span.ops for t in op.outputs]
        if span.template < 0:
            span.outputs = [t for t in dict.fromkeys(results) if t in consumed and t not in span.inputs]
    for span in spans:
        if span.template >= 0:
            _replayed_outputs(spans[span.template], span, consumed)


def _replayed_outputs(template: Span, span: Span, consumed: set[int]) -> None:
    place = {t: i for i, t in enumerate(template.call.outputs)}
    if any(t not in place for t in template.outputs):
        raise ReplayInexact(f"{template.call.fqn}: a tensor that the module does not return is used outside it")
    span.outputs = [span.call.outputs[place[t]] for t in template.outputs]
    own = set(span.call.outputs) - set(span.call.inputs)
    if {t for t in own if t in consumed} != set(span.outputs):
        raise ReplayInexact(f"{span.call.fqn}: other outputs are used than those of {template.call.fqn}")


def _mark_replicated(rec: Recording, spans: list[Span]) -> set[int]:
    """Mark units computed from the model's inputs and constants alone, and return the tensors every stage has.

    Every stage runs such units, and all glue: so what glue computes from the inputs alone needs no wire.
    """
    everywhere = {t.id for t in rec.tensors if t.kind == "input"}
    everywhere |= {t.id for t in rec.tensors if t.kind == "constant" and t.id not in rec.produced}
    for span in spans:
        if span.template >= 0:
            continue
        local = set(everywhere)
        plain = True
        for op in span.ops:
            kinds = [rec.tensors[t].kind for t in op.inputs]
            cheap = all(t in local or k == "buffer" for t, k in zip(op.inputs, kinds, strict=True))
            cheap = cheap and not any(rec.tensors[t].requires_grad for t in op.outputs)
            if cheap:
                local.update(op.outputs)
                if op.index in span.glue:
                    everywhere.update(op.outputs)
            else:
                plain = False
        if plain and span.position < len(spans) - 1:
            span.replicated = True
            everywhere.update(span.outputs)
    return everywhere


def _mark_cuts(rec: Recording, spans: list[Span], everywhere: set[int]) -> None:
    """A cut is legal where every live tensor is an output of a unit's own module call."""
    place: dict[int, tuple[int, int]] = {}
    last_use: dict[int, int] = {}
    for span in spans:
        for index, t in enumerate(span.outputs):
            place[t] = (span.position, index)
        for t in span.inputs:
            last_use[t] = span.position
    returned = {t for span in spans for call in span.calls for t in _own_outputs(rec, span, call)}
    live: set[int] = set()
    for span in spans[:-1]:
        live |= {t for t in span.outputs if t not in everywhere}
        live = {t for t in live if last_use[t] > span.position}
        span.cut_after = bool(live) and not span.replicated and live <= returned
        span.wire = tuple(sorted(place[t] for t in live)) if span.cut_after else ()


def _own_outputs(rec: Recording, span: Span, call: int) -> Iterable[int]:
    """Outputs of the unit's own call, and of calls without operators that joined it."""
    raw = rec.calls[call]
    return raw.outputs if raw is span.call or raw.start == raw.end else ()


def output_leaf(rec: Recording, span: Span, tensor: int) -> tuple[str, int, int]:
    """(module FQN, call, leaf index) that returns `tensor` from this unit, or ("", 0, -1) if none does."""
    for raw in (span.call, *(rec.calls[c] for c in span.calls)):
        if tensor in raw.outputs:
            return (raw.fqn, raw.number, raw.outputs.index(tensor))
    return ("", 0, -1)


def sources(spans: Sequence[Span], model_inputs: Mapping[int, int]) -> list[tuple[tuple[int, int], ...]]:
    """For each unit and input: (unit position, output index), or (-1, model input leaf)."""
    place = {t: (s.position, i) for s in spans for i, t in enumerate(s.outputs)}
    place.update({t: (-1, k) for t, k in model_inputs.items()})
    return [tuple(place[t] for t in span.inputs) for span in spans]
