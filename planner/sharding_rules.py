"""How a sharding passes through the operators of one unit: abstract interpretation of its forward.

Every tensor has a state: whole on each tp rank, split along one dimension, or a weight on its way to its product.
Linear layers with a whole input make split tensors (col); those with an input split along the
contraction take them (row). An operator that cannot carry a split raises `Conflict`, which names the layers to
blame and what to try instead; `sharding.py` decides and runs again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..units import DTYPE_BYTES
from .graph import Affine, Op, Ref, Tensor, UnitClass

_PROBE = 7  # microbatch at which shapes are compared: prime, so that chance equalities are rare

_POINTWISE = frozenset(
    """abs add addcdiv addcmul alias bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min clone copy
    cos detach div elu eq erf erfc exp exp2 expm1 fill floor ge gelu gt hardsigmoid hardswish hardtanh isinf
    isnan leaky_relu le lerp lift_fresh log log10 log1p log2 logical_and logical_not logical_or lt masked_fill
    maximum minimum mish mul native_dropout ne neg pow reciprocal relu remainder round rsqrt rsub sigmoid sign silu
    sin softplus sqrt square sub tan tanh threshold to_copy trunc where xlogy zeros_like ones_like full_like
    bernoulli nan_to_num""".split()  # noqa: SIM905
)
_REDUCTIONS = frozenset("mean sum amax amin var var_mean std logsumexp prod any all linalg_vector_norm".split())  # noqa: SIM905
_ALONG_DIM = frozenset("_softmax _log_softmax cumsum cumprod sort topk flip argmax".split())  # noqa: SIM905
_VIEWS = frozenset("view _unsafe_view reshape _reshape_alias".split())  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Whole:
    """Equal on all tp ranks; `summed_from` are the col layers whose split a row layer has just summed."""

    summed_from: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Split:
    """Divided along `dim`, because of the layers `sources`.

    `segments` are the sizes of a packed projection's parts while they are still in one tensor. `outer` > 1: the
    dimension was merged from (outer, size / outer) and only the second is divided, as when (batch, heads) become
    one for a batched product. `loss` marks log-probabilities split over the classes.
    """

    dim: int
    sources: frozenset[str]
    segments: tuple[int, ...] = ()
    outer: int = 1
    loss: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter by its absolute name, as stored or transposed."""

    name: str
    transposed: bool = False


State = Whole | Split | Weight


class Conflict(Exception):
    """A split that cannot go on: `modules` must change, or whatever layers split `weight`.

    `packed` are segment sizes that would help.
    """

    def __init__(self, modules: frozenset[str], reason: str, packed: tuple[int, ...] = (), weight: str = "") -> None:
        super().__init__(reason)
        self.modules, self.reason, self.packed, self.weight = modules, reason, packed, weight


