"""Folds the units of one recording into classes: equal operators, shapes and relative names are one class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .chain import ReplayInexact, Span
from .graph import Affine, Op, Parameter, Ref, Tensor, UnitClass
from .liveness import backward_curve, forward_curve
from .recording import RawOp, Recording
from .signature import plain_arguments


@dataclass(slots=True)
class Folded:
    """The classes of one recording, the class of each unit, and live bytes over time for each class."""

    classes: list[UnitClass] = field(default_factory=list)
    class_of: list[int] = field(default_factory=list)
    forward_curves: list[list[int]] = field(default_factory=list)
    backward_curves: list[list[int]] = field(default_factory=list)


def relative(fqn: str, unit: str) -> str:
    """`fqn` as seen from the module `unit`: "" for itself, "/..." when it lies outside.

    >>> relative("layers.3.mlp.up", "layers.3"), relative("layers.3", "layers.3"), relative("norm", "layers.3")
    ('mlp.up', '', '/norm')
    """
    if fqn == unit:
        return ""
    if not unit:
        return fqn
    return fqn[len(unit) + 1 :] if fqn.startswith(unit + ".") else "/" + fqn


class _Local:
    """Local numbering of one unit's tensors, by first use."""

    def __init__(self, rec: Recording, span: Span) -> None:
        self.rec, self.span = rec, span
        self.ids: dict[int, int] = {}
        self.bases: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.entering = set(span.inputs)

    def id(self, raw: int) -> int:
        """The local id of a recorded tensor."""
        found = self.ids.get(raw)
        if found is not None:
            return found
        t = self.rec.tensors[raw]
        new = self.ids[raw] = len(self.tensors)
        base = self.bases.setdefault(t.storage, new)
        kind = "input" if raw in self.entering else t.kind
        self.tensors.append(
            Tensor(
                new,
                tuple(Affine(d) for d in t.shape),
                t.dtype,
                kind,
                base,
                t.requires_grad,
                relative(t.fqn, self.span.call.fqn) if t.fqn else "",
                t.contiguous,
                Affine(self.rec.storages[t.storage].nbytes),
            )
        )
        return new

    def localise(self, value: Any) -> Any:
        """Arguments with `Ref`s to recorded tensors made local."""
        if isinstance(value, Ref):
            return Ref(self.id(value.tensor))
        if isinstance(value, tuple):
            return tuple(self.localise(v) for v in value)
        return value


def _op(local: _Local, index: int, op: RawOp, numbers: dict[str, dict[int, int]]) -> Op:
    rec, span = local.rec, local.span
    call = rec.calls[op.call] if op.call >= 0 else None
    if op.index in span.glue:
        fqn = "/" + (call.fqn if call else "")
    else:
        fqn = relative(call.fqn, span.call.fqn) if call else "/"
    order = 0
    if call is not None:
        seen = numbers.setdefault(call.fqn, {})
        order = seen.setdefault(call.number, len(seen))
    return Op(
        index,
        op.name,
        fqn,
        order,
        call.module_type if call else "",
        local.localise(op.args),
        tuple(local.id(t) for t in op.inputs),
        tuple(local.id(t) for t in op.outputs),
        op.kernel,
        tuple(op.backward),
        tuple(local.id(t) for t in op.saved),
    )


def _saved_storages(rec: Recording, span: Span) -> dict[int, int]:
    """Storage -> recorded tensor that autograd keeps because of this unit, parameters and buffers excluded."""
    found: dict[int, int] = {}
    for op in span.ops:
        for t in op.saved:
            storage = rec.tensors[t].storage
            if rec.storages[storage].kind not in ("parameter", "buffer"):
                found.setdefault(storage, t)
    return found


def _unit_class(rec: Recording, span: Span, parameters: Mapping[str, Parameter]) -> UnitClass:
    """The class of one unit, at concrete sizes; workspace is left out."""
    local = _Local(rec, span)
    numbers: dict[str, dict[int, int]] = {}
    ops = tuple(_op(local, i, op, numbers) for i, op in enumerate(span.ops))
    saved = _saved_storages(rec, span)
    used: dict[str, Parameter] = {}
    for raw in local.ids:
        t = rec.tensors[raw]
        if t.kind in ("parameter", "buffer"):
            used[t.fqn] = replace(parameters[t.fqn], fqn=relative(t.fqn, span.call.fqn))
    return UnitClass(
        index=0,
        module_type=span.call.module_type,
        ops=ops,
        tensors=tuple(local.tensors),
        parameters=tuple(used.values()),
        inputs=tuple(local.id(t) for t in span.inputs),
        outputs=tuple(local.id(t) for t in span.outputs),
        saved_bytes=Affine(sum(rec.storages[s].nbytes for s in saved)),
        workspace_forward=Affine(),
        workspace_backward=Affine(),
        flops_forward=Affine(sum(op.forward.flops.base for op in ops)),
        flops_backward=Affine(sum(k.flops.base for op in ops for k in op.backward)),
        saved=tuple(local.id(t) for t in saved.values()),
    )


