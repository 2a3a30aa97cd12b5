"""What a traced model must fulfil: ids in range, every tensor made before it is read, cuts that send what is needed."""

from __future__ import annotations

from collections.abc import Iterator

from .graph import ModelGraph, Op, Ref, Unit, UnitClass
from .graph_view import absolute

_KINDS = {"gemm", "attention", "conv", "embedding", "memory", "free"}


def problems(graph: ModelGraph) -> list[str]:
    """Every inconsistency of `graph`, in words; empty when it is sound."""
    found: list[str] = []
    for index, cls in enumerate(graph.classes):
        if cls.index != index:
            found.append(f"class {index} says it is class {cls.index}")
        found += [f"class {index} ({cls.module_type}): {text}" for text in _class_problems(cls)]
    for position, unit in enumerate(graph.units):
        if unit.position != position:
            found.append(f"unit {position} says it is at {unit.position}")
        found += [f"unit {position} ({unit.fqn}): {text}" for text in _unit_problems(graph, unit)]
    if {u.class_index for u in graph.units} != set(range(len(graph.classes))):
        found.append("a class has no unit, or a unit no class")
    return found


def _class_problems(cls: UnitClass) -> Iterator[str]:
    for i, tensor in enumerate(cls.tensors):
        if tensor.id != i or not 0 <= tensor.base < len(cls.tensors):
            yield f"tensor {i} has id {tensor.id} and base {tensor.base}"
    known = set(cls.inputs)
    known |= {t.id for t in cls.tensors if t.kind in ("parameter", "buffer", "constant")}
    for i, op in enumerate(cls.ops):
        if op.index != i:
            yield f"operator {i} has index {op.index}"
        yield from _op_problems(cls, op, known)
        known.update(op.outputs)
    for t in cls.outputs:
        if t not in known:
            yield f"output {t} is never made"
    names = {p.fqn for p in cls.parameters}
    for t in cls.tensors:
        if t.kind in ("parameter", "buffer") and t.fqn not in names:
            yield f"parameter {t.fqn} is not listed"
    for name in ("flops_forward", "flops_backward"):
        own = [op.forward_flops if name == "flops_forward" else op.backward_flops for op in cls.ops]
        if sum(flops.base for flops in own) != getattr(cls, name).base:
            yield f"{name} is not the sum of its kernels"


def _op_problems(cls: UnitClass, op: Op, known: set[int]) -> Iterator[str]:
    for t in op.inputs:
        if t not in known:
            yield f"{op.name} {op.index} reads tensor {t} before it is made"
    for t in (*op.outputs, *op.saved):
        if not 0 <= t < len(cls.tensors):
            yield f"{op.name} {op.index} names tensor {t}, which is not listed"
    if set(_refs(op.args)) != set(op.inputs):
        yield f"{op.name} {op.index}: arguments and inputs differ"
    for kernel in (op.forward, *op.backward):
        if kernel.kind not in _KINDS:
            yield f"{op.name} {op.index}: unknown kernel kind {kernel.kind}"


def _refs(value: object) -> Iterator[int]:
    if isinstance(value, Ref):
        yield value.tensor
    elif isinstance(value, tuple):
        for item in value:
            yield from _refs(item)


def _unit_problems(graph: ModelGraph, unit: Unit) -> Iterator[str]:
    cls = graph.classes[unit.class_index]
    if len(unit.sources) != len(cls.inputs):
        yield f"{len(unit.sources)} sources for {len(cls.inputs)} inputs"
    for t, (source, output) in zip(cls.inputs, unit.sources, strict=False):
        if source < 0:
            if not 0 <= output < len(graph.inputs):
                yield f"reads model input {output} of {len(graph.inputs)}"
            continue
        if source >= unit.position:
            yield f"reads from unit {source}, which runs later"
            continue
        other = graph.classes[graph.units[source].class_index]
        if output >= len(other.outputs):
            yield f"reads output {output} of unit {source}, which has {len(other.outputs)}"
        elif other.tensors[other.outputs[output]].shape != cls.tensors[t].shape:
            yield f"reads output {output} of unit {source} with another shape"
    for p in cls.parameters:
        if absolute(p.fqn, unit.fqn) not in graph.parameters:
            yield f"parameter {absolute(p.fqn, unit.fqn)} is no parameter of the model"
    for source, _ in unit.wire:
        if source > unit.position:
            yield f"its cut sends an output of unit {source}, which runs later"
    if unit.cut_after != bool(unit.wire):
        yield "a cut without tensors to send, or the other way round"
