"""Where the pipeline may be cut, what such a cut sends, and which units every stage runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .recording import RawOp, Recording

if TYPE_CHECKING:
    from .chain import Span

_CHANCE = ("dropout", "bernoulli", "rand", "multinomial", "normal_", "uniform_", "exponential_")


def mark_replicated(rec: Recording, spans: list[Span]) -> set[int]:
    """Mark units computed from the model's inputs and constants alone, and return the tensors every stage has.

    Every stage runs such units, and all glue: so what glue computes from the inputs alone needs no wire. Glue before
    a unit does not decide: a unit that hands a constant on must answer with it in every stage.
    """
    everywhere = {t.id for t in rec.tensors if t.kind == "input"}
    everywhere |= {t.id for t in rec.tensors if t.kind == "constant" and t.id not in rec.produced}
    for span in spans:
        local = set(everywhere)
        plain = span.template < 0
        for op in span.ops:
            kinds = [rec.tensors[t].kind for t in op.inputs]
            cheap = all(t in local or k == "buffer" for t, k in zip(op.inputs, kinds, strict=True))
            cheap = cheap and not any(rec.tensors[t].requires_grad for t in op.outputs)
            if cheap:
                local.update(op.outputs)
                if op.index in span.glue:
                    everywhere.update(op.outputs)
            elif op.index not in span.glue:
                plain = False
        known = [t for t in span.outputs if t in local]
        if plain and known and span.position < len(spans) - 1:
            span.replicated = True
            everywhere.update(known)
    return everywhere


def mark_cuts(rec: Recording, spans: list[Span], everywhere: set[int]) -> None:
    """A cut is legal where every live tensor is returned by a module, or every stage can make it of such.

    Every stage runs the glue of all units. So a live result of glue crosses a cut as the tensors that it was made
    of, unless parameters or chance were among them (only the unit's own stage has its parameters).
    """
    place: dict[int, tuple[int, int]] = {}
    last_use: dict[int, int] = {}
    for span in spans:
        for index, t in enumerate(span.outputs):
            place[t] = (span.position, index)
        for t in span.inputs:
            last_use[t] = span.position
    returned = {t for span in spans for call in span.calls for t in _own_outputs(rec, span, call)}
    returned |= {t for span in spans for call in span.done for t in rec.calls[call].outputs}
    made_of = _made_of(rec, spans, everywhere, returned)
    for t in _looked_at(rec, spans):
        for source in made_of.get(t, ()):
            last_use[source] = len(spans)
    live: set[int] = set()
    for span in spans[:-1]:
        live |= {t for t in span.outputs if t not in everywhere}
        live = {t for t in live if last_use[t] > span.position}
        if not span.replicated and all(t in made_of and made_of[t] <= place.keys() for t in live):
            span.wire = tuple(sorted({place[source] for t in live for source in made_of[t]}))
            span.cut_after = bool(span.wire)


def _made_of(rec: Recording, spans: Sequence[Span], everywhere: set[int], returned: set[int]) -> dict[int, set[int]]:
    """Tensors that can cross a cut -> what is sent: themselves if a module returns them, else what glue reads.

    What is written in place is not made again: the tensor sent would have been written already.
    """
    written = {rec.tensors[t].storage for op in rec.ops if _writes(op) for t in op.outputs}
    found = {t: {t} for t in returned}
    for span in spans:
        for op in span.ops:
            if op.index not in span.glue or _writes(op) or any(word in op.name for word in _CHANCE):
                continue
            if all(t in found or t in everywhere for t in op.inputs):
                sources = {s for t in op.inputs if t not in everywhere for s in found[t]}
                if not written & {rec.tensors[s].storage for s in sources}:
                    found.update((t, sources) for t in op.outputs if t not in found)
    return found


def _looked_at(rec: Recording, spans: Sequence[Span]) -> set[int]:
    """What glue reads to make numbers for Python alone (is there a mask?): every later stage asks the same."""
    used = {t for op in rec.ops if not op.dead for t in op.inputs}
    used |= {t for call in rec.calls for t in (*call.inputs, *call.outputs)}  # a replayed layer has no operators
    glue = [op for span in spans[:-1] for op in span.ops if op.index in span.glue]
    found: set[int] = set()
    for op in reversed(glue):
        if not any(t in used and t not in found for t in op.outputs):
            found.update(op.inputs)
    return found


def _writes(op: RawOp) -> bool:
    """Whether the operator changes an argument (by its name: add_, and not add)."""
    return op.name.rpartition(".")[0].endswith("_")


def _own_outputs(rec: Recording, span: Span, call: int) -> Iterable[int]:
    """Outputs of the unit's own call, and of calls without operators that joined it."""
    raw = rec.calls[call]
    return raw.outputs if raw is span.call or raw.start == raw.end else ()
