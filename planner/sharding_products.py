"""Rules of products: matrix products, convolutions and embeddings, with weights that may be split.

out[.., n] = sum_k x[.., k] w[k, n]       col: w split along n, out split along n
                                          row: x and w split along k, out summed over tp
"""

from __future__ import annotations

from typing import NamedTuple

from .graph import Op, Ref
from .sharding_states import Conflict, Layer, Partial, Split, State, Weight, Whole
from .sharding_walk import Walk


class Operands(NamedTuple):
    """Tensor ids of a product, and which dimensions of each are summed over or free.

    `out` is where the weight's free dimension ends in the output.
    """

    x: int
    w: int
    bias: int | None
    x_sum: int
    w_sum: int
    w_free: int
    out: int


_PLACES = {
    "mm": (None, 0, 1),
    "addmm": (0, 1, 2),
    "bmm": (None, 0, 1),
    "baddbmm": (0, 1, 2),
    "_grouped_mm": (None, 0, 1),
}
PRODUCTS = frozenset(_PLACES)
BATCHED = frozenset(("bmm", "baddbmm", "_grouped_mm"))


def operands(op: Op, base: str) -> tuple[int | None, int, int]:
    """Tensor ids of (bias, left, right)."""
    refs = [a.tensor for a in op.args if isinstance(a, Ref)]
    bias, left, right = _PLACES[base]
    return (None if bias is None else refs[bias]), refs[left], refs[right]


def product(walk: Walk, op: Op, base: str) -> list[State]:
    """mm, addmm, bmm, baddbmm and grouped products."""
    bias, left, right = operands(op, base)
    states = walk.state(left), walk.state(right)
    if isinstance(states[1], Weight):
        if isinstance(states[0], Weight):
            walk.used_whole(states[0], "a product of two weights")
        ends = Operands(left, right, bias, _last(walk, left), _last(walk, right) - 1, _last(walk, right), -1)
        return [_weighted(walk, op, ends, states[1])]
    if isinstance(states[0], Weight):
        ends = Operands(right, left, bias, _last(walk, right) - 1, _last(walk, left), _last(walk, left) - 1, -2)
        return [_weighted(walk, op, ends, states[0])]
    return [_activations(walk, op, base, left, right, bias)]


def _last(walk: Walk, tensor: int) -> int:
    return len(walk.sizes[tensor]) - 1


def layer_of(walk: Walk, op: Op, weight: Weight) -> Layer | None:
    """The layer whose weight this product reads, if it is one that may be split."""
    layer = walk.layers.get(op.fqn)
    if layer is not None and layer.kind != "raw" and layer.weight == weight.name:
        return layer
    return walk.raw_layers.get(weight.name)


def _weighted(walk: Walk, op: Op, ends: Operands, weight: Weight) -> State:
    """A product with a weight: col, row or whole."""
    state, layer = walk.state(ends.x), layer_of(walk, op, weight)
    if isinstance(state, Partial):
        raise Conflict(state.sources, f"{op.fqn} reads a sum that is not finished")
    if layer is None:
        reason = "a product with a weight that is no plain layer's own"
        if isinstance(state, Split):
            raise Conflict(state.sources, reason)
        walk.used_whole(weight, reason)
        return Whole()
    decision = walk.decisions[layer.fqn]
    if isinstance(state, Split):
        if state.segments or state.loss or state.outer > 1 or state.dim != ends.x_sum:
            raise Conflict(state.sources, f"{layer.fqn} cannot sum over its split")
        if decision.style == "replicate":
            raise Conflict(state.sources, f"{layer.fqn} must stay whole")
        if state.sources & walk.normed and not state.sources & walk.attended:
            raise Conflict(state.sources & walk.normed, "a norm needs all its features")
        return _row(walk, op, ends, weight, layer, state.sources)
    if decision.style == "replicate":
        walk.used_whole(weight, "", own=True)
        return Whole()
    return _col(walk, op, ends, weight, layer)


def _row(walk: Walk, op: Op, ends: Operands, weight: Weight, layer: Layer, sources: frozenset[str]) -> State:
    walk.out.rows[layer.fqn] = walk.out.rows.get(layer.fqn, frozenset()) | sources
    walk.out.consumed |= sources
    walk.mark(op, "k")
    if layer.kind == "raw":
        dim = weight.dims[ends.w_sum]
        if dim is None or weight.segment:
            raise Conflict(sources | {layer.fqn}, f"no dimension of {layer.weight} divides what it sums over")
        walk.follow(weight.name, dim, (), sources | {layer.fqn})
        if layer.region:
            _add_once(walk, ends.bias, layer.owner)
            walk.out.regions.setdefault(layer.owner, set())
            return Partial(sources, layer.owner)
    walk.collective(op, "forward", "all_reduce", op.outputs[0])
    return Whole(sources)


