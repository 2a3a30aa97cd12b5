"""Views of a traced model: the networkx graph of its operators, its saved storages, tables and its hash."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..units import DTYPE_BYTES
from .graph import Affine, ModelGraph, Op, Tensor, UnitClass

if TYPE_CHECKING:
    import networkx as nx

Node = tuple[int, int]


def absolute(fqn: str, unit: str) -> str:
    """The FQN of a name that is relative to `unit`.

    >>> absolute("mlp.up.weight", "layers.3"), absolute("/wte.weight", "lm_head"), absolute("", "norm")
    ('layers.3.mlp.up.weight', 'wte.weight', 'norm')
    """
    if fqn.startswith("/"):
        return fqn[1:]
    return ".".join(part for part in (unit, fqn) if part)


def nbytes(tensor: Tensor) -> Affine:
    """Bytes of a tensor's elements; at most two dimensions may follow the microbatch size."""
    total = Affine(DTYPE_BYTES[tensor.dtype])
    for d in tensor.shape:
        total = total.times(d)
    return total


def shared_saved(graph: ModelGraph) -> list[tuple[tuple[int, Affine], ...]]:
    """For each unit, the bytes it keeps for backward that an earlier unit keeps too, by the nearest such unit."""
    keeper: dict[tuple[Any, ...], int] = {}
    found = []
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        shared: dict[int, Affine] = {}
        for tensor in cls.saved:
            owner = _owner(graph, unit.position, tensor)
            if owner in keeper:
                before = keeper[owner]
                kept = cls.tensors[cls.tensors[tensor].base]
                shared[before] = shared.get(before, Affine()) + kept.storage_bytes.scaled(kept.repeat)
            keeper[owner] = unit.position
        found.append(tuple(sorted(shared.items())))
    return found


def _owner(graph: ModelGraph, position: int, tensor: int) -> tuple[Any, ...]:
    """Where the storage of a unit's tensor was made: (unit, tensor), or ("input", leaf)."""
    while True:
        unit = graph.units[position]
        cls = graph.classes[unit.class_index]
        base = cls.tensors[tensor].base
        if cls.tensors[base].kind != "input":
            return (position, base)
        source, output = unit.sources[cls.inputs.index(base)]
        if source < 0:
            return ("input", output)
        position, tensor = source, graph.classes[graph.units[source].class_index].outputs[output]


def _producers(cls: UnitClass) -> dict[int, int]:
    """Tensor -> the operator that makes it."""
    found: dict[int, int] = {}
    for op in cls.ops:
        for t in op.outputs:
            if t not in op.inputs:
                found[t] = op.index
    return found


def _node(graph: ModelGraph, unit_fqn: str, cls: UnitClass, op: Op) -> dict[str, Any]:
    tensors = cls.tensors
    read = [tensors[t] for t in op.inputs]
    own = {tensors[t].base for t in op.saved if tensors[tensors[t].base].kind not in ("parameter", "buffer")}
    saved = Affine()
    for base in sorted(own):
        saved += tensors[base].storage_bytes.scaled(tensors[base].repeat)
    return {
        "fqn": absolute(op.fqn, unit_fqn),
        "op": op.name,
        "kind": op.forward.kind,
        "shapes": tuple(tensors[t].shape for t in op.outputs),
        "dtypes": tuple(tensors[t].dtype for t in op.outputs),
        "repeat": op.repeat,
        "flops_forward": op.forward_flops,
        "flops_backward": op.backward_flops,
        "bytes_forward": op.forward.bytes_moved.scaled(op.repeat),
        "bytes_backward": _total(k.bytes_moved for k in op.backward).scaled(op.repeat),
        "parameters": tuple(absolute(t.fqn, unit_fqn) for t in read if t.kind == "parameter"),
        "saved_bytes": saved,
    }


def _total(values: Any) -> Affine:
    total = Affine()
    for value in values:
        total += value
    return total


def to_networkx(graph: ModelGraph) -> nx.DiGraph:
    """Nodes (unit position, operator index) with figures, edges with the tensors that flow.

    Node attributes: fqn, op, kind, shapes, dtypes, repeat (launches), flops_forward, flops_backward, bytes_forward,
    bytes_backward, parameters, saved_bytes (what autograd keeps because of this operator; a storage kept by two
    operators shows at both). Edge attribute `tensors`: tuple of (shape, dtype, bytes).
    """
    import networkx as nx

    found = nx.DiGraph(name=graph.name)
    made = [_producers(cls) for cls in graph.classes]
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        for op in cls.ops:
            found.add_node((unit.position, op.index), **_node(graph, unit.fqn, cls, op))
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        entering = dict(zip(cls.inputs, unit.sources, strict=True))
        for op in cls.ops:
            for t in op.inputs:
                producer = _producer(graph, made, unit.position, t, made[cls.index], entering)
                if producer is not None and producer != (unit.position, op.index):
                    _add_edge(found, producer, (unit.position, op.index), cls.tensors[t])
    return found


def _producer(
    graph: ModelGraph,
    made: list[dict[int, int]],
    position: int,
    tensor: int,
    local: dict[int, int],
    entering: dict[int, tuple[int, int]],
) -> Node | None:
    if tensor in entering:
        source, output = entering[tensor]
        if source < 0:
            return None
        cls = graph.classes[graph.units[source].class_index]
        return (source, made[cls.index][cls.outputs[output]])
    return (position, local[tensor]) if tensor in local else None


def _add_edge(found: nx.DiGraph, source: Node, target: Node, tensor: Tensor) -> None:
    flowing = (tensor.shape, tensor.dtype, nbytes(tensor))
    before = found.edges[source, target]["tensors"] if found.has_edge(source, target) else ()
    found.add_edge(source, target, tensors=(*before, flowing))


def content_hash(graph: ModelGraph) -> str:
    """sha256 over the traced structure; notes and workspace are left out."""
    classes = [replace(c, workspace_forward=Affine(), workspace_backward=Affine()) for c in graph.classes]
    parts = (
        graph.precision,
        graph.sequence_length,
        classes,
        graph.units,
        graph.inputs,
        sorted(graph.parameters.items()),
        graph.tied,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def layer_table(graph: ModelGraph, batch: int) -> list[dict[str, Any]]:
    """One row a class, in order of execution; figures are those of one unit at microbatch size `batch`.

    Keys: class, module, first (FQN of the first unit), count, operators, parameters, flops_forward,
    flops_backward, saved_bytes, workspace_bytes, cuts (how many of its units may end a pipeline stage).
    """
    rows = []
    for cls in graph.classes:
        units = [u for u in graph.units if u.class_index == cls.index]
        rows.append(
            {
                "class": cls.index,
                "module": cls.module_type,
                "first": units[0].fqn,
                "count": len(units),
                "operators": sum(op.repeat for op in cls.ops),
                "parameters": sum(p.numel for p in cls.parameters if not p.is_buffer),
                "flops_forward": int(cls.flops_forward.at(batch)),
                "flops_backward": int(cls.flops_backward.at(batch)),
                "saved_bytes": int(cls.saved_bytes.at(batch)),
                "workspace_bytes": int(max(cls.workspace_forward.at(batch), cls.workspace_backward.at(batch))),
                "cuts": sum(u.cut_after for u in units),
            }
        )
    return rows
