"""How a sharding passes through the operators of one unit: abstract interpretation of its forward.

Every tensor has a state: whole on each tp rank, split along one dimension, a sum that is not finished, or a weight
on its way to its product. Layers with a whole input make split tensors (col); those with an input split along the
contraction take them (row). An operator that cannot carry a split raises `Conflict`, which names the layers to
blame and what to try instead; `sharding_search.py` decides and runs again.
"""

from __future__ import annotations

from .graph import Op
from .sharding_carry import (
    attention,
    loss,
    meet_whole,
    packed_bias,
    partial,
    per_channel_norm,
    pointwise,
    through_channels,
)
from .sharding_products import PRODUCTS, convolution, embedding, product
from .sharding_shapes import (
    CUTS,
    MOVES,
    VIEWS,
    dim_argument,
    reduced_dims,
    through_cut,
    through_index,
    through_join,
    through_move,
    through_norm,
    through_pad,
    through_reduction,
    through_repeat,
    through_roll,
    through_view,
)
from .sharding_states import Collective, Conflict, Outcome, Partial, Split, State, Weight, Whole, tensor_bytes
from .sharding_walk import Walk, inside

POINTWISE = frozenset(
    """abs add addcdiv addcmul alias bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max
    clamp_min clone contiguous copy cos detach div elu empty_like eq erf erfc exp exp2 expm1 fill floor floor_divide
    fmod full_like ge gelu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp lift_fresh log
    log10 log1p log2 log_sigmoid_forward logical_and logical_not logical_or logit lt masked_fill maximum minimum mish
    mul nan_to_num native_dropout ne neg ones_like pow rand_like randn_like reciprocal relu remainder round rsqrt rsub
    sigmoid sign silu sin softplus sqrt square sub tan tanh threshold _to_copy trunc where xlogy zero
    zeros_like""".split()  # noqa: SIM905
)
REDUCTIONS = frozenset("mean sum amax amin var var_mean std logsumexp prod any all linalg_vector_norm".split())  # noqa: SIM905
ALONG_DIM = frozenset(
    "_softmax _log_softmax _safe_softmax cumsum cumprod sort topk flip argmax argmin max min".split()  # noqa: SIM905
)
CHANNELWISE = frozenset(
    """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d
    upsample_bicubic2d _upsample_nearest_exact2d reflection_pad1d reflection_pad2d replication_pad2d""".split()  # noqa: SIM905
)
_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
_KEEPS_ZERO = VIEWS | MOVES | frozenset(("clone", "_to_copy", "slice", "select"))
_BATCH_NORMS = frozenset(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "native_group_norm"))
_SMALL_NORM = 8  # a sum over a split dimension is exchanged if it is so many times smaller than what is summed


