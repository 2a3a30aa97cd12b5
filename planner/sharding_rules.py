"""How a sharding passes through the operators of one unit: abstract interpretation of its forward.

Every tensor has a state: whole on each tp rank, split along one dimension, or a weight on its way to its product.
Linear layers with a whole input make split tensors (col); those with an input split along the
contraction take them (row). An operator that cannot carry a split raises `Conflict`, which names the layers to
blame and what to try instead; `sharding_search.py` decides and runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..units import DTYPE_BYTES
from .graph import Affine, Op, Ref, UnitClass
from .sharding_shapes import (
    CUTS,
    MOVES,
    dim_argument,
    through_cut,
    through_join,
    through_move,
    through_norm,
    through_reduction,
    through_view,
)
from .sharding_states import (
    Collective,
    Conflict,
    Decision,
    Layer,
    Outcome,
    Split,
    State,
    Weight,
    Whole,
    is_transpose,
    tensor_bytes,
)

_PROBE = 7  # microbatch at which shapes are compared: prime, so that chance equalities are rare

_POINTWISE = frozenset(
    """abs add addcdiv addcmul alias bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min clone copy
    cos detach div elu eq erf erfc exp exp2 expm1 fill floor ge gelu gt hardsigmoid hardswish hardtanh isinf
    isnan leaky_relu le lerp lift_fresh log log10 log1p log2 logical_and logical_not logical_or lt masked_fill
    maximum minimum mish mul native_dropout ne neg pow reciprocal relu remainder round rsqrt rsub sigmoid sign silu
    sin softplus sqrt square sub tan tanh threshold _to_copy trunc where xlogy zeros_like ones_like full_like
    bernoulli nan_to_num""".split()  # noqa: SIM905
)
_REDUCTIONS = frozenset("mean sum amax amin var var_mean std logsumexp prod any all linalg_vector_norm".split())  # noqa: SIM905
_ALONG_DIM = frozenset("_softmax _log_softmax cumsum cumprod sort topk flip argmax".split())  # noqa: SIM905
_VIEWS = frozenset("view _unsafe_view reshape _reshape_alias".split())  # noqa: SIM905


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
        for (tensor, door), module in self.out.inputs_summed.items():
            # A module that holds projections sums at its door, for those inside its children too.
            if not any(
                t == tensor and f"{door}.".startswith(f"{d}.".lstrip(".")) and d != door
                for t, d in self.out.inputs_summed
            ):
                n_bytes = tensor_bytes(self.cls.tensors[tensor])
                self.out.collectives.append(Collective("backward", "all_reduce", n_bytes, module))
        return self.out

    # one operator

    def _step(self, op: Op) -> None:
        base = op.name.split(".")[-2].removesuffix("_") if "." in op.name else op.name
        if "_scaled_dot_product" in op.name:
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
            return [through_view(op, self.sizes, tensor, state)] * n
        if base in CUTS:
            features = self.layers[min(sources)].out_features
            return [through_cut(op, base, self.sizes, tensor, state, self.cls.ops, features)] * n
        if state.segments:
            raise Conflict(sources, f"{base} runs before its packed parts are set apart")
        if base in ("_log_softmax", "nll_loss_forward"):
            return self._loss(op, base, state)
        if base in _POINTWISE:
            return [self._pointwise(op, sources, splits)] * n
        if base in MOVES:
            return [through_move(op, base, self.sizes, tensor, state)] * n
        if base in ("view_as_complex", "view_as_real") and state.dim < len(self.sizes[tensor]) - 1:
            return [state]
        if base in _REDUCTIONS or base in _ALONG_DIM:
            return [through_reduction(op, base, self.sizes, tensor, state)] * n
        if base == "bmm":
            if len(splits) < len(op.inputs) or {(s.dim, s.outer) for _, s in splits} != {(0, state.outer)}:
                raise Conflict(sources, "a batched product of split and whole tensors")
            self.out.op_split[op.index] = "batch"
            return [Split(0, sources, outer=state.outer)]
        if state.outer > 1:
            raise Conflict(sources, f"{base} on merged dimensions")
        if base in ("native_layer_norm", "_fused_rms_norm"):
            return [through_norm(op, self.sizes, tensor, state)] * n
        if base in ("cat", "stack"):
            return [through_join(op, base, self.sizes, splits, sources)]
        raise Conflict(sources, f"{base} has no rule for split tensors")

    def _whole(self, op: Op, base: str) -> list[State]:
        """No split input: whole, after a check that no split weight is used in a way that is not known."""
        weights = [s for s in self._inputs(op) if isinstance(s, Weight)]
        if weights and (base in ("t", "transpose", "alias", "detach") or is_transpose(op)):
            return [Weight(weights[0].name)]
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
            self.out.inputs_summed.setdefault((storage, op.fqn.rpartition(".")[0]), op.fqn)
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
        """Heads are independent. Whole keys and values get partial gradients, summed with those of their input."""
        query, key = [a.tensor for a in op.args if isinstance(a, Ref)][:2]
        heads = len(self.sizes[query]) - 3
        splits = self._splits(op)
        if not splits:
            return [Whole()] * len(op.outputs)
        sources = frozenset[str]().union(*(s.sources for _, s in splits))
        state = self.out.states[query]
        wrong = [s.sources for _, s in splits if s.dim != heads or s.segments or not isinstance(state, Split)]
        if wrong:  # a single key/value head ends up here: it stays whole, and each rank's queries share it
            raise Conflict(frozenset[str]().union(*wrong), f"{op.fqn} attends over a split that is not by heads")
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
        along = dim_argument(op, 1, len(self.sizes[op.inputs[0]]), -1)
        if along != state.dim:
            return [Split(state.dim, state.sources)]
        return [Split(state.dim, state.sources, loss=True)]
