"""Which weights of a unit class may be split: those of linear, embedding and convolution modules, and raw ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .graph import ModelGraph, Op, UnitClass
from .sharding_products import BATCHED, PRODUCTS, operands
from .sharding_states import Layer, Weight, absolute

_OWN = {"linear": {"weight", "bias"}, "convolution": {"weight", "bias"}, "embedding": {"weight"}}
_REGION_RANK = 3  # raw weights of so many dimensions hold one matrix an expert


def layers_of(
    graph: ModelGraph, cls: UnitClass, prefix: str, views: Mapping[int, Weight], aliases: Mapping[str, str]
) -> Iterator[Layer]:
    """Every weight that a product, a convolution or a table look-up of the class reads.

    Parameters
    ----------
    graph : ModelGraph
    cls : UnitClass
    prefix : str
        Absolute FQN of the first unit of the class.
    views : mapping of tensor id to Weight
    aliases : mapping of parameter name to the first name of the tensor
    """
    found: dict[str, Layer] = {}
    for op in cls.ops:
        base = op.name.split(".")[-2] if "." in op.name else op.name
        weight = _weight(op, base, views)
        if weight is None or op.fqn.startswith("/"):
            continue
        kind = {"embedding": "embedding", "convolution": "convolution"}.get(base, "linear")
        own = _owns(graph, absolute(prefix, op.fqn), weight.name, kind, aliases)
        plain = kind != "linear" or base in ("mm", "addmm")
        if own and plain:
            layer = _module_layer(cls, op, kind, weight, views)
        elif kind == "linear":
            layer = _raw_layer(cls, op, base, weight, views)
        else:
            continue
        if layer is not None:
            known = found.setdefault(layer.fqn, layer)
            found[layer.fqn] = replace(known, flops=known.flops + op.forward_flops.at(1))
    yield from found.values()


def _weight(op: Op, base: str, views: Mapping[int, Weight]) -> Weight | None:
    """The parameter on the right of a product (or on its left, if it is raw)."""
    if base == "embedding":
        return views.get(op.inputs[0])
    if base == "convolution":
        return views.get(op.inputs[1])
    if base not in PRODUCTS:
        return None
    _, left, right = operands(op, base)
    return views.get(right, views.get(left))


def _owns(graph: ModelGraph, module: str, weight: str, kind: str, aliases: Mapping[str, str]) -> bool:
    """Whether `weight` is the module's .weight (or tied to it), and nothing but a bias stands beside it."""
    own = f"{module}.weight".lstrip(".")
    if aliases.get(own, own) != aliases.get(weight, weight):
        return False
    beside = {
        name.rpartition(".")[2]
        for name, p in graph.parameters.items()
        if name.rpartition(".")[0] == module and not p.is_buffer
    }
    return beside <= _OWN[kind]


def _module_layer(cls: UnitClass, op: Op, kind: str, weight: Weight, views: Mapping[int, Weight]) -> Layer | None:
    shape = _stored(cls, weight, views)
    out = shape[0]
    if kind == "linear":
        # Hugging Face's Conv1D keeps its weight as (in, out) and multiplies without transposing it.
        stored_as_used = weight.dims == (0, 1)
        if stored_as_used != (op.module_type == "Conv1D"):
            return None
        out = shape[1] if stored_as_used else shape[0]
    if kind == "convolution" and op.args[6]:
        out = shape[1]
    return Layer(op.fqn, weight.name, kind, out, math.prod(shape), op.fqn, out_per_sample=_output(cls, op))


def _raw_layer(cls: UnitClass, op: Op, base: str, weight: Weight, views: Mapping[int, Weight]) -> Layer | None:
    """A parameter that the code of `op.fqn` multiplies by itself."""
    shape = _stored(cls, weight, views)
    if len(shape) < 2:
        return None
    short = next(t.fqn for t in cls.tensors if t.kind == "parameter" and views[t.id].name == weight.name)
    if short.startswith("/") or not f"{short}.".startswith(f"{op.fqn}.".lstrip(".")):
        return None
    expert = len(shape) >= _REGION_RANK and (base in BATCHED or weight.indexed or 0 not in weight.dims)
    expert = expert and (base != "bmm" or weight.dims[0] == 0)
    right = operands(op, base)[2]
    free = weight.dims[-1] if right in views else weight.dims[-2]
    out = shape[free] if free is not None else 1
    inner = short[len(op.fqn) :].strip(".")
    return Layer(f"{op.fqn}:{inner}", weight.name, "raw", out, math.prod(shape), op.fqn, expert, _output(cls, op))


def _stored(cls: UnitClass, weight: Weight, views: Mapping[int, Weight]) -> tuple[int, ...]:
    tensor = next(t for t in cls.tensors if t.kind == "parameter" and views[t.id].name == weight.name)
    return tuple(round(d.at(1)) for d in tensor.shape)


def _output(cls: UnitClass, op: Op) -> float:
    """Elements of the output for one sample."""
    return math.prod(d.at(1) for d in cls.tensors[op.outputs[0]].shape)