class Interpreter(Walk):
    """Runs the forward operators of one class over states; for its parameters see `Walk`."""

    def run(self) -> Outcome:
        """Interpret all operators that something reads.

        Raises
        ------
        Conflict
            If a split meets what cannot carry it.
        """
        live = live_operators(self)
        for op in self.cls.ops:
            if op.index in live:
                self.step(op)
        for tensor in self.cls.outputs:
            state = self.state(tensor)
            if isinstance(state, Split):
                raise Conflict(state.sources, "its output leaves its block split")
            if isinstance(state, Partial):
                self.sum_partial(tensor, state)
        lost = self.out.columns - self.out.consumed
        if lost:
            raise Conflict(frozenset(lost), "no later layer takes its split output")
        self._whole_elsewhere()
        self._sums_of_gradients()
        return self.out

    def _whole_elsewhere(self) -> None:
        """A raw parameter that is split at one use and read whole at another."""
        for name in self.out.raw.keys() & self.whole_uses:
            if name in self.raw_layers:
                raise Conflict(frozenset({self.raw_layers[name].fqn}), "it is read whole too")
            raise Conflict(frozenset(), "it is read whole too", keep=name)

    def _sums_of_gradients(self) -> None:
        for (tensor, door), module in self.out.inputs_summed.items():
            # A module that holds projections sums at its door, for those inside its children too.
            if not any(
                t == tensor and f"{door}.".startswith(f"{d}.".lstrip(".")) and d != door
                for t, d in self.out.inputs_summed
            ):
                spec = self.cls.tensors[tensor]
                n_bytes = tensor_bytes(spec)
                self.out.collectives.append(Collective("backward", "all_reduce", n_bytes, module, spec.repeat))

    # one operator

    def step(self, op: Op) -> None:
        """Set the states of the outputs of one operator.

        Raises
        ------
        Conflict
            If it cannot carry the split of an input.
        """
        if op.outputs and all(t in self.views for t in op.outputs):
            return  # it only looks at a parameter
        base = op.name.split(".")[-2].removesuffix("_") if "." in op.name else op.name
        for tensor in op.inputs:
            self.leave_region(op, tensor)
        if any(inside(op.fqn, part) for part in self.opaque):
            results = self._opaque(op)
        elif "_scaled_dot_product" in op.name:
            results = attention(self, op)
        elif base in PRODUCTS:
            results = product(self, op, base)
        elif base in ("convolution", "_convolution"):
            results = convolution(self, op)
        elif base == "embedding":
            results = embedding(self, op)
        elif any(isinstance(self.state(t), Partial) for t in op.inputs):
            results = partial(self, op, base)
        else:
            results = self._carry(op, base)
        results = self._in_place(op, results)
        for tensor, state in zip(op.outputs, results, strict=False):
            self._set(tensor, state, op)
        if self.out.op_split[op.index] is None and any(
            isinstance(s, Split) for s in (*(self.state(t) for t in op.inputs), *results)
        ):
            self.mark(op, "elements")

    def _opaque(self, op: Op) -> list[State]:
        reason = "an opaque part reads it"
        for tensor in op.inputs:
            state = self.state(tensor)
            if isinstance(state, Split | Partial):
                raise Conflict(state.sources, reason)
            if isinstance(state, Weight):
                self.used_whole(state, reason)
        return [Whole()] * len(op.outputs)

    def _in_place(self, op: Op, results: list[State]) -> list[State]:
        """Operators in place return their target, and anew the tensor that it is a view of.

        A split written into a view of a whole tensor would leave the rest of it wrong.
        """
        if not op.name.split(".")[-2].endswith("_") or not op.inputs or not results:
            return results
        target, result = op.inputs[0], results[0]
        base = self.cls.tensors[target].base
        before = self.state(target)
        whole = self.state(base) if base != target else result
        if base != target and isinstance(result, Split | Partial) and type(before) is not type(result):
            whole = self._filled(op, target, base, result)
        return [result, *[whole] * (len(op.outputs) - 1)]

    def _filled(self, op: Op, target: int, base: int, result: Split | Partial) -> Split:
        """A new tensor becomes split as what is first written into a slice of it."""
        maker = next((o for o in self.cls.ops if target in o.outputs), None)
        fresh = next((o for o in self.cls.ops if base in o.outputs), None)
        made = fresh is not None and fresh.name.split(".")[-2] in ("new_empty", "new_zeros", "empty_like", "zeros_like")
        sliced = maker is not None and maker.name.startswith("aten.slice.") and maker.inputs == (base,)
        same = isinstance(result, Split) and self.sizes[target][result.dim] == self.sizes[base][result.dim]
        if not isinstance(result, Split) or not made or not sliced or not same or len(op.outputs) < 2:
            raise Conflict(result.sources, "it is written into a part of a whole tensor")
        return result

    def _set(self, tensor: int, state: State, op: Op) -> None:
        self.out.states[tensor] = state
        door = next((d for d in self.region_doors if inside(op.fqn, d)), None)
        if door is not None:
            self.made_in[tensor] = door
        if isinstance(state, Split):
            sizes = state.segments or (self.sizes[tensor][state.dim] // state.outer,)
            for size in sizes:
                self.limit(state.sources, size, self.label(op, size))

    def _carry(self, op: Op, base: str) -> list[State]:
        """Operators without a weight's product: views, element-wise, reductions."""
        splits = self.splits(op)
        if not splits:
            return self._whole(op, base)
        sources = frozenset[str]().union(*(s.sources for _, s in splits))
        (tensor, state), n = splits[0], len(op.outputs)
        if base.startswith("new_"):
            return [Whole(zero=base in _ZEROS)] * n
        if state.loss and base != "nll_loss_forward":
            raise Conflict(sources, f"{base} needs all the classes")
        shaped = self._shaped(op, base, tensor, state)
        if shaped is not None:
            return [shaped] * n
        if state.segments and packed_bias(self, op, base, state):
            return [state]
        if state.segments:
            raise Conflict(sources, f"{base} runs before its packed parts are set apart")
        if base in ("_log_softmax", "nll_loss_forward"):
            return loss(self, op, base, state)
        if base in POINTWISE:
            return [pointwise(self, op, sources, splits)] * n
        if base in REDUCTIONS and self._is_norm(op, base, tensor, state):
            return self._exchanged(op, state)
        if base in REDUCTIONS or base in ALONG_DIM:
            return [through_reduction(op, base, self.sizes, tensor, state)] * n
        if base in _BATCH_NORMS:
            return [per_channel_norm(self, op, base, state), *[Whole()] * (n - 1)]
        if base in CHANNELWISE:
            return [through_channels(op, base, len(self.sizes[tensor]), state)] * n
        if base in ("native_layer_norm", "_fused_rms_norm"):
            return [through_norm(op, self.sizes, tensor, state)] * n
        if state.outer > 1:
            raise Conflict(sources, f"{base} on merged dimensions")
        if base in ("cat", "stack"):
            return [
                through_join(op, base, self.sizes, splits, sources, lambda t, d: meet_whole(self, op, t, d, sources))
            ]
        raise Conflict(sources, f"{base} has no rule for split tensors")

    def _shaped(self, op: Op, base: str, tensor: int, state: Split) -> Split | None:
        """Operators that only move elements of their first input."""
        if base in VIEWS:
            return through_view(op, self.sizes, tensor, state)
        if base == "slice" and self.region(op) is not None and _every_other(op, self.sizes[tensor], state):
            return state  # plain local tensors: each rank's part holds as many of every kind
        if base in CUTS:
            features = self.layers[min(state.sources)].out_features
            return through_cut(op, base, self.sizes, tensor, state, self.cls.ops, features)
        if base in MOVES:
            return through_move(op, base, self.sizes, tensor, state)
        if base in ("view_as_complex", "view_as_real") and state.dim < len(self.sizes[tensor]) - 1:
            return state
        if tensor != op.inputs[0] or state.segments or state.outer > 1:
            return None
        if base in ("index", "index_select"):
            return through_index(op, base, self.sizes, tensor, state)
        if base == "constant_pad_nd":
            return through_pad(op, len(self.sizes[tensor]), state)
        if base == "roll":
            return through_roll(op, len(self.sizes[tensor]), state)
        if base == "repeat":
            return through_repeat(op, len(self.sizes[tensor]), state)
        if base in ("tril", "triu") and state.dim < len(self.sizes[tensor]) - 2:
            return state
        if base == "unfold" and dim_argument(op, 1, len(self.sizes[tensor]), 0) != state.dim:
            return state
        return None

    def _is_norm(self, op: Op, base: str, tensor: int, state: Split) -> bool:
        """Whether this is the mean of squares of a norm over a split dimension: small enough to be exchanged."""
        if base not in ("mean", "sum") or self.region(op) is not None or state.outer > 1:
            return False
        before, after = self.sizes[tensor], self.sizes[op.outputs[0]]
        dims = reduced_dims(op, base, len(before))
        if dims != {state.dim} or len(after) != len(before) or op.fqn in ("", "/"):
            return False
        return before[state.dim] >= _SMALL_NORM and state.dim == len(before) - 1

    def _exchanged(self, op: Op, state: Split) -> list[State]:
        for phase in ("forward", "backward"):
            self.collective(op, phase, "all_reduce", op.outputs[0])
        self.normed |= state.sources
        return [Whole()]

    def _whole(self, op: Op, base: str) -> list[State]:
        """No split input: whole, after a check that no split weight is used in a way that is not known."""
        for tensor in op.inputs:
            weight = self.state(tensor)
            if isinstance(weight, Weight):
                own = weight.name.endswith(".bias") and op.fqn in self.layers  # added after a gathered product
                self.used_whole(weight, f"{base} uses its weight directly", own)
        if base == "_log_softmax":
            self.out.whole_loss = True
        inputs = [s for t in op.inputs if isinstance(s := self.state(t), Whole)]
        summed = inputs[0].summed_from if len(op.inputs) == 1 and inputs else frozenset[str]()
        zero = base in _ZEROS or (base in _KEEPS_ZERO and bool(inputs) and inputs[0].zero)
        return [Whole(summed, zero)] * len(op.outputs)


def _every_other(op: Op, shape: tuple[int, ...], state: Split) -> bool:
    """x[..., start::step] along the split, of a size that step divides."""
    step = op.args[4] if len(op.args) > 4 else 1
    along = dim_argument(op, 1, len(shape), 0)
    return step > 1 and along == state.dim and shape[along] % step == 0 and not state.segments and state.outer == 1


def live_operators(walk: Walk) -> set[int]:
    """Operators whose results (or changes in place) are read or learnt from: others constrain nothing."""
    tensors = walk.cls.tensors
    if not walk.cls.outputs and not any(op.backward for op in walk.cls.ops):
        return {op.index for op in walk.cls.ops}
    wanted = {tensors[t].base for t in walk.cls.outputs} | set(walk.cls.outputs)
    live: set[int] = set()
    for op in reversed(walk.cls.ops):
        written = {tensors[t].base for t in op.outputs} | set(op.outputs)
        if written & wanted or op.backward or not op.outputs:
            live.add(op.index)
            wanted |= set(op.inputs) | {tensors[t].base for t in op.inputs}
    return live
