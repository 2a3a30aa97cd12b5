"""Views of parameters: which dimension of a parameter stands behind each dimension of a view or cast of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .graph import Op, Ref, UnitClass
from .sharding_shapes import MOVES, VIEWS, dim_argument, moved, through_view
from .sharding_states import Conflict, Split, Weight
from .sharding_walk import sizes_of

_SAME = frozenset(
    "clone _to_copy alias detach contiguous neg exp softplus sigmoid tanh abs lift_fresh _conj".split()  # noqa: SIM905
)
_SCALAR = frozenset("add sub mul div rsub pow".split())  # with a number as the other operand  # noqa: SIM905


def parameter_views(cls: UnitClass, names: Sequence[str]) -> dict[int, Weight]:
    """All parameters and their views by tensor id; `names` are absolute, "" for what is no parameter."""
    sizes = sizes_of(cls)
    views = {t: Weight(name, tuple(range(len(sizes[t])))) for t, name in enumerate(names) if name}
    for op in cls.ops:
        if op.inputs and op.inputs[0] in views:
            base = op.name.split(".")[-2].removesuffix("_") if "." in op.name else op.name
            others = set(op.inputs[1:])
            weight = views[op.inputs[0]]
            for tensor in op.outputs:
                dims = _dims(op, base, sizes, tensor, weight, others)
                if dims is None:
                    continue
                segment = weight.segment or _segment(op, base, sizes, weight)
                if weight.segment and base not in MOVES | _SAME:
                    dims, segment = (None,) * len(dims), 0
                elif segment and not weight.segment:
                    dims = weight.dims
                views[tensor] = Weight(weight.name, dims, weight.indexed or base.startswith("index"), segment)
    return views


def _dims(
    op: Op, base: str, sizes: Sequence[tuple[int, ...]], out: int, weight: Weight, others: set[int]
) -> tuple[int | None, ...] | None:
    """`Weight.dims` of an output, or None if it is no view of the parameter."""
    source, after = op.inputs[0], sizes[out]
    if base == "index":
        return _indexed(op, sizes, weight, len(after))
    if others and base != "index_select":
        return None
    if base in _SAME or (base in _SCALAR and len(op.args) > 1 and isinstance(op.args[1], (int, float))):
        return weight.dims
    if base in VIEWS:
        return _viewed(op, sizes, source, out, weight)
    if base in MOVES:
        return _moved_dims(op, base, sizes, source, out, weight)
    if base in ("select", "slice", "index_select", "split", "split_with_sizes", "unbind"):
        place = 2 if base.startswith("split") else 1
        along = dim_argument(op, place, len(weight.dims), 0)
        if base in ("select", "unbind"):
            return weight.dims[:along] + weight.dims[along + 1 :]
        whole = sizes[source][along] == after[along]
        return tuple(d if whole or i != along else None for i, d in enumerate(weight.dims))
    return None


def _segment(op: Op, base: str, sizes: Sequence[tuple[int, ...]], weight: Weight) -> int:
    """Size of the equal segments between whose borders a parameter is cut (fused projections), 0 if it is not."""
    if not base.startswith("split"):
        return 0
    along = dim_argument(op, 2, len(weight.dims), 0)
    parts = [sizes[t][along] for t in op.outputs]
    return math.gcd(*parts) if len(parts) > 1 else 0


def _indexed(op: Op, sizes: Sequence[tuple[int, ...]], weight: Weight, rank: int) -> tuple[int | None, ...] | None:
    """Rows picked along the first dimension."""
    index = op.args[1] if len(op.args) > 1 else None
    if not isinstance(index, tuple) or len(index) != 1 or not isinstance(index[0], Ref):
        return None
    lead = len(sizes[index[0].tensor])
    found = (*(None,) * lead, *weight.dims[1:])
    return found if len(found) == rank else None


def _viewed(op: Op, sizes: Sequence[tuple[int, ...]], source: int, out: int, weight: Weight) -> tuple[int | None, ...]:
    found: dict[int, int] = {}
    for i, dim in enumerate(weight.dims):
        if dim is None or sizes[source][i] == 1:
            continue
        try:
            state = through_view(op, sizes, source, Split(i, frozenset()), out)
        except Conflict:
            continue
        if state.outer == 1:
            found[state.dim] = dim
    return tuple(found.get(i) for i in range(len(sizes[out])))


def _moved_dims(
    op: Op, base: str, sizes: Sequence[tuple[int, ...]], source: int, out: int, weight: Weight
) -> tuple[int | None, ...]:
    found: dict[int, int] = {}
    for i, dim in enumerate(weight.dims):
        if dim is not None and sizes[source][i] != 1:
            to = moved(op, base, sizes, source, i)
            if sizes[out][to] == sizes[source][i]:
                found[to] = dim
    return tuple(found.get(i) for i in range(len(sizes[out])))


def is_parameter_view(views: Mapping[int, Weight], op: Op) -> bool:
    """Whether an operator only looks at a parameter."""
    return bool(op.outputs) and all(t in views for t in op.outputs)
