"""Every rule of the sharding analysis against two ranks' own arithmetic: their parts, joined, are the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tpplan.planner.sharding_rules import ALONG_DIM, CHANNELWISE, POINTWISE, REDUCTIONS
from tpplan.planner.sharding_shapes import CUTS, MOVES, VIEWS
from tpplan.planner.sharding_states import Conflict, Decision, Layer, Partial, Split, Weight, Whole

from .sharding_cases import TP, Claim, assert_legal, claim, local_inputs, local_shape, part, split

aten = torch.ops.aten
few = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# How each element-wise operator is called: x and y are tensors of one broadcast shape.
POINTWISE_CALLS: dict[str, tuple[Any, Callable[[Any, Any], tuple[Any, ...]]]] = {
    **{
        name: (getattr(aten, name).default, lambda x, y: (x,))
        for name in """abs alias ceil celu clone cos detach elu erf erfc exp exp2 expm1 floor gelu hardsigmoid
hardswish hardtanh isinf isnan leaky_relu log log10 log1p log2 mish nan_to_num neg reciprocal
relu round rsqrt sigmoid sign silu sin softplus sqrt square tan tanh trunc zeros_like ones_like
_to_copy logit isfinite contiguous log_sigmoid_forward logical_not lift_fresh""".split()  # noqa: SIM905
    },
    **{
        name: (getattr(aten, name).Tensor, lambda x, y: (x, y))
        for name in "add sub mul div eq ne lt le gt ge remainder rsub xlogy fmod".split()  # noqa: SIM905
    },
    **{
        name: (getattr(aten, name).default, lambda x, y: (x, y))
        for name in "maximum minimum logical_and logical_or floor_divide copy".split()  # noqa: SIM905
    },
    **{
        f"bitwise_{name}": (getattr(aten, f"bitwise_{name}").Tensor, lambda x, y: (x > 1, y > 1))
        for name in ("and", "or", "xor")
    },
    "bitwise_not": (aten.bitwise_not.default, lambda x, y: (x > 1,)),
    "addcdiv": (aten.addcdiv.default, lambda x, y: (x, y, x)),
    "addcmul": (aten.addcmul.default, lambda x, y: (x, y, x)),
    "clamp": (aten.clamp.default, lambda x, y: (x, 0.7, 1.2)),
    "clamp_min": (aten.clamp_min.default, lambda x, y: (x, 0.7)),
    "clamp_max": (aten.clamp_max.default, lambda x, y: (x, 1.2)),
    "fill": (aten.fill.Scalar, lambda x, y: (x, 2.0)),
    "full_like": (aten.full_like.default, lambda x, y: (x, 2.0)),
    "lerp": (aten.lerp.Tensor, lambda x, y: (x, y, x)),
    "masked_fill": (aten.masked_fill.Scalar, lambda x, y: (x, y > 1, -1.0)),
    "pow": (aten.pow.Tensor_Scalar, lambda x, y: (x, 3)),
    "threshold": (aten.threshold.default, lambda x, y: (x, 0.8, 0.0)),
    "where": (aten.where.self, lambda x, y: (y > 1, x, y)),
    "zero": (aten.zero.default, lambda x, y: (x,)),
}
# Their values are chance (or memory as it was): only the shape is claimed, and that each element stands alone.
RANDOM = {"bernoulli", "native_dropout", "empty_like", "rand_like", "randn_like"}

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def numbers(shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.6 + 0.6


def test_every_element_wise_operator_is_tried() -> None:
    assert POINTWISE_CALLS.keys() | RANDOM == POINTWISE


@pytest.mark.parametrize("name", sorted(POINTWISE_CALLS))
@given(shape=shapes, data=st.data())
@few
def test_element_wise(name: str, shape: list[int], data: st.DataObject) -> None:
    call, arguments = POINTWISE_CALLS[name]
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] = 2 * data.draw(st.integers(1, 3))
    other = [1 if data.draw(st.booleans()) else n for n in shape]
    if name == "copy":
        other = shape
    x, y = numbers(shape), numbers(other)
    args = arguments(x, y)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    splits = {i: split(dim) for i, t in enumerate(tensors) if t.shape == x.shape}
    for whole in range(1, len(tensors)):  # some operands whole: each rank takes its part
        if len(splits) > 1 and whole in splits and data.draw(st.booleans()):
            del splits[whole]
    found = claim(call, args, splits)

    def run(inputs: list[torch.Tensor], rank: int) -> Any:
        values = iter(inputs)
        return call(*(next(values) if isinstance(a, torch.Tensor) else a for a in args))

    assert_legal(found, run)


def tensor_call(found: Claim, call: Any, rest: Sequence[Any], **kwargs: Any) -> None:
    assert_legal(found, lambda inputs, rank: call(*inputs, *rest, **kwargs))


REDUCTION_CALLS = {
    "mean": aten.mean.dim,
    "sum": aten.sum.dim_IntList,
    "amax": aten.amax.default,
    "amin": aten.amin.default,
    "var": aten.var.correction,
    "var_mean": aten.var_mean.correction,
    "std": aten.std.correction,
    "logsumexp": aten.logsumexp.default,
    "any": aten.any.dims,
    "all": aten.all.dims,
}


def test_every_reduction_is_tried() -> None:
    assert REDUCTION_CALLS.keys() | {"prod", "linalg_vector_norm"} == REDUCTIONS


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
@pytest.mark.parametrize(("dim", "along"), [(0, (2,)), (1, (0, 2)), (2, (0,)), (2, (-2,)), (1, (1,)), (0, (0, 1))])
@pytest.mark.parametrize("keep", [False, True])
def test_reductions(name: str, dim: int, along: tuple[int, ...], keep: bool) -> None:
    x, rest, kwargs = numbers((4, 6, 2)), [along], {}
    call = REDUCTION_CALLS.get(name)
    if name == "prod":
        call, rest = aten.prod.dim_int, [along[0]]
    elif name == "linalg_vector_norm":
        call, rest = aten.linalg_vector_norm.default, [2.0, along]
    if name in ("var", "std", "var_mean"):
        kwargs["keepdim"] = keep
    else:
        rest.append(keep)
    touched = {d % 3 for d in (along[:1] if name == "prod" else along)}
    if dim in touched:
        with pytest.raises(Conflict):
            claim(call, (x, *rest), {0: split(dim)}, **kwargs)
        return
    tensor_call(claim(call, (x, *rest), {0: split(dim)}, **kwargs), call, rest, **kwargs)


ALONG_CALLS: dict[str, tuple[Any, Callable[[int], list[Any]]]] = {
    "_softmax": (aten._softmax.default, lambda d: [d, False]),
    "_log_softmax": (aten._log_softmax.default, lambda d: [d, False]),
    "_safe_softmax": (aten._safe_softmax.default, lambda d: [d]),
    "cumsum": (aten.cumsum.default, lambda d: [d]),
    "cumprod": (aten.cumprod.default, lambda d: [d]),
    "sort": (aten.sort.default, lambda d: [d]),
    "topk": (aten.topk.default, lambda d: [2, d]),
    "flip": (aten.flip.default, lambda d: [(d,)]),
    "argmax": (aten.argmax.default, lambda d: [d]),
    "argmin": (aten.argmin.default, lambda d: [d]),
    "max": (aten.max.dim, lambda d: [d]),
    "min": (aten.min.dim, lambda d: [d]),
}


def test_every_operator_along_a_dimension_is_tried() -> None:
    assert ALONG_CALLS.keys() == ALONG_DIM


@pytest.mark.parametrize("name", sorted(ALONG_CALLS))
@pytest.mark.parametrize(("dim", "along"), [(0, 2), (1, -1), (2, 0), (0, -2), (1, 1), (2, -1)])
def test_along_a_dimension(name: str, dim: int, along: int) -> None:
    call, arguments = ALONG_CALLS[name]
    x = numbers((4, 6, 2))
    if along % 3 == dim and name != "_log_softmax":
        with pytest.raises(Conflict):
            claim(call, (x, *arguments(along)), {0: split(dim)})
        return
    found = claim(call, (x, *arguments(along)), {0: split(dim)})
    if along % 3 == dim:  # the loss finishes it
        assert isinstance(found.results[0], Split)
        assert found.results[0].loss
        return
    tensor_call(found, call, arguments(along))


@given(data=st.data())
@settings(few, max_examples=150)
def test_views(data: st.DataObject) -> None:
    """Any view that a rule lets pass is one that ranks can do on their parts, merged dimensions included."""
    factors = data.draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4))

    def grouped() -> list[int]:
        shape, last = [], 1
        for factor in factors:
            last *= factor
            if data.draw(st.booleans()):
                shape.append(last)
                last = 1
        return shape + ([last] if last > 1 else [])

    before, after = grouped(), grouped()
    dim = data.draw(st.integers(0, len(before) - 1))
    assume(before[dim] % TP == 0)
    x = torch.arange(math.prod(before)).reshape(before)
    name = data.draw(st.sampled_from(sorted(VIEWS - {"_reshape_alias", "_unsafe_view"})))
    call = aten.reshape.default if name == "reshape" else aten.view.default
    try:
        found = claim(call, (x, after), {0: split(dim)})
    except Conflict:
        return
    state = found.results[0]
    assert isinstance(state, Split)
    assume(after[state.dim] // state.outer % TP == 0)
    back = claim(call, (x.reshape(after), before), {0: state}).results[0]
    assert isinstance(back, Split)
    assert (back.dim, back.outer) == (dim, 1)
    assert_legal(found, lambda inputs, rank: call(inputs[0], local_shape(after, state)))


MOVE_CALLS: dict[str, list[tuple[Any, list[Any]]]] = {
    "transpose": [(aten.transpose.int, [0, 2]), (aten.transpose.int, [-1, 1])],
    "permute": [(aten.permute.default, [(2, 0, 1, 3)]), (aten.permute.default, [(-1, 1, 0, 2)])],
    "unsqueeze": [(aten.unsqueeze.default, [d]) for d in (0, 2, -1)],
    "squeeze": [(aten.squeeze.dims, [(2,)]), (aten.squeeze.dim, [0]), (aten.squeeze.default, [])],
}


@pytest.mark.parametrize("name", sorted(MOVES - {"t", "expand"}))
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_moves(name: str, dim: int) -> None:
    for call, rest in MOVE_CALLS[name]:
        tensor_call(claim(call, (numbers((4, 6, 1, 4)), *rest), {0: split(dim)}), call, rest)


@pytest.mark.parametrize("dim", [0, 1])
def test_transposed_matrices_and_expansions(dim: int) -> None:
    x = numbers((4, 6))
    tensor_call(claim(aten.t.default, (x,), {0: split(dim)}), aten.t.default, [])
    for shape, source in (((3, 4, 6), x), ((4, 5, 6), x.reshape(4, 1, 6))):
        own = dim if source.ndim == 2 or dim == 0 else 2
        found = claim(aten.expand.default, (source, shape), {0: split(own)})
        state = found.results[0]
        assert_legal(found, lambda inputs, rank, s=shape, w=state: aten.expand(inputs[0], local_shape(s, w)))


def test_every_cut_is_tried() -> None:
    assert {"split", "split_with_sizes", "unsafe_split", "slice", "select", "unbind"} == CUTS


@pytest.mark.parametrize(
    ("call", "rest"),
    [
        (aten.split.Tensor, [3, 1]),
        (aten.split_with_sizes.default, [(2, 4), 1]),
        (aten.unsafe_split.Tensor, [2, -2]),
        (aten.slice.Tensor, [1, 1, 4]),
        (aten.slice.Tensor, [1, 0, 6, 2]),
        (aten.select.int, [1, 3]),
        (aten.unbind.int, [1]),
    ],
)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_cuts(call: Any, rest: list[Any], dim: int) -> None:
    x = numbers((4, 6, 2))
    if dim == 1:
        with pytest.raises(Conflict):
            claim(call, (x, *rest), {0: split(1)})
    else:
        tensor_call(claim(call, (x, *rest), {0: split(dim)}), call, rest)


def test_a_cut_across_a_split_offers_its_parts() -> None:
    with pytest.raises(Conflict) as caught:
        claim(aten.split_with_sizes.default, (numbers((3, 8)), (4, 2, 2), 1), {0: split(1)})
    assert caught.value.packed == (4, 2, 2)


@pytest.mark.parametrize(
    ("call", "rest", "stopped"),
    [
        (aten.constant_pad_nd.default, [(1, 2)], 2),
        (aten.constant_pad_nd.default, [(0, 0, 1, 1)], 1),
        (aten.roll.default, [(1,), (1,)], 1),
        (aten.repeat.default, [(1, 2, 1)], 1),
        (aten.tril.default, [], 1),
        (aten.triu.default, [1], 2),
        (aten.unfold.default, [1, 3, 1], 1),
        (aten.index_select.default, [1, torch.tensor([3, 0])], 1),
        (aten.native_layer_norm.default, [(2,), None, None, 1e-5], 2),
    ],
)
def test_movers_of_elements(call: Any, rest: list[Any], stopped: int) -> None:
    x = numbers((4, 6, 2))
    with pytest.raises(Conflict):
        claim(call, (x, *rest), {0: split(stopped)})
    found = claim(call, (x, *rest), {0: split(0)})
    assert_legal(found, lambda inputs, rank: call(inputs[0], *rest))


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_rows_picked_by_an_index(dim: int, shape: tuple[int, ...]) -> None:
    index = torch.randint(0, 6, shape)
    x = numbers((4, 6, 2))
    found = claim(aten.index.Tensor, (x, [None, index]), {0: split(dim)})
    assert_legal(found, lambda inputs, rank: aten.index.Tensor(inputs[0], [None, inputs[1]]))
    with pytest.raises(Conflict):
        claim(aten.index.Tensor, (x, [None, index]), {0: split(1)})


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_joins(dim: int, whole: bool) -> None:
    a, b = numbers((4, 6, 2)), numbers((4, 6, 2)) + 1
    splits = {0: split(dim)} if whole else {0: split(dim), 1: split(dim)}
    for call, along in ((aten.cat.default, 2), (aten.stack.default, 0), (aten.stack.default, -1)):
        found = claim(call, ([a, b], along), splits)
        assert_legal(found, lambda inputs, rank, c=call, d=along: c(inputs, d))
    with pytest.raises(Conflict):
        claim(aten.cat.default, ([a, b], dim), splits)


# products


def raw(name: str, shape: Sequence[int], region: bool = False) -> Layer:
    return Layer(f"m:{name}", name, "raw", shape[0], math.prod(shape), "m", region)


@pytest.mark.parametrize("biased", [False, True])
def test_matrix_products_with_weights(biased: bool) -> None:
    x, w, b = numbers((3, 4)), numbers((4, 6)), numbers((6,))
    call = aten.addmm.default if biased else aten.mm.default
    args = (b, x, w) if biased else (x, w)
    at = int(biased)
    weights = {at + 1: Weight("w", (1, 0)), **({0: Weight("b", (0,))} if biased else {})}
    layers = [raw("w", (6, 4))]
    col = claim(call, args, {}, weights, layers=layers)
    assert col.walk.out.raw["w"] == (0, ())
    assert_legal(col, lambda inputs, rank: call(*inputs))
    row = claim(call, args, {at: split(1)}, weights, layers=layers)
    assert row.walk.out.raw == {"w": (1, ())}
    assert isinstance(row.results[0], Whole)
    parts = [local_inputs(row, rank) for rank in range(TP)]
    total = sum(p[at] @ p[at + 1] for p in parts) + (b if biased else 0)
    torch.testing.assert_close(total, row.outputs[0])
    assert [c.collective for c in row.walk.out.collectives] == ["all_reduce"]


@pytest.mark.parametrize("call", [aten.bmm.default, aten.baddbmm.default])
def test_experts_split_inside(call: Any) -> None:
    """col then row in the layout of experts, [expert, in, out]; the sum is finished at the region's door."""
    x, w, bias = numbers((3, 5, 4)), numbers((3, 4, 6)), numbers((3, 1, 6))
    args = (x, w) if call is aten.bmm.default else (bias, x, w)
    at = len(args) - 2
    weights = {at + 1: Weight("w", (0, 1, 2)), **({0: Weight("b", (0, None, 1))} if at else {})}
    layers = [raw("w", (3, 4, 6), region=True)]
    col = claim(call, args, {}, weights, layers=layers)
    assert col.walk.out.raw["w"] == (2, ())
    assert_legal(col, lambda inputs, rank: call(*inputs))
    row = claim(call, args, {at: split(2)}, weights, layers=layers)
    assert isinstance(row.results[0], Partial)
    assert row.walk.out.regions == {"m": {"b"} if at else set()}

    def shared(inputs: list[torch.Tensor], rank: int) -> torch.Tensor:
        return call(inputs[0] / TP, *inputs[1:]) if at else call(*inputs)

    assert_legal(row, shared)


