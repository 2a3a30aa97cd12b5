"""From one recording to a chain of units: which module calls are units, what crosses between them, where to cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .cuts import mark_cuts, mark_replicated
from .recording import RawCall, RawOp, Recording


@dataclass(slots=True)
class Span:
    """One unit of one recording: its module call, its operators, and the tensors that cross its border.

    `done` are calls of modules that are looked into, and are called once, that ended before the unit's call began
    and after the one before did: what they return is made by the unit's glue.
    """

    position: int
    call: RawCall
    calls: list[int]
    ops: list[RawOp] = field(default_factory=list)
    glue: set[int] = field(default_factory=set)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    template: int = -1
    renamed: dict[int, int] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    replicated: bool = False
    cut_after: bool = False
    wire: tuple[tuple[int, int], ...] = ()


class ReplayInexact(Exception):
    """A replayed layer is not like the one that stands for it; the caller traces all layers."""


def children_of(rec: Recording) -> dict[int, list[int]]:
    """Calls made directly by each call, -1 for the model's caller."""
    children: dict[int, list[int]] = {}
    for call in rec.calls:
        children.setdefault(call.parent, []).append(call.index)
    return children


def unit_calls(rec: Recording, opened: set[str]) -> list[int]:
    """Indices of the calls that are units, in order of execution."""
    children = children_of(rec)

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


def build_chain(rec: Recording, opened: set[str], looped: frozenset[str] = frozenset()) -> list[Span]:
    """Cut a recording into units; those `looped`, called once a time step, are one unit with all between them.

    Operators run directly by a module that is looked into (glue) belong to the unit that follows them, those
    after the last unit to the last. A call without operators joins the next unit.
    """
    units = unit_calls(rec, opened)
    joined = [u for u in units if rec.calls[u].fqn in looped]
    units = [u for u in units if not joined or not joined[0] < u <= joined[-1]]
    owner = _inside(rec, units)
    spans: list[Span] = []
    start, waiting = 0, []
    for index in units:
        call = rec.calls[index]
        nested = [c for c, o in enumerate(owner) if o == index] if call.replay_of < 0 else [index]
        end = call.end
        if joined and index == joined[0]:  # to where the next unit begins: the last step's result is put together
            later = [u for u in units if u > index]
            end = rec.calls[later[0]].start if later else len(rec.ops)
            inside = range(index, later[0] if later else len(rec.calls))
            nested = [c for c in inside if rec.calls[c].fqn not in opened]
        ops = [op for op in rec.ops[start:end] if not op.dead]
        start = end
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
    _find_done(rec, spans, opened)
    _connect(rec, spans)
    mark_cuts(rec, spans, mark_replicated(rec, spans))
    return spans


def _find_done(rec: Recording, spans: Sequence[Span], opened: Collection[str]) -> None:
    calls: dict[str, list[RawCall]] = {}
    for call in rec.calls:
        if call.fqn in opened:
            calls.setdefault(call.fqn, []).append(call)
    once = [of[0] for fqn, of in calls.items() if fqn and len(of) == 1]
    for call in once:
        after = (
            s for s in spans if s.call.index > call.index and s.call.start >= call.end and not _within(rec, s, call)
        )
        span = next(after, None)
        if span is not None:
            span.done.append(call.index)


def _within(rec: Recording, span: Span, call: RawCall) -> bool:
    """Whether the unit runs inside `call`."""
    parent = span.call.parent
    while parent >= 0 and parent != call.index:
        parent = rec.calls[parent].parent
    return parent >= 0


def _connect(rec: Recording, spans: list[Span]) -> None:
    """Fill the tensors that enter and leave each unit."""
    by_call = {span.call.index: span for span in spans}
    for span in spans:
        if span.call.replay_of >= 0:
            template = by_call.get(span.call.replay_of)
            if template is None:
                raise ReplayInexact(f"{span.call.fqn} repeats a call that is no unit")
            span.template = template.position
            span.renamed = _renamed(rec, template, span)
            span.inputs = [span.renamed.get(t, t) for t in template.inputs]
            continue
        made: set[int] = set()
        entering: dict[int, None] = {}
        for op in span.ops:
            own = set(op.outputs) - set(op.inputs)
            for t in (*op.inputs, *op.saved):
                if t not in made and t not in own and rec.tensors[t].kind not in ("parameter", "buffer"):
                    entering[t] = None
            made |= own
        span.inputs = [t for t in entering if t in rec.produced or rec.tensors[t].kind == "input"]
    consumed = {t for span in spans for t in span.inputs}
    for span in spans:
        results = [t for op in span.ops for t in op.outputs]
        if span.template < 0:
            span.outputs = [t for t in dict.fromkeys(results) if t in consumed and t not in span.inputs]
    for span in spans:
        if span.template >= 0:
            _replayed_outputs(spans[span.template], span, consumed)


def _renamed(rec: Recording, template: Span, span: Span) -> dict[int, int]:
    """Tensor of the template -> what takes its place in the replayed unit: arguments, results, and all of glue."""
    glue = [op for op in template.ops if op.index in template.glue]
    if [op.name for op in glue] != [op.name for op in span.ops]:
        raise ReplayInexact(f"{span.call.fqn}: its parent runs other operators before it than before the others")
    found: dict[int, int] = {}
    for one, other in zip(glue, span.ops, strict=True):
        found.update(zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True))
    found.update(zip(template.call.inputs, span.call.inputs, strict=True))
    found.update(zip(template.call.outputs, span.call.outputs, strict=True))
    return found


def _replayed_outputs(template: Span, span: Span, consumed: set[int]) -> None:
    if any(t not in span.renamed for t in template.outputs):
        raise ReplayInexact(f"{template.call.fqn}: a tensor that the module does not return is used outside it")
    span.outputs = [span.renamed[t] for t in template.outputs]
    own = set(span.call.outputs) | {t for op in span.ops for t in op.outputs}
    if {t for t in own - set(span.inputs) if t in consumed} != set(span.outputs):
        raise ReplayInexact(f"{span.call.fqn}: other outputs are used than those of {template.call.fqn}")


def output_leaf(rec: Recording, span: Span, tensor: int) -> tuple[str, int, int]:
    """(module FQN, call, leaf index) that returns `tensor` from this unit, or ("", 0, -1) if none does."""
    for raw in (span.call, *(rec.calls[c] for c in (*span.calls, *span.done))):
        if tensor in raw.outputs:
            return (raw.fqn, raw.number, raw.outputs.index(tensor))
    return ("", 0, -1)


def sources(spans: Sequence[Span], model_inputs: Mapping[int, int]) -> list[tuple[tuple[int, int], ...]]:
    """For each unit and input: (unit position, output index), or (-1, model input leaf)."""
    place = {t: (s.position, i) for s in spans for i, t in enumerate(s.outputs)}
    place.update({t: (-1, k) for t, k in model_inputs.items()})
    return [tuple(place[t] for t in span.inputs) for span in spans]
