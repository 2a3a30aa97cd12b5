"""Where a split goes when an operator moves, merges, cuts or reduces dimensions.

Pure functions of shapes: each takes the operator, the sizes of all tensors (at one microbatch size) and the state
of its split input, and returns the state of the outputs or raises `Conflict`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from .graph import Op, Ref
from .sharding_states import Conflict, Split

Sizes = Sequence[tuple[int, ...]]

CUTS = frozenset(("split", "split_with_sizes", "unsafe_split", "slice", "select", "unbind"))
MOVES = frozenset(("transpose", "permute", "t", "unsqueeze", "squeeze", "expand"))
VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias"))


def dim_argument(op: Op, place: int, rank: int, default: int) -> int:
    """The dimension that argument number `place` (or the keyword dim) names."""
    named = next((a[1] for a in op.args if isinstance(a, tuple) and len(a) == 2 and a[0] == "dim"), None)
    value = op.args[place] if len(op.args) > place and isinstance(op.args[place], int) else named
    return (default if value is None else int(value)) % rank


def through_view(op: Op, sizes: Sizes, tensor: int, state: Split, out: int | None = None) -> Split:
    """A view (into tensor `out`); see `Split.outer` for dimensions that are merged in front of the split one."""
    before, after, dim = sizes[tensor], sizes[op.outputs[0] if out is None else out], state.dim
    if state.segments:
        return _through_packed_view(op, state, before, after)
    if state.outer > 1:
        before = (*before[:dim], state.outer, before[dim] // state.outer, *before[dim + 1 :])
        dim += 1
    # The split dimension starts after `lead` elements; it goes on where the new shape has counted as many.
    lead, target, counted = math.prod(before[:dim]), 0, 1
    while target < len(after) and lead % (counted * after[target]) == 0:
        counted *= after[target]
        target += 1
    outer = lead // counted
    if target == len(after) or after[target] % outer:
        raise Conflict(state.sources, "a view merges it into another dimension")
    return Split(target, state.sources, outer=outer)


def _through_packed_view(op: Op, state: Split, before: tuple[int, ...], after: tuple[int, ...]) -> Split:
    segments, dim = state.segments, state.dim
    own = any(source.partition(":")[0] == op.fqn for source in state.sources)
    if own and after[-1] == before[-1] and dim == len(before) - 1:
        return Split(len(after) - 1, state.sources, segments)  # the layer's own flattening
    rest = after[dim:]
    if after[:dim] != before[:dim] or len(rest) < 2 or dim != len(before) - 1:
        raise Conflict(state.sources, "a view mixes its packed parts")
    inner = math.prod(rest[1:])
    if all(size == inner for size in segments):
        return Split(dim + 1, state.sources)
    if any(size % inner for size in segments):
        raise Conflict(state.sources, "a view cuts through its packed parts")
    return Split(dim, state.sources, tuple(size // inner for size in segments))


def through_cut(
    op: Op, base: str, sizes: Sizes, tensor: int, state: Split, ops: Sequence[Op], out_features: int
) -> Split:
    """Split, slice, select or unbind: along another dimension, or between packed parts.

    Where it cuts across the split of one layer with `out_features`, the conflict offers the sizes of packed parts.
    """
    rank, size = len(sizes[tensor]), sizes[tensor][state.dim]
    place = 2 if base in ("split", "split_with_sizes", "unsafe_split") else 1
    dim = dim_argument(op, place, rank, 0)
    drop = base in ("select", "unbind")
    if dim != state.dim:
        if state.segments:
            raise Conflict(state.sources, f"{base} runs before its packed parts are set apart")
        return replace(state, dim=state.dim - (drop and dim < state.dim))
    if base == "slice" and sizes[op.outputs[0]][dim] == size:
        return state
    parts = _parts(op, base, sizes, tensor, dim, ops)
    if state.segments and parts == state.segments and not drop:
        return Split(dim, state.sources)
    offer = len(state.sources) == 1 and not state.segments and sum(parts) == size
    packed = tuple(part * (out_features // size) for part in parts) if offer else ()
    raise Conflict(state.sources, f"{base} cuts across its split", packed)


def _parts(op: Op, base: str, sizes: Sizes, tensor: int, dim: int, ops: Sequence[Op]) -> tuple[int, ...]:
    """Sizes of the pieces into which `op` (and the other slices of the same tensor) cut `dim`."""
    size = sizes[tensor][dim]
    if base in ("select", "unbind"):
        return (1,) * size
    if base != "slice":
        return tuple(sizes[t][dim] for t in op.outputs)
    borders = {0, size}
    same = (dim, dim - len(sizes[tensor]))
    for other in ops:
        if other.inputs[:1] == (tensor,) and other.name.startswith("aten.slice.") and other.args[1] in same:
            start, stop, _ = slice(*other.args[2:4]).indices(size)
            borders |= {start, stop}
    return tuple(b - a for a, b in itertools.pairwise(sorted(borders)))


def through_move(op: Op, base: str, sizes: Sizes, tensor: int, state: Split) -> Split:
    """Transpose, permute, expand, and dimensions of size 1 that come or go (of packed parts too)."""
    return replace(state, dim=moved(op, base, sizes, tensor, state.dim))


def moved(op: Op, base: str, sizes: Sizes, tensor: int, dim: int) -> int:
    """Where dimension `dim` of the input is in the output."""
    rank, after = len(sizes[tensor]), len(sizes[op.outputs[0]])
    if base == "t":
        return 1 - dim if rank == 2 else dim
    if base == "transpose":
        a, b = op.args[1] % rank, op.args[2] % rank
        return {a: b, b: a}.get(dim, dim)
    if base == "permute":
        return [d % rank for d in op.args[1]].index(dim)
    if base == "expand":
        return dim + after - rank
    if base == "unsqueeze":
        return dim + (op.args[1] % after <= dim)
    gone = op.args[1] if len(op.args) > 1 else tuple(range(rank))
    gone = {d % rank for d in (gone if isinstance(gone, tuple) else (gone,))}
    return dim - sum(d < dim and sizes[tensor][d] == 1 for d in gone)


def reduced_dims(op: Op, base: str, rank: int) -> set[int]:
    """The dimensions that a reduction (or softmax, sort, ...) works on; empty if it names none."""
    place = 2 if base in ("topk", "linalg_vector_norm") else 1
    named = [a[1] for a in op.args if isinstance(a, tuple) and len(a) == 2 and a[0] == "dim"]
    given = (
        op.args[place] if len(op.args) > place else (named[0] if named else -1 if base in ("topk", "sort") else None)
    )
    if (
        isinstance(given, bool)
        or not isinstance(given, (int, tuple))
        or any(not isinstance(d, int) for d in _several(given))
    ):
        return set()
    return {d % rank for d in _several(given)}


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def through_reduction(op: Op, base: str, sizes: Sizes, tensor: int, state: Split) -> Split:
    """Reductions and softmax: fine along other dimensions."""
    rank = len(sizes[tensor])
    dims = reduced_dims(op, base, rank)
    if not dims:
        raise Conflict(state.sources, f"{base} needs the whole tensor")
    if state.dim in dims:
        raise Conflict(state.sources, f"{base} needs the whole dimension")
    kept = len(sizes[op.outputs[0]]) == rank
    return replace(state, dim=state.dim if kept else state.dim - sum(d < state.dim for d in dims))


def through_norm(op: Op, sizes: Sizes, tensor: int, state: Split) -> Split:
    """Layer norm and RMS norm over the last dimensions."""
    normalized = op.args[1]
    count = len(normalized) if isinstance(normalized, tuple) else 1
    if state.dim >= len(sizes[tensor]) - count:
        raise Conflict(state.sources, "a norm needs all its features")
    return state


def through_join(
    op: Op,
    base: str,
    sizes: Sizes,
    splits: Sequence[tuple[int, Split]],
    sources: frozenset[str],
    meet_whole: Callable[[int, int], None],
) -> Split:
    """cat and stack of tensors that are split alike, along another dimension.

    `meet_whole(tensor, dim)` is asked whether a whole operand may be cut along `dim`.
    """
    dims = {state.dim for _, state in splits}
    if len(dims) != 1 or any(state.outer > 1 for _, state in splits):
        raise Conflict(sources, "it is joined to differently split tensors")
    dim = dims.pop()
    for tensor in set(op.inputs) - {t for t, _ in splits}:
        if len(sizes[tensor]) <= dim:
            raise Conflict(sources, "it is joined to a tensor of another shape")
        meet_whole(tensor, dim)
    along = dim_argument(op, 1, len(sizes[splits[0][0]]) + (base == "stack"), 0)
    if base == "stack":
        return Split(dim + (along <= dim), sources)
    if along == dim:
        raise Conflict(sources, "it is joined along its split")
    return Split(dim, sources)


def through_index(op: Op, base: str, sizes: Sizes, tensor: int, state: Split) -> Split:
    """Rows picked along other dimensions: x[:, index] and index_select."""
    if base == "index_select":
        if dim_argument(op, 1, len(sizes[tensor]), 0) == state.dim:
            raise Conflict(state.sources, "an index picks along its split")
        return state
    given = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], tuple) else ()
    picked = [(d, item.tensor) for d, item in enumerate(given) if isinstance(item, Ref)]
    where = [d for d, _ in picked]
    if not picked or state.dim in where:
        raise Conflict(state.sources, "an index picks along its split")
    if any(len(sizes[t]) == len(sizes[tensor]) for _, t in picked) or where != list(range(where[0], where[-1] + 1)):
        raise Conflict(state.sources, "an index picks across its dimensions")
    rank = max(len(sizes[t]) for _, t in picked)
    return replace(state, dim=state.dim if state.dim < where[0] else state.dim - len(where) + rank)


def through_pad(op: Op, rank: int, state: Split) -> Split:
    """Padding of other dimensions (pairs from the last dimension backwards)."""
    widths = op.args[1]
    own = rank - 1 - state.dim
    if any(widths[2 * own : 2 * own + 2]):
        raise Conflict(state.sources, "padding along its split")
    return state


def through_roll(op: Op, rank: int, state: Split) -> Split:
    """A cyclic shift of other dimensions."""
    dims = _several(op.args[2]) if len(op.args) > 2 else ()
    if not dims or state.dim in {d % rank for d in dims}:
        raise Conflict(state.sources, "a cyclic shift along its split")
    return state


def through_repeat(op: Op, rank: int, state: Split) -> Split:
    """Copies along other dimensions."""
    times = op.args[1]
    dim = state.dim + len(times) - rank
    if times[dim] != 1:
        raise Conflict(state.sources, "it is repeated along its split")
    return replace(state, dim=dim)