def _add_once(walk: Walk, bias: int | None, door: str) -> None:
    """A bias added to a partial sum: each rank adds its share."""
    state = None if bias is None else walk.state(bias)
    if isinstance(state, Weight):
        walk.out.regions.setdefault(door, set()).add(state.name)


def _col(walk: Walk, op: Op, ends: Operands, weight: Weight, layer: Layer) -> State:
    key = frozenset({layer.fqn})
    decision = walk.decisions[layer.fqn]
    rank = len(walk.sizes[op.outputs[0]])
    segments = _follow_free(walk, op, ends, weight, decision.sizes, key) if layer.kind == "raw" else decision.sizes
    walk.mark(op, "n")
    walk.out.columns.add(layer.fqn)
    if layer.region:
        walk.out.regions.setdefault(layer.owner, set())
    else:
        door = layer.fqn.rpartition(".")[0] if layer.kind != "raw" else layer.owner
        walk.partial_gradient(ends.x, door, op.fqn)
    if decision.style == "gather":
        walk.out.consumed.add(layer.fqn)
        walk.limit(key, layer.out_features, walk.label(op, layer.out_features))
        walk.collective(op, "forward", "all_gather", op.outputs[0])
        return Whole()
    return Split(ends.out % rank, key, segments)


def _follow_free(
    walk: Walk, op: Op, ends: Operands, weight: Weight, sizes: tuple[int, ...], key: frozenset[str]
) -> tuple[int, ...]:
    """Split a raw weight (and its bias) along its free dimension; the segments of the output."""
    dim = weight.dims[ends.w_free]
    if dim is None:
        raise Conflict(key, "no dimension of it divides its output")
    out = walk.sizes[ends.w][ends.w_free]
    segments = sizes
    if weight.segment:  # a part of a fused projection: one or several of its segments
        sizes = walk.segments_of(weight, dim)
        segments = (weight.segment,) * (out // weight.segment) if out > weight.segment else ()
    walk.follow(weight.name, dim, sizes, key)
    bias = None if ends.bias is None else walk.state(ends.bias)
    if isinstance(bias, Weight):
        along = bias.dims[-1]
        if along is None or bias.segment != weight.segment:
            raise Conflict(key, "its bias cannot be divided")
        walk.follow(bias.name, along, sizes, key)
    elif isinstance(bias, Split | Partial):
        raise Conflict(key, "its bias is split differently")
    return segments


def _activations(walk: Walk, op: Op, base: str, left: int, right: int, bias: int | None) -> State:
    """A product of two activations: by batches (heads), or by the free dimension of one of them."""
    given = [walk.state(t) for t in (left, right)]
    parts = [s for s in given if isinstance(s, Split)]
    if any(isinstance(s, Partial) for s in given):
        return _partial_product(given)
    if not parts:
        return Whole()
    sources = frozenset[str]().union(*(s.sources for s in parts))
    if any(s.segments or s.loss for s in parts):
        raise Conflict(sources, f"{base} runs before its packed parts are set apart")
    if base in BATCHED and all(s.dim == 0 for s in parts):
        return _by_batches(walk, op, left, right, bias, parts, sources)
    if len(parts) == 1 and parts[0].outer == 1 and base != "_grouped_mm":
        split_left = isinstance(given[0], Split)
        free = _last(walk, left) - 1 if split_left else _last(walk, right)
        if parts[0].dim == free and not isinstance(bias if bias is None else walk.state(bias), Split | Weight):
            walk.mark(op, "batch")
            walk.partial_gradient(right if split_left else left, op.fqn, op.fqn)
            return Split(free, sources)
    raise Conflict(sources, "a product of split and whole tensors")


def _partial_product(given: list[State]) -> State:
    sums = [s for s in given if isinstance(s, Partial)]
    if len(sums) > 1 or any(isinstance(s, Split) for s in given):
        raise Conflict(sums[0].sources, "a product of sums that are not finished")
    return sums[0]


def _by_batches(
    walk: Walk, op: Op, left: int, right: int, bias: int | None, parts: list[Split], sources: frozenset[str]
) -> State:
    outer = parts[0].outer
    if any(s.outer != outer for s in parts):
        raise Conflict(sources, "a batched product of tensors that are split differently")
    for tensor in (left, right):
        if not isinstance(walk.state(tensor), Split):
            if not _equal_batches(walk, tensor, outer):
                raise Conflict(sources, "a batched product of split and whole tensors")
            walk.partial_gradient(tensor, op.fqn, op.fqn)
    walk.mark(op, "batch")
    walk.attended |= sources
    return Split(0, sources, outer=outer)


def _equal_batches(walk: Walk, tensor: int, outer: int) -> bool:
    """Whether a whole operand is one matrix expanded over the batches (keys shared by all heads), or a constant."""
    if not walk.cls.tensors[tensor].requires_grad:
        return True
    makers = {t: op for op in walk.cls.ops for t in op.outputs}
    heads = walk.sizes[tensor][0] // outer
    while tensor in makers:
        op = makers[tensor]
        base = op.name.split(".")[-2]
        if base == "expand":
            before, after = walk.sizes[op.inputs[0]], walk.sizes[tensor]
            changed = [a for b, a in zip(before[::-1], after[::-1], strict=False) if a != b]
            return heads in changed
        if base not in ("view", "_unsafe_view", "clone", "transpose", "permute"):
            return False
        tensor = op.inputs[0]
    return False


def embedding(walk: Walk, op: Op) -> list[State]:
    """A table look-up: by rows of the vocabulary, summed over tp."""
    weight = walk.state(op.inputs[0])
    layer = walk.layers.get(op.fqn)
    if any(isinstance(walk.state(t), Split | Partial) for t in op.inputs):
        blamed = frozenset[str]().union(*(s.sources for _, s in walk.splits(op)))
        raise Conflict(blamed, "it is looked up in a table")
    if not isinstance(weight, Weight) or layer is None or layer.kind != "embedding":
        if isinstance(weight, Weight):
            walk.used_whole(weight, "an embedding that is no plain layer reads its weight")
        return [Whole()]
    if walk.decisions[op.fqn].style != "vocab":
        return [Whole()]
    walk.limit(frozenset({op.fqn}), layer.out_features, walk.label(op, layer.out_features))
    walk.mark(op, "elements")
    walk.collective(op, "forward", "all_reduce", op.outputs[0])
    return [Whole()]


def convolution(walk: Walk, op: Op) -> list[State]:
    """Channels: out of an ungrouped convolution (col), into one (row), or through a grouped one."""
    x, weight = walk.state(op.inputs[0]), walk.state(op.inputs[1])
    groups = op.args[8] if isinstance(op.args[8], int) else 1
    layer = walk.layers.get(op.fqn)
    known = isinstance(weight, Weight) and layer is not None and layer.weight == weight.name
    if isinstance(x, Partial):
        raise Conflict(x.sources, "a convolution reads a sum that is not finished")
    if not known or layer is None or not isinstance(weight, Weight):
        if isinstance(x, Split) and isinstance(weight, Weight) and groups > 1 and x.dim == 1 and not x.segments:
            return [_raw_grouped(walk, op, x, groups)]
        if isinstance(x, Split):
            raise Conflict(x.sources, "a convolution with a weight that is no plain layer's own")
        if isinstance(weight, Weight):
            walk.used_whole(weight, "a convolution reads its weight directly")
        return [Whole()]
    if isinstance(x, Split) and (x.dim != 1 or x.segments or x.outer > 1 or x.loss):
        raise Conflict(x.sources, f"{op.fqn} needs a split of its channels")
    if groups > 1:
        return [_grouped(walk, op, x, groups)]
    decision = walk.decisions[op.fqn]
    transposed = bool(op.args[6])
    ends = Operands(op.inputs[0], op.inputs[1], None, 1, int(not transposed), int(transposed), 1)
    if isinstance(x, Split):
        if decision.style == "replicate":
            raise Conflict(x.sources, f"{op.fqn} must stay whole")
        return [_row(walk, op, ends, weight, layer, x.sources)]
    if decision.style == "replicate":
        walk.used_whole(weight, "", own=True)
        return [Whole()]
    return [_col(walk, op, ends, weight, layer)]


def _raw_grouped(walk: Walk, op: Op, x: Split, groups: int) -> State:
    """A grouped convolution that code runs with another module's weight and bias."""
    walk.limit(x.sources, groups, walk.label(op, groups, " groups"))
    for tensor in op.inputs[1:]:
        state = walk.state(tensor)
        if not isinstance(state, Weight) or state.dims[0] is None or x.outer > 1:
            raise Conflict(x.sources, "a convolution with a weight that cannot be divided")
        walk.follow(state.name, state.dims[0], (), x.sources)
    walk.mark(op, "batch")
    return Split(1, x.sources)


def _grouped(walk: Walk, op: Op, x: State, groups: int) -> State:
    if not isinstance(x, Split):
        return Whole()
    walk.limit(x.sources, groups, walk.label(op, groups, " groups"))
    walk.mark(op, "batch")
    walk.out.channels.add(op.fqn)
    return Split(1, x.sources)