@dataclass(frozen=True, slots=True)
class Collective:
    """One tp collective of a unit call; `bytes` is the size of the whole tensor, `module` relative to the unit."""

    phase: str
    collective: str
    bytes: Affine
    module: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear or embedding that owns its weight: `weight` by absolute name, rows = dimension of size out."""

    fqn: str
    weight: str
    kind: str
    out_features: int
    numel: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is tried for a layer: col, packed (with sizes), gather (col, output gathered), vocab, replicate."""

    style: str
    sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What one interpretation found: see `ClassSharding` for the fields that the planner reads."""

    states: list[State]
    op_split: list[str | None]
    rows: dict[str, frozenset[str]] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    consumed: set[str] = field(default_factory=set)
    loss: set[str] = field(default_factory=set)
    whole_loss: bool = False
    attention: set[str] = field(default_factory=set)
    collectives: list[Collective] = field(default_factory=list)
    inputs_summed: dict[tuple[int, str], str] = field(default_factory=dict)
    limits: list[tuple[frozenset[str], int, str]] = field(default_factory=list)


def tensor_bytes(tensor: Tensor) -> Affine:
    """Bytes of a tensor as a function of the microbatch size."""
    at = [math.prod(d.at(b) for d in tensor.shape) * DTYPE_BYTES[tensor.dtype] for b in (0, 1)]
    return Affine(at[0], at[1] - at[0])


def parent(fqn: str) -> str:
    """The module that holds `fqn`."""
    return fqn.rpartition(".")[0]


class Interpreter:
    """Runs the forward operators of one class over states.

    Parameters
    ----------
    cls : UnitClass
    layers : mapping of relative module FQN to Layer
        Layers that may be split.
    decisions : mapping of relative module FQN to Decision
    sharded : callable
        Tells by absolute parameter name whether some layer splits it.
    names : sequence of str
        Absolute name of each tensor that is a parameter, "" otherwise.
    """

    def __init__(
        self,
        cls: UnitClass,
        layers: Mapping[str, Layer],
        decisions: Mapping[str, Decision],
        sharded: Callable[[str], bool],
        names: Sequence[str],
    ) -> None:
        self.cls, self.layers, self.decisions, self.sharded = cls, layers, decisions, sharded
        states: list[State] = [Weight(name) if name else Whole() for name in names]
        self.out = Outcome(states, [None] * len(cls.ops))
        self.sizes = [tuple(round(d.at(_PROBE)) for d in t.shape) for t in cls.tensors]

    def run(self) -> Outcome:
        """Interpret all operators.

        Raises
        ------
        Conflict
            If a split meets what cannot carry it.
        """
        for op in self.cls.ops:
            self._step(op)
        for tensor in self.cls.outputs:
            state = self.out.states[tensor]
            if isinstance(state, Split):
                raise Conflict(state.sources, "its output leaves its block split")
        lost = self.out.columns - self.out.consumed
        if lost:
            raise Conflict(frozenset(lost), "no later layer takes its split output")
        for (tensor, _), module in self.out.inputs_summed.items():
            n_bytes = tensor_bytes(self.cls.tensors[tensor])
            self.out.collectives.append(Collective("backward", "all_reduce", n_bytes, module))
        return self.out

    # one operator

    def _step(self, op: Op) -> None:
        base = op.name.split(".")[-2].removesuffix("_") if "." in op.name else op.name
        base = base if base not in ("_to_copy",) else "to_copy"
        if op.name.split(".")[0].endswith("_scaled_dot_product") or "_scaled_dot_product" in op.name:
            results = self._attention(op)
        elif base in ("mm", "addmm"):
            results = [self._linear(op, base)]
        elif base == "embedding":
            results = [self._embedding(op)]
        else:
            results = self._carry(op, base)
        for tensor, state in zip(op.outputs, results, strict=False):
            self._set(tensor, state, op)
        if self.out.op_split[op.index] is None and any(isinstance(s, Split) for s in self._inputs(op) + results):
            self.out.op_split[op.index] = "elements"

    def _set(self, tensor: int, state: State, op: Op) -> None:
        self.out.states[tensor] = state
        if isinstance(state, Split):
            sizes = state.segments or (self.sizes[tensor][state.dim] // state.outer,)
            for size in sizes:
                if size == 1:
                    raise Conflict(state.sources, "there is only one part to give")
                self.out.limits.append((state.sources, size, self._label(op, size)))

    def _label(self, op: Op, size: int) -> str:
        return f"{op.fqn.strip('/') or self.cls.module_type} ({size})"

    def _inputs(self, op: Op) -> list[State]:
        return [self.out.states[t] for t in op.inputs]

    def _splits(self, op: Op) -> list[tuple[int, Split]]:
        found = []
        for tensor in op.inputs:
            state = self.out.states[tensor]
            if isinstance(state, Split):
                found.append((tensor, state))
        return found

    def _carry(self, op: Op, base: str) -> list[State]:
        """Operators without a weight's product: views, element-wise, reductions."""
        splits = self._splits(op)
        if not splits:
            return self._whole(op, base)
        sources = frozenset[str]().union(*(s.sources for _, s in splits))
        (tensor, state), n = splits[0], len(op.outputs)
        if state.loss and base != "nll_loss_forward":
            raise Conflict(sources, f"{base} needs all the classes")
        if base in _VIEWS:
            return [self._view(op, tensor, state)]
        if base in ("split", "split_with_sizes", "unsafe_split", "slice", "select", "unbind"):
            return self._cut(op, base, tensor, state)
        if state.segments:
            raise Conflict(sources, f"{base} runs before its packed parts are set apart")
        if base in ("_log_softmax", "nll_loss_forward"):
            return self._loss(op, base, state)
        if base in _POINTWISE:
            return [self._pointwise(op, sources, splits)] * n
        if base in ("transpose", "permute", "t", "unsqueeze", "squeeze", "expand"):
            return [replace(state, dim=self._moved(op, base, tensor, state.dim))] * n
        if base in ("view_as_complex", "view_as_real") and state.dim < len(self.sizes[tensor]) - 1:
            return [state]
        if base in _REDUCTIONS or base in _ALONG_DIM:
            return [self._along(op, base, tensor, state)] * n
        if base == "bmm":
            if len(splits) < len(op.inputs) or {(s.dim, s.outer) for _, s in splits} != {(0, state.outer)}:
                raise Conflict(sources, "a batched product of split and whole tensors")
            self.out.op_split[op.index] = "batch"
            return [Split(0, sources, outer=state.outer)]
        if state.outer > 1:
            raise Conflict(sources, f"{base} on merged dimensions")
        if base in ("native_layer_norm", "_fused_rms_norm"):
            normalized = op.args[1]
            count = len(normalized) if isinstance(normalized, tuple) else 1
            if state.dim >= len(self.sizes[tensor]) - count:
                raise Conflict(sources, "a norm needs all its features")
            return [Split(state.dim, sources)] * n
        if base in ("cat", "stack"):
            return [self._cat(op, base, sources, splits)]
        raise Conflict(sources, f"{base} has no rule for split tensors")

    def _whole(self, op: Op, base: str) -> list[State]:
        """No split input: whole, after a check that no split weight is used in a way that is not known."""
        weights = [s for s in self._inputs(op) if isinstance(s, Weight)]
        if weights and base in ("t", "transpose", "alias", "detach"):
            return [Weight(weights[0].name, weights[0].transposed != (base in ("t", "transpose")))]
        for weight in weights:
            own = weight.name.endswith(".bias") and op.fqn in self.layers  # added after a gathered product
            if not own and self.sharded(weight.name):
                raise Conflict(frozenset(), f"{base} uses its weight directly", weight=weight.name)
        if base == "_log_softmax":
            self.out.whole_loss = True
        inputs = [s for s in self._inputs(op) if isinstance(s, Whole)]
        summed = inputs[0].summed_from if len(op.inputs) == 1 and inputs else frozenset[str]()
        return [Whole(summed)] * len(op.outputs)

    # rules

    def _linear(self, op: Op, base: str) -> State:
        refs = [a.tensor for a in op.args if isinstance(a, Ref)]
        x, w = refs[-2:]
        state, weight = self.out.states[x], self.out.states[w]
        layer = self.layers.get(op.fqn)
        known = layer is not None and isinstance(weight, Weight) and weight.name == layer.weight
        if not known or layer is None:
            blamed = frozenset[str]().union(*(s.sources for _, s in self._splits(op)))
            reason = "a product with a weight that is no plain layer's own"
            if blamed:
                raise Conflict(blamed, reason)
            self._refuse_split_weight(weight, reason)
            return Whole()
        decision = self.decisions[op.fqn]
        if isinstance(state, Split):
            if state.segments or state.loss or state.dim != len(self.sizes[x]) - 1:
                raise Conflict(state.sources, f"{op.fqn} cannot sum over its split")
            if decision.style == "replicate":
                raise Conflict(state.sources, f"{op.fqn} must stay whole")
            self.out.rows[op.fqn] = self.out.rows.get(op.fqn, frozenset()) | state.sources
            self.out.consumed |= state.sources
            self.out.op_split[op.index] = "k"
            n_bytes = tensor_bytes(self.cls.tensors[op.outputs[0]])
            self.out.collectives.append(Collective("forward", "all_reduce", n_bytes, op.fqn))
            return Whole(state.sources)
        if decision.style == "replicate":
            return Whole()
        self.out.op_split[op.index] = "n"
        storage = self.cls.tensors[x].base
        if self.cls.tensors[storage].requires_grad or self.cls.tensors[x].requires_grad:
            self.out.inputs_summed.setdefault((storage, parent(op.fqn)), op.fqn)
        self.out.columns.add(op.fqn)
        if decision.style == "gather":
            self.out.consumed.add(op.fqn)
            self.out.limits.append((frozenset({op.fqn}), layer.out_features, self._label(op, layer.out_features)))
            n_bytes = tensor_bytes(self.cls.tensors[op.outputs[0]])
            self.out.collectives.append(Collective("forward", "all_gather", n_bytes, op.fqn))
            return Whole()
        return Split(len(self.sizes[op.outputs[0]]) - 1, frozenset({op.fqn}), decision.sizes)

    def _embedding(self, op: Op) -> State:
        weight = self.out.states[op.inputs[0]]
        layer = self.layers.get(op.fqn)
        if not isinstance(weight, Weight) or layer is None or layer.kind != "embedding":
            self._refuse_split_weight(weight, "an embedding that is no plain layer reads its weight")
            return Whole()
        if self.decisions[op.fqn].style != "vocab":
            return Whole()
        self.out.limits.append((frozenset({op.fqn}), layer.out_features, self._label(op, layer.out_features)))
        self.out.op_split[op.index] = "elements"
        n_bytes = tensor_bytes(self.cls.tensors[op.outputs[0]])
        self.out.collectives.append(Collective("forward", "all_reduce", n_bytes, op.fqn))
        return Whole()

    def _refuse_split_weight(self, state: State, reason: str) -> None:
        if isinstance(state, Weight) and self.sharded(state.name):
            raise Conflict(frozenset(), reason, weight=state.name)

    def _attention(self, op: Op) -> list[State]:
        query, key, value = op.inputs[0], op.inputs[min(1, len(op.inputs) - 1)], op.inputs[min(2, len(op.inputs) - 1)]
        heads = len(self.sizes[query]) - 3
        splits = self._splits(op)
        if not splits:
            return [Whole()] * len(op.outputs)
        sources = frozenset[str]().union(*(s.sources for _, s in splits))
        state = self.out.states[query]
        if not isinstance(state, Split) or any(s.dim != heads or s.segments for _, s in splits):
            raise Conflict(sources, f"{op.fqn} attends over a split that is not by heads")
        for tensor in {key, value}:
            other = self.out.states[tensor]
            if not isinstance(other, Split) and self.cls.tensors[tensor].requires_grad:
                n_bytes = tensor_bytes(self.cls.tensors[tensor])
                self.out.collectives.append(Collective("backward", "all_reduce", n_bytes, op.fqn))
        n_heads, n_kv = self.sizes[query][heads], self.sizes[key][heads]
        self.out.limits.append((sources, n_heads, f"{op.fqn} ({n_heads} heads)"))
        if n_kv != n_heads and isinstance(self.out.states[key], Split):
            self.out.limits.append((sources, n_kv, f"{op.fqn} ({n_kv} key/value heads)"))
        self.out.attention.add(op.fqn)
        self.out.op_split[op.index] = "heads"
        rest: list[State] = [
            Split(1, sources) if len(self.sizes[t]) > 1 and self.sizes[t][1] == n_heads else Whole()
            for t in op.outputs[1:]
        ]
        return [Split(heads, sources), *rest]

    def _pointwise(self, op: Op, sources: frozenset[str], splits: list[tuple[int, Split]]) -> State:
        rank = max(len(self.sizes[t]) for t in op.inputs)
        places = {(state.dim + rank - len(self.sizes[t]), state.outer) for t, state in splits}
        if len(places) != 1 or any(s.segments or s.loss for _, s in splits):
            raise Conflict(sources, "element-wise on tensors that are split differently")
        place, outer = places.pop()
        for tensor in op.inputs:
            state = self.out.states[tensor]
            own = place - (rank - len(self.sizes[tensor]))
            if isinstance(state, Split) or own < 0 or self.sizes[tensor][own] == 1:
                continue
            if outer > 1:
                raise Conflict(sources, "it meets a whole tensor on merged dimensions")
            if isinstance(state, Whole) and self.cls.tensors[tensor].requires_grad:
                self._join(op, tensor, sources, state)
        return Split(place, sources, outer=outer)

    def _join(self, op: Op, tensor: int, sources: frozenset[str], state: Whole) -> None:
        """A split meets a whole activation (a low-rank adapter): its gradient must be gathered.

        Where that activation is a sum over tp, one of the two groups of layers had better stay whole.
        """
        if state.summed_from:
            raise Conflict(self._smaller(sources, state.summed_from), "it meets a whole activation of its size")
        n_bytes = tensor_bytes(self.cls.tensors[tensor])
        self.out.collectives.append(Collective("backward", "all_gather", n_bytes, op.fqn))

    def _smaller(self, one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
        """Which of two groups of layers to give up: the one with fewer parameters."""
        if not other:
            return one
        weigh = {side: sum(self.layers[f].numel for f in side if f in self.layers) for side in (one, other)}
        return one if weigh[one] < weigh[other] else other

    def _view(self, op: Op, tensor: int, state: Split) -> State:
        before, after, dim = self.sizes[tensor], self.sizes[op.outputs[0]], state.dim
        if state.segments:
            return self._packed_view(op, state, before, after)
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

    def _packed_view(self, op: Op, state: Split, before: tuple[int, ...], after: tuple[int, ...]) -> State:
        segments, dim = state.segments, state.dim
        if op.fqn in state.sources and after[-1] == before[-1] and dim == len(before) - 1:
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

    def _cut(self, op: Op, base: str, tensor: int, state: Split) -> list[State]:
        """Split, slice, select, unbind: along another dimension, or between packed parts."""
        rank, size = len(self.sizes[tensor]), self.sizes[tensor][state.dim]
        place = {"split": 2, "split_with_sizes": 2, "unsafe_split": 2}.get(base, 1)
        dim = self._dim(op, place, rank, 0)
        drop = base in ("select", "unbind")
        if dim != state.dim:
            moved = state.dim - (drop and dim < state.dim)
            if state.segments:
                raise Conflict(state.sources, f"{base} runs before its packed parts are set apart")
            return [replace(state, dim=moved)] * len(op.outputs)
        if base == "slice" and self.sizes[op.outputs[0]][dim] == size:
            return [state]
        parts = self._parts(op, base, tensor, dim)
        if state.segments and parts == state.segments and not drop:
            return [Split(dim, state.sources)] * len(op.outputs)
        packed: tuple[int, ...] = ()
        if len(state.sources) == 1 and not state.segments and sum(parts) == size:
            layer = self.layers[next(iter(state.sources))]
            packed = tuple(part * (layer.out_features // size) for part in parts)
        raise Conflict(state.sources, f"{base} cuts across its split", packed)

    def _parts(self, op: Op, base: str, tensor: int, dim: int) -> tuple[int, ...]:
        """Sizes of the pieces into which `op` (and the other slices of the same tensor) cut `dim`."""
        size = self.sizes[tensor][dim]
        if base in ("select", "unbind"):
            return (1,) * size
        if base != "slice":
            return tuple(self.sizes[t][dim] for t in op.outputs)
        borders = {0, size}
        for other in self.cls.ops:
            if (
                other.inputs[:1] == (tensor,)
                and other.name.startswith("aten.slice.")
                and other.args[1] in (dim, dim - len(self.sizes[tensor]))
            ):
                start, stop, _ = slice(*other.args[2:4]).indices(size)
                borders |= {start, stop}
        marks = sorted(borders)
        return tuple(b - a for a, b in itertools.pairwise(marks))

    def _dim(self, op: Op, place: int, rank: int, default: int) -> int:
        named = next((a[1] for a in op.args if isinstance(a, tuple) and len(a) == 2 and a[0] == "dim"), None)
        value = op.args[place] if len(op.args) > place and isinstance(op.args[place], int) else named
        return (default if value is None else int(value)) % rank

    def _moved(self, op: Op, base: str, tensor: int, dim: int) -> int:
        rank = len(self.sizes[tensor])
        if base == "t":
            return 1 - dim if rank == 2 else dim
        if base == "transpose":
            a, b = op.args[1] % rank, op.args[2] % rank
            return {a: b, b: a}.get(dim, dim)
        if base == "permute":
            return [d % rank for d in op.args[1]].index(dim)
        after = len(self.sizes[op.outputs[0]])
        if base == "expand":
            return dim + after - rank
        if base == "unsqueeze":
            return dim + (op.args[1] % after <= dim)
        gone = op.args[1] if len(op.args) > 1 else tuple(range(rank))
        gone = {d % rank for d in (gone if isinstance(gone, tuple) else (gone,))}
        return dim - sum(d < dim and self.sizes[tensor][d] == 1 for d in gone)

    def _along(self, op: Op, base: str, tensor: int, state: Split) -> State:
        """Reductions and softmax: fine along other dimensions."""
        rank = len(self.sizes[tensor])
        given = op.args[1] if len(op.args) > 1 else None
        if given is None or (not isinstance(given, (int, tuple))) or given == ():
            raise Conflict(state.sources, f"{base} needs the whole tensor")
        dims = {int(d) % rank for d in (given if isinstance(given, tuple) else (given,))}
        if state.dim in dims:
            raise Conflict(state.sources, f"{base} needs the whole dimension")
        kept = len(self.sizes[op.outputs[0]]) == rank
        return replace(state, dim=state.dim if kept else state.dim - sum(d < state.dim for d in dims))

    def _loss(self, op: Op, base: str, state: Split) -> list[State]:
        if base == "nll_loss_forward":
            if not state.loss:
                raise Conflict(state.sources, "the loss needs all the classes")
            self.out.loss |= state.sources
            self.out.consumed |= state.sources
            rows = Affine()
            for tensor in op.inputs[1:2]:
                rows = tensor_bytes(self.cls.tensors[tensor]).scaled(4 / DTYPE_BYTES[self.cls.tensors[tensor].dtype])
            for _ in range(3):  # maximum, sum of exponentials, the target's logit
                self.out.collectives.append(Collective("forward", "all_reduce", rows, op.fqn))
            return [Whole()] * len(op.outputs)
        along = self._dim(op, 1, len(self.sizes[op.inputs[0]]), -1)
        if along != state.dim:
            return [Split(state.dim, state.sources)]
        return [Split(state.dim, state.sources, loss=True)]

    def _cat(self, op: Op, base: str, sources: frozenset[str], splits: list[tuple[int, Split]]) -> State:
        rank = len(self.sizes[splits[0][0]])
        dims = {state.dim for _, state in splits}
        if len(dims) != 1 or len({t for t, _ in splits}) != len(set(op.inputs)):
            raise Conflict(sources, "it is joined to whole or differently split tensors")
        dim, along = dims.pop(), self._dim(op, 1, rank + (base == "stack"), 0)
        if base == "stack":
            return Split(dim + (along <= dim), sources)
        if along == dim:
            raise Conflict(sources, "it is joined along its split")
        return Split(dim, sources)