@pytest.mark.skipif(not hasattr(aten, "_grouped_mm"), reason="this torch has no grouped product")
def test_grouped_products() -> None:
    x, w = numbers((8, 16)).bfloat16(), numbers((2, 16, 32)).bfloat16()
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    weights, layers = {1: Weight("w", (0, 2, 1))}, [raw("w", (2, 32, 16), region=True)]
    col = claim(aten._grouped_mm.default, (x, w, offsets), {}, weights, layers=layers)
    assert col.walk.out.raw["w"] == (1, ())
    assert_legal(col, lambda inputs, rank: aten._grouped_mm.default(*inputs))
    row = claim(aten._grouped_mm.default, (x, w, offsets), {0: split(1)}, weights, layers=layers)
    assert row.walk.out.raw["w"] == (2, ())
    parts = [aten._grouped_mm.default(*local_inputs(row, rank)).float() for rank in range(TP)]
    torch.testing.assert_close(sum(parts), row.outputs[0].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("outer", [1, 3])
def test_batched_products_of_heads(outer: int) -> None:
    a, b, c = numbers((6 * outer, 2, 4)), numbers((6 * outer, 4, 5)), numbers((6 * outer, 2, 5))
    heads = split(0, outer)
    found = claim(aten.bmm.default, (a, b), {0: heads, 1: heads})
    assert_legal(found, lambda inputs, rank: aten.bmm(*inputs))
    found = claim(aten.baddbmm.default, (c, a, b), {0: heads, 1: heads, 2: heads})
    assert_legal(found, lambda inputs, rank: aten.baddbmm(*inputs))
    with pytest.raises(Conflict):
        claim(aten.bmm.default, (a, b), {0: split(2), 1: split(1)})


def test_products_split_along_a_free_dimension() -> None:
    a, b = numbers((3, 2, 4)), numbers((3, 4, 6))
    for splits in ({0: split(1)}, {1: split(2)}):
        found = claim(aten.bmm.default, (a, b), splits)
        assert_legal(found, lambda inputs, rank: aten.bmm(*inputs))


CONVOLUTIONS = {1: aten.convolution.default, 2: aten.convolution.default, 3: aten.convolution.default}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(rank: int, transposed: bool) -> None:
    x = numbers((2, 4, *(5,) * rank))
    w = numbers((4, 6, *(3,) * rank)) if transposed else numbers((6, 4, *(3,) * rank))
    tail = [(1,) * rank, (1,) * rank, (1,) * rank, transposed, (0,) * rank, 1]
    layer = Layer("m", "m.weight", "convolution", 6, w.numel(), "m")
    weight = Weight("m.weight", tuple(range(rank + 2)))
    bias = numbers((6,))
    out, into = (1, 0) if transposed else (0, 1)
    call = aten.convolution.default
    col = claim(call, (x, w, bias, *tail), {}, {1: weight}, layers=[layer])
    assert col.results[0] == Split(1, frozenset({"m"}))
    cols = [call(x, part(w, out, r), part(bias, 0, r), *tail) for r in range(TP)]
    torch.testing.assert_close(torch.cat(cols, 1), col.outputs[0])
    row = claim(call, (x, w, bias, *tail), {0: split(1)}, {1: weight}, layers=[layer])
    assert isinstance(row.results[0], Whole)
    rows = [call(part(x, 1, r), part(w, into, r), None, *tail) for r in range(TP)]
    torch.testing.assert_close(sum(rows) + bias.reshape(-1, *(1,) * rank), row.outputs[0])


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_follow_their_channels(groups: int) -> None:
    x, w = numbers((2, 4, 5, 5)), numbers((8, 4 // groups, 3, 3))
    layer = Layer("m", "m.weight", "convolution", 8, w.numel(), "m")
    tail = [(1, 1), (1, 1), (1, 1), False, (0, 0)]
    call = aten.convolution.default
    found = claim(
        call, (x, w, None, *tail, groups), {0: split(1)}, {1: Weight("m.weight", (0, 1, 2, 3))}, layers=[layer]
    )
    assert found.walk.out.channels == {"m"}
    parts = [call(part(x, 1, r), part(w, 0, r), None, *tail, groups // TP) for r in range(TP)]
    torch.testing.assert_close(torch.cat(parts, 1), found.outputs[0])


POOLS: dict[str, tuple[Any, list[Any], int]] = {
    "max_pool2d_with_indices": (aten.max_pool2d_with_indices.default, [(2, 2), (2, 2)], 2),
    "max_pool3d_with_indices": (aten.max_pool3d_with_indices.default, [(2, 2, 2)], 3),
    "avg_pool1d": (aten.avg_pool1d.default, [(2,)], 1),
    "avg_pool2d": (aten.avg_pool2d.default, [(2, 2)], 2),
    "avg_pool3d": (aten.avg_pool3d.default, [(2, 2, 2)], 3),
    "_adaptive_avg_pool2d": (aten._adaptive_avg_pool2d.default, [(2, 2)], 2),
    "_adaptive_avg_pool3d": (aten._adaptive_avg_pool3d.default, [(2, 2, 2)], 3),
    "adaptive_max_pool2d": (aten.adaptive_max_pool2d.default, [(2, 2)], 2),
    "upsample_nearest1d": (aten.upsample_nearest1d.default, [(8,)], 1),
    "upsample_nearest2d": (aten.upsample_nearest2d.default, [(8, 8)], 2),
    "upsample_bilinear2d": (aten.upsample_bilinear2d.default, [(8, 8), False], 2),
    "upsample_bicubic2d": (aten.upsample_bicubic2d.default, [(8, 8), False], 2),
    "_upsample_nearest_exact2d": (aten._upsample_nearest_exact2d.default, [(8, 8)], 2),
    "reflection_pad1d": (aten.reflection_pad1d.default, [(1, 1)], 1),
    "reflection_pad2d": (aten.reflection_pad2d.default, [(1, 1, 1, 1)], 2),
    "replication_pad2d": (aten.replication_pad2d.default, [(1, 1, 1, 1)], 2),
}


def test_every_channel_wise_operator_is_tried() -> None:
    assert POOLS.keys() == CHANNELWISE


@pytest.mark.parametrize("name", sorted(POOLS))
def test_pooling_and_resampling(name: str) -> None:
    call, rest, spatial = POOLS[name]
    x = numbers((2, 6, *(4,) * spatial))
    tensor_call(claim(call, (x, *rest), {0: split(1)}), call, rest)
    with pytest.raises(Conflict):
        claim(call, (x, *rest), {0: split(2)})


def test_norms_of_channels() -> None:
    x, w, b = numbers((3, 8, 5)), numbers((8,)), numbers((8,))
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    call = aten.native_batch_norm.default
    found = claim(call, (x, w, b, mean, var, True, 0.1, 1e-5), {0: split(1)}, module_type="BatchNorm1d")
    locals_ = [
        call(*(part(t, 1 if t.ndim == 3 else 0, r) for t in (x, w, b, mean, var)), True, 0.1, 1e-5)[0]
        for r in range(TP)
    ]
    torch.testing.assert_close(torch.cat(locals_, 1), found.outputs[0])
    assert found.walk.out.channels == {"m"}
    group = aten.native_group_norm.default
    found = claim(group, (x, w, b, 3, 8, 5, 4, 1e-5), {0: split(1)}, module_type="GroupNorm")
    parts = [group(part(x, 1, r), part(w, 0, r), part(b, 0, r), 3, 4, 5, 2, 1e-5)[0] for r in range(TP)]
    torch.testing.assert_close(torch.cat(parts, 1), found.outputs[0])
    assert (frozenset({"up"}), 4) in {(s, n) for s, n, _ in found.walk.out.limits}


def test_a_norm_written_out_exchanges_its_mean() -> None:
    x = numbers((3, 16))
    found = claim(aten.mean.dim, (x, (-1,), True), {0: split(1)})
    assert isinstance(found.results[0], Whole)
    assert [(c.phase, c.collective) for c in found.walk.out.collectives] == [
        ("forward", "all_reduce"),
        ("backward", "all_reduce"),
    ]
    torch.testing.assert_close(sum(part(x, 1, r).mean(1, True) for r in range(TP)) / TP, found.outputs[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_heads(kv_heads: int) -> None:
    q = numbers((2, 4, 3, 8)).float()
    k, v = numbers((2, kv_heads, 3, 8)).float(), numbers((2, kv_heads, 3, 8)).float() + 1
    call = aten._scaled_dot_product_flash_attention_for_cpu.default
    shared = kv_heads == 1
    splits = {0: split(1)} if shared else {i: split(1) for i in range(3)}
    wide = (lambda t, n: t.repeat_interleave(n // t.shape[1], 1)) if kv_heads < 4 else (lambda t, n: t)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return call(q, wide(k, q.shape[1]), wide(v, q.shape[1]))

    attend.__name__ = "attend"
    named = type(
        "Attention", (), {"__call__": staticmethod(attend), "__str__": lambda self: "aten._scaled_dot_product"}
    )
    found = claim(named(), (q, k, v), splits)
    parts = [attend(*local_inputs(found, r))[0] for r in range(TP)]
    torch.testing.assert_close(torch.cat(parts, 1), found.outputs[0])
    limits = {n for _, n, _ in found.walk.out.limits}
    assert (kv_heads in limits) != shared


def test_an_embedding_sums_the_rows_it_holds() -> None:
    table, ids = numbers((8, 3)), torch.tensor([[1, 6], [7, 0]])
    layer = Layer("m", "m.weight", "embedding", 8, 24, "m")
    weights = {0: Weight("m.weight", (0, 1))}
    found = claim(aten.embedding.default, (table, ids), {}, weights, layers=[layer])
    assert isinstance(found.results[0], Whole)  # col is no style of an embedding: it stays whole
    found.walk.decisions = {**found.walk.decisions, "m": Decision("vocab")}
    found.walk.step(found.walk.cls.ops[0])
    assert [c.collective for c in found.walk.out.collectives] == ["all_reduce"]
    total = torch.zeros(2, 2, 3, dtype=torch.float64)
    for rank in range(TP):
        mine = (ids // 4) == rank
        total += table[(ids % 4) + 4 * rank] * mine.unsqueeze(-1)
    torch.testing.assert_close(total, found.outputs[0])


def test_a_loss_on_split_classes() -> None:
    logits, target = numbers((5, 8)), torch.tensor([0, 3, 7, 4, 1])
    first = claim(aten._log_softmax.default, (logits, 1, False), {0: split(1)})
    state = first.results[0]
    assert isinstance(state, Split)
    second = claim(aten.nll_loss_forward.default, (first.outputs[0], target, None, 1, -100), {0: state})
    assert [c.collective for c in second.walk.out.collectives] == ["all_reduce"] * 3  # maximum, sum, the target's
    parts = [part(logits, 1, r) for r in range(TP)]
    top = torch.stack([p.amax(1) for p in parts]).amax(0)
    total = sum((p - top[:, None]).exp().sum(1) for p in parts)
    own = sum(((target // 4) == r) * (parts[r].gather(1, (target % 4)[:, None])[:, 0] - top) for r in range(TP))
    torch.testing.assert_close((total.log() - own).mean(), second.outputs[0])


def test_a_bias_added_to_a_fused_projection_is_packed_alike() -> None:
    x, b = numbers((3, 12)), numbers((12,))
    packed = Split(1, frozenset({"up"}), segments=(4, 8))
    found = claim(aten.add.Tensor, (x, b), {0: packed}, {1: Weight("b", (0,))})
    assert found.results[0] == packed
    assert found.walk.out.raw == {"b": (0, (4, 8))}
    with pytest.raises(Conflict):
        claim(aten.add.Tensor, (x, b), {0: packed})  # a whole activation would have to be permuted