def _worse(a: list[int], b: list[int]) -> list[int]:
    return b if max(b) > max(a) else a


def _skeleton(cls: UnitClass) -> tuple[Any, ...]:
    """The class without its sizes: equal for layers that data only routes differently."""
    ops = tuple((o.name, o.fqn, o.call, o.inputs, o.outputs, o.saved, len(o.backward)) for o in cls.ops)
    tensors = tuple((t.dtype, t.kind, t.base, t.fqn, len(t.shape)) for t in cls.tensors)
    return (cls.module_type, ops, tensors, cls.parameters, cls.inputs, cls.outputs)


def fold(
    rec: Recording, spans: list[Span], parameters: Mapping[str, Parameter], by_structure: Collection[str] = ()
) -> Folded:
    """Number the distinct classes of the units in order of first appearance.

    `by_structure` are FQNs of units where data decides sizes: if they differ in sizes only they are one class, the
    first's.

    Raises
    ------
    ReplayInexact
        If the last of the layers that were traced differs from the layer that stands for the replayed ones.
    """
    folded = Folded()
    known: dict[Any, int] = {}
    for span in spans:
        if span.template >= 0:
            folded.class_of.append(folded.class_of[span.template])
            continue
        found = _unit_class(rec, span, parameters)
        saved = _saved_storages(rec, span)
        kept = set(saved) | {rec.tensors[t].storage for t in span.outputs}
        forward, backward = forward_curve(rec, span.ops, kept), backward_curve(rec, span.ops, set(saved))
        if span.call.fqn in by_structure:
            key = _skeleton(found)
        else:
            key = replace(found, ops=tuple(_without_rates(op) for op in found.ops))
        index = known.get(key)
        if index is None:
            index = known[key] = len(folded.classes)
            folded.classes.append(replace(found, index=index))
            folded.forward_curves.append(forward)
            folded.backward_curves.append(backward)
        else:
            folded.forward_curves[index] = _worse(folded.forward_curves[index], forward)
            folded.backward_curves[index] = _worse(folded.backward_curves[index], backward)
        folded.class_of.append(index)
    _check_templates(spans, folded, by_structure)
    return folded


def align(runs: Sequence[Folded]) -> None:
    """Give the runs the same classes: units are equal only if they are at every microbatch size.

    Layers that differ at two sizes (a dimension that is 2 in each) may look equal at one.
    """
    keys = list(zip(*(run.class_of for run in runs), strict=True))
    distinct = list(dict.fromkeys(keys))
    for which, run in enumerate(runs):
        old = [key[which] for key in distinct]
        run.classes = [replace(run.classes[i], index=new) for new, i in enumerate(old)]
        run.forward_curves = [run.forward_curves[i] for i in old]
        run.backward_curves = [run.backward_curves[i] for i in old]
        run.class_of = [distinct.index(key) for key in keys]


def _check_templates(spans: list[Span], folded: Folded, by_structure: Collection[str]) -> None:
    """The last of each run of equal layers must be like the layer that stands for the replayed ones.

    But for one thing: where gradients of several layers add up, the layer that is first in backward adds none.
    """
    by_call = {span.call.index: span for span in spans}
    stand_ins = {span.template for span in spans}
    for span in spans:
        template = by_call.get(span.call.like)
        if template is not None and template.position in stand_ins and span.template < 0:
            ours, theirs = (folded.classes[folded.class_of[s.position]] for s in (span, template))
            if not _alike(ours, theirs, span is spans[-1], span.call.fqn in by_structure):
                raise ReplayInexact(f"{span.call.fqn} differs from {template.call.fqn}")


def _alike(cls: UnitClass, template: UnitClass, is_last: bool, by_structure: bool) -> bool:
    """Whether the classes agree but for sums of gradients, and for what the last unit of the model runs after it."""
    a, b = _without_sums(cls), _without_sums(template)
    if by_structure:
        return _skeleton(a)[1][: len(b.ops)] == _skeleton(b)[1] if is_last else _skeleton(a) == _skeleton(b)
    return a.ops[: len(b.ops)] == b.ops if is_last else a == b


def _without_rates(op: Op) -> Op:
    """The operator without its scale factors and dropout rates, which change no figure."""
    return replace(op, args=plain_arguments(op.name, op.args))


def _without_sums(cls: UnitClass) -> UnitClass:
    ops = tuple(
        replace(op, backward=tuple(k for k in op.backward if not k.name.startswith("aten.add"))) for op in cls.ops
    )
    ops = tuple(_without_rates(op) for op in ops)
    return replace(cls, index=0, ops=ops)
