"""Rules of operators that carry a split from their inputs to their outputs, and of sums that are not finished yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..units import DTYPE_BYTES
from .graph import Affine, Op, Ref
from .sharding_shapes import dim_argument
from .sharding_states import Collective, Conflict, Partial, Split, State, Weight, Whole, tensor_bytes
from .sharding_walk import Walk

_EXCHANGED_BYTES = 4  # the loss exchanges one float32 a token


def pointwise(walk: Walk, op: Op, sources: frozenset[str], splits: Sequence[tuple[int, Split]]) -> State:
    """Element-wise, with broadcasting; whole operands are cut as the split ones are."""
    rank = max(len(walk.sizes[t]) for t in op.inputs)
    places = {(s.dim + rank - len(walk.sizes[t]), s.outer) for t, s in splits}
    if len(places) != 1 or any(s.segments or s.loss for _, s in splits):
        raise Conflict(sources, "element-wise on tensors that are split differently")
    place, outer = places.pop()
    for tensor in op.inputs:
        own = place - (rank - len(walk.sizes[tensor]))
        if not isinstance(walk.state(tensor), Split) and own >= 0 and walk.sizes[tensor][own] != 1:
            if outer > 1:
                raise Conflict(sources, "it meets a whole tensor on merged dimensions")
            meet_whole(walk, op, tensor, own, sources)
    return Split(place, sources, outer=outer)


def meet_whole(walk: Walk, op: Op, tensor: int, dim: int, sources: frozenset[str]) -> None:
    """A split meets dimension `dim` of a whole tensor: parameters follow it, activations are cut.

    The gradient of an activation that is cut must be gathered. Where it is itself a sum over tp, one of the two
    groups of layers had better stay whole.
    """
    state, region = walk.state(tensor), walk.region(op)
    walk.cuts[op.index, tensor] = dim
    if isinstance(state, Partial):
        raise Conflict(sources | state.sources, "it meets a sum that is not finished")
    if isinstance(state, Weight) and _is_own_bias(walk, op, state):
        return
    if isinstance(state, Weight):
        along = state.dims[dim] if state.dims else None
        if along is not None and state.segment:
            if walk.sizes[tensor][dim] == state.segment and state.name not in walk.kept:
                walk.follow(state.name, along, walk.segments_of(state, along), sources)
                return
            along = None
        if along is not None and state.name not in walk.kept and (region is not None or not state.indexed):
            walk.follow(state.name, along, (), sources)
            return
    if region is not None:
        raise Conflict(sources | walk.of_region(region), "it meets a whole tensor in code that runs on local parts")
    if not isinstance(state, Whole) or not walk.cls.tensors[tensor].requires_grad:
        return
    if state.summed_from:
        raise Conflict(walk.smaller(sources, state.summed_from), "it meets a whole activation of its size")
    walk.collective(op, "backward", "all_gather", tensor)


def packed_bias(walk: Walk, op: Op, base: str, state: Split) -> bool:
    """Whether this adds a bias to a packed projection: it is packed alike."""
    others = [walk.state(t) for t in op.inputs if not isinstance(walk.state(t), Split)]
    if base != "add" or len(others) != 1 or not isinstance(others[0], Weight) or not others[0].dims:
        return False
    bias = others[0]
    if _is_own_bias(walk, op, bias):
        return True
    along = bias.dims[-1]
    if along is None or bias.name in walk.kept or len(bias.dims) > 1 or bias.segment not in (0, state.segments[0]):
        return False
    sizes = walk.segments_of(bias, along) if bias.segment else state.segments
    walk.follow(bias.name, along, sizes, state.sources)
    return True


def _is_own_bias(walk: Walk, op: Op, state: Weight) -> bool:
    """The bias that a linear module adds after its product follows its weight."""
    layer = walk.layers.get(op.fqn)
    own = layer is not None and layer.kind != "raw" and layer.fqn in walk.out.columns
    return own and layer is not None and state.name == f"{layer.weight.removesuffix('.weight')}.bias"


# sums that are not finished

_LINEAR = frozenset(
    """view _unsafe_view reshape _reshape_alias transpose permute t unsqueeze squeeze expand clone _to_copy alias
    contiguous detach neg sum mean slice select split split_with_sizes unbind index index_select""".split()  # noqa: SIM905
)


def partial(walk: Walk, op: Op, base: str) -> list[State]:
    """Linear operators keep a sum unfinished; at any other it would have to be finished inside its region."""
    given = [walk.state(t) for t in op.inputs]
    sums = [s for s in given if isinstance(s, Partial)]
    first, n = sums[0], len(op.outputs)
    sources = frozenset[str]().union(*(s.sources for s in sums))
    result: list[State] = [replace(first, sources=sources)] * n
    if any(isinstance(s, Split) for s in given):
        raise Conflict(sources, f"{base} on sums that are not finished")
    if base in _LINEAR and len(sums) == 1 and isinstance(given[0], Partial):
        return result
    if base in ("mul", "div") and len(sums) == 1 and (base == "mul" or isinstance(given[0], Partial)):
        return result
    if base == "masked_fill" and op.args[-1] in (0, 0.0):
        return result
    if base in ("add", "sub", "cat", "stack", "index_add", "index_put", "scatter_add", "copy"):
        for tensor, state in zip(op.inputs, given, strict=True):
            if isinstance(state, Weight):
                walk.out.regions[first.door].add(state.name)
            elif not isinstance(state, Partial) and not _adds_nothing(walk, tensor, state):
                raise Conflict(sources, f"{base} adds a whole tensor to a sum that is not finished")
        return result
    raise Conflict(sources, f"{base} needs a finished sum inside {first.door}")


def _adds_nothing(walk: Walk, tensor: int, state: State) -> bool:
    """Zeros, or an index."""
    return (isinstance(state, Whole) and state.zero) or walk.cls.tensors[tensor].dtype.startswith(("int", "bool"))


# operators with channels

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


def through_channels(op: Op, base: str, rank: int, state: Split) -> State:
    """Pooling and resampling work on the last dimensions, each channel by itself."""
    spatial = next((n for mark, n in _SPATIAL.items() if mark in base), 2)
    if state.dim >= rank - spatial or state.outer > 1:
        raise Conflict(state.sources, f"{base} mixes what is split")
    return state


def per_channel_norm(walk: Walk, op: Op, base: str, state: Split) -> State:
    """Batch norm, and group norm by whole groups, on a part of the channels."""
    weights = [s for s in map(walk.state, op.inputs) if isinstance(s, Weight)]
    if state.dim != 1 or state.outer > 1:
        raise Conflict(state.sources, "a norm needs all its features")
    if any(walk.sharded(s.name) for s in weights) or op.fqn.startswith("/"):
        raise Conflict(state.sources, "a norm with a weight that is not its own")
    if "group" in base:
        if "GroupNorm" not in op.module_type:
            raise Conflict(state.sources, "a group norm that is called as a function")
        groups = op.args[6]
        walk.limit(state.sources, groups, walk.label(op, groups, " groups"))
    elif "BatchNorm" not in op.module_type or "Sync" in op.module_type:
        raise Conflict(state.sources, f"{op.module_type} is no plain batch norm")
    walk.out.channels.add(op.fqn)
    return state


# attention


def attention(walk: Walk, op: Op) -> list[State]:
    """Heads are independent. Whole keys and values get partial gradients, summed with those of their input."""
    query, key = [a.tensor for a in op.args if isinstance(a, Ref)][:2]
    heads = len(walk.sizes[query]) - 3
    splits = walk.splits(op)
    if not splits:
        return [Whole()] * len(op.outputs)
    sources = frozenset[str]().union(*(s.sources for _, s in splits))
    wrong = [s.sources for _, s in splits if s.dim != heads or s.segments or not isinstance(walk.state(query), Split)]
    if wrong:  # a single key/value head ends up here: it stays whole, and each rank's queries share it
        raise Conflict(frozenset[str]().union(*wrong), f"{op.fqn} attends over a split that is not by heads")
    n_heads, n_kv = walk.sizes[query][heads], walk.sizes[key][heads]
    walk.limit(sources, n_heads, walk.label(op, n_heads, " heads"))
    if n_kv != n_heads and isinstance(walk.state(key), Split):
        walk.limit(sources, n_kv, walk.label(op, n_kv, " key/value heads"))
    walk.out.attention.add(op.fqn)
    walk.attended |= sources
    walk.mark(op, "heads")
    rest: list[State] = [
        Split(1, sources) if len(walk.sizes[t]) > 1 and walk.sizes[t][1] == n_heads else Whole() for t in op.outputs[1:]
    ]
    return [Split(heads, sources), *rest]


# the loss on split logits


def loss(walk: Walk, op: Op, base: str, state: Split) -> list[State]:
    """log_softmax and nll_loss on logits that are split over the classes."""
    if base == "nll_loss_forward":
        if not state.loss:
            raise Conflict(state.sources, "the loss needs all the classes")
        walk.out.loss |= state.sources
        walk.out.consumed |= state.sources
        rows = Affine()
        for tensor in op.inputs[1:2]:
            target = walk.cls.tensors[tensor]
            rows = tensor_bytes(target).scaled(_EXCHANGED_BYTES / DTYPE_BYTES[target.dtype])
        for _ in range(3):  # maximum, sum of exponentials, the target's logit
            walk.out.collectives.append(Collective("forward", "all_reduce", rows, op.fqn, op.repeat))
        return [Whole()] * len(op.outputs)
    along = dim_argument(op, 1, len(walk.sizes[op.inputs[0]]), -1)
    return [Split(state.dim, state.sources, loss=along == state.dim)]


def references(value: object) -> Iterator[int]:
    """Tensor ids inside an argument."""
    if isinstance(value, Ref):
        yield value.tensor
    elif isinstance(value, tuple):
        for item in value:
            yield from references(item)
