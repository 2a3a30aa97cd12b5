"""What one operator call costs in FLOPs and least bytes, and which kind of kernel the cost model prices it as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .graph import Affine, Kernel
from .rnn import is_rnn, rnn_products

aten = torch.ops.aten

_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": False,
    "_scaled_dot_product_flash_attention": False,
    "_scaled_dot_product_efficient_attention": False,
    "_scaled_dot_product_cudnn_attention": False,
    "_scaled_dot_product_attention": False,
    "_scaled_dot_product_attention_backward": True,
    "_scaled_dot_product_flash_attention_for_cpu_backward": True,
    "_scaled_dot_product_flash_attention_backward": True,
    "_scaled_dot_product_efficient_attention_backward": True,
    "_scaled_dot_product_cudnn_attention_backward": True,
}
_CONVOLUTION = {"convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "_slow_conv2d_forward"}
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}
_GEMM = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}

_VECTOR = {"mv", "addmv", "dot", "vdot", "addbmm"}  # products that torch's counter leaves out

# Operators that allocate or rename memory without a kernel, beside those whose schema declares a view.
_FREE = {"_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_strided", "empty_like", "new_empty"}
_FREE |= {"new_empty_strided", "_local_scalar_dense", "set_", "resize_", "is_same_size", "_reshape_alias"}

# Arguments that a perfect kernel needs for their shape only, and writes that do not read their target.
_NOT_READ: Mapping[str, tuple[int, ...]] = {
    "nll_loss_backward": (1,),
    "nll_loss2d_backward": (1,),
    "zeros_like": (0,),
    "ones_like": (0,),
    "full_like": (0,),
    "rand_like": (0,),
    "randn_like": (0,),
    "new_zeros": (0,),
    "new_ones": (0,),
    "new_full": (0,),
    "copy_": (0,),
    "fill_": (0,),
    "zero_": (0,),
    "bernoulli_": (0,),
    "uniform_": (0,),
    "normal_": (0,),
}

# Operators that read, from their first argument, only as many elements as they write.
_GATHERS = {"index", "gather", "index_select", "embedding", "nll_loss_forward", "nll_loss2d_forward", "take"}


_NONE = Affine()  # of FLOPs or bytes

# Shapes of other libraries' operators may follow from more than their arguments.
_KNOWN_SHAPES = {"aten", "tpplan"}
_BY_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


@dataclass(frozen=True, slots=True)
class OpInfo:
    """What the schema of one overload says, read once.

    `makes_new`: its results are new tensors, of shapes that follow from those of its arguments.
    """

    name: str
    base: str
    namespace: str
    is_view: bool
    written: tuple[int, ...]
    packet: Any
    makes_new: bool


def op_info(func: Any) -> OpInfo:
    """Read the schema of an operator overload."""
    schema = func._schema
    written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    namespace, _, base = schema.name.partition("::")
    makes_new = namespace in _KNOWN_SHAPES and not (views or written or _BY_DATA & set(func.tags))
    return OpInfo(str(func), base, namespace, views and not written, written, func._overloadpacket, makes_new)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements of `tensor`: an expanded dimension (stride 0) counts once."""
    n = tensor.dtype.itemsize
    if tensor.layout is not torch.strided:
        return 0  # only wraps indices and values, which are tensors of their own
    if 0 not in (strides := tensor.stride()):
        return n * tensor.numel()
    for size, stride in zip(tensor.shape, strides, strict=True):
        if stride != 0 or size == 0:
            n *= size
    return n


def _region(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def least_bytes(info: OpInfo, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> int:
    """Distinct inputs read once plus outputs written once, in bytes."""
    skipped = _NOT_READ.get(info.base, ())
    read: dict[tuple[Any, ...], int] = {}
    written = sum(_bytes(t) for t in outputs)
    for position, arg in enumerate(args):
        if position in skipped:
            continue
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(tensor, torch.Tensor):
                n = _bytes(tensor)
                if position == 0 and info.base in _GATHERS and outputs:
                    n = outputs[0].numel() * tensor.dtype.itemsize
                read[_region(tensor)] = n
    return sum(read.values()) + written


def _attention_dims(q: torch.Tensor, k: torch.Tensor, causal: bool) -> tuple[int, ...]:
    batch, heads, q_len, head_dim = q.shape
    return (batch, heads, k.shape[1], q_len, k.shape[2], head_dim, int(causal))


def attention_flops(q: Any, k: Any, v: Any, backward: bool) -> int:
    """FLOPs of attention as torch counts them: not halved for causality, scores recomputed in backward.

    forward = 2 b h s_q s_kv (d_qk + d_v); backward = 2 b h s_q s_kv (3 d_qk + 2 d_v).

    Shapes are [b, h, s, d]. Source: FlashAttention-2 (arXiv:2307.08691), section 3: five products in backward.
    """
    per_d = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    d_qk, d_v = q.shape[3], v.shape[3]
    return per_d * (3 * d_qk + 2 * d_v if backward else d_qk + d_v)


def _attention(info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any], make: Callable[..., Kernel]) -> Kernel:
    backward = _ATTENTION[info.base]
    q, k, v = args[1:4] if backward else args[:3]
    names = [a.name for a in getattr(info.packet, info.name.rsplit(".", 1)[-1])._schema.arguments]
    place = names.index("is_causal")
    causal = kwargs["is_causal"] if "is_causal" in kwargs else len(args) > place and args[place]
    dims = _attention_dims(q, k, bool(causal))
    return make("attention", attention_flops(q, k, v, backward), dims, q.dtype)


def _gemm_dims(base: str, args: Sequence[Any]) -> tuple[int, ...]:
    a, b = args[1:3] if base in ("addmm", "baddbmm") else args[:2]
    if a.dim() == 3:
        return (a.shape[0], a.shape[1], b.shape[2], a.shape[2])
    return (1, a.shape[0], b.shape[1], a.shape[1])


def _vector_dims(base: str, args: Sequence[Any]) -> tuple[int, ...]:
    """(batch, m, n, k) of products with vectors, and of a sum of products."""
    a, b = args[1:3] if base in ("addmv", "addbmm") else args[:2]
    if base in ("dot", "vdot"):
        return (1, 1, 1, a.shape[0])
    if base == "addbmm":
        return (1, a.shape[1], b.shape[2], a.shape[0] * a.shape[2])
    return (1, a.shape[0], 1, a.shape[1])


def _grouped_dims(a: Any, b: Any, groups: int) -> tuple[float, ...]:
    """(groups, m, n, k) of a grouped product (experts); the dimension that is split is taken as split evenly."""
    if a.dim() == 2 and b.dim() == 3:
        return (groups, a.shape[0] / groups, b.shape[2], a.shape[1])
    if a.dim() == 2:
        return (groups, a.shape[0], b.shape[1], a.shape[1] / groups)
    if b.dim() == 2:
        return (groups, a.shape[1], b.shape[1] / groups, a.shape[2])
    return (groups, a.shape[1], b.shape[2], a.shape[2])


def _grouped_backward(info: OpInfo, args: Sequence[Any], outputs: Sequence[Any]) -> list[Kernel]:
    """Both products of a grouped product's backward that is one operator (x, weight, offsets, gradient)."""
    x, weight, _, grad = args
    groups, k, n = weight.shape
    tokens = x.shape[0] / groups
    flops = Affine(2 * x.shape[0] * k * n)
    found = []
    for wrt, dims, other, made in (
        ("input", (groups, tokens, k, n), weight, outputs[0]),
        ("weight", (groups, k, n, tokens), x, outputs[1]),
    ):
        moved = Affine(_bytes(grad) + _bytes(other) + _bytes(made))
        found.append(Kernel(info.name, "gemm", flops, moved, tuple(Affine(d) for d in dims), _dtype(x), wrt))
    return found


def _convolution_flops(x: Any, weight: Any, output: Any, transposed: bool) -> int:
    """2 x multiply-adds of one convolution: per output element (per input element if transposed)."""
    n = x.numel() if transposed else output.numel()
    per_element = 2
    for size in weight.shape[1:]:
        per_element *= size
    return n * per_element


def _convolution_dims(x: Any, weight: Any, output: Any, groups: int, transposed: bool) -> tuple[int, ...]:
    """(n, c_in, c_out, groups, output elements of a channel, weight elements of a channel pair, transposed 0/1)."""
    spatial = output.shape[2:].numel()
    return (x.shape[0], x.shape[1], output.shape[1], groups, spatial, weight.shape[2:].numel(), int(transposed))


def _convolution_backward(info: OpInfo, args: Sequence[Any], outputs: Sequence[Any]) -> list[Kernel]:
    grad, x, weight = args[:3]
    transposed, mask = bool(args[7]), args[10]
    flops = _convolution_flops(x, weight, grad, transposed)
    dims = tuple(Affine(d) for d in _convolution_dims(x, weight, grad, args[9], transposed))
    found: list[Kernel] = []
    produced = list(outputs)
    for wanted, wrt, other, result in ((mask[0], "input", weight, 0), (mask[1], "weight", x, 1)):
        if wanted and produced[result] is not None:
            moved = _bytes(grad) + _bytes(other) + _bytes(produced[result])
            found.append(
                Kernel(info.name, "conv", Affine(flops), Affine(moved), dims, _dtype(grad), wrt),
            )
    return found


def _rnn_kernels(info: OpInfo, args: Sequence[Any], moved: float) -> list[Kernel]:
    """The kernels of a recurrent network; the backward's bytes are shared by its two."""
    products = rnn_products(info.base, args)
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    return [
        Kernel(
            info.name,
            "gemm",
            Affine(flops),
            Affine(moved / len(products)),
            tuple(Affine(d) for d in dims),
            _dtype(tensor),
            wrt,
        )
        for wrt, flops, dims in products
    ]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def price(
    info: OpInfo, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, wrt: str
) -> tuple[list[Kernel], str]:
    """The kernels of one operator call at concrete shapes.

    Returns
    -------
    kernels : list of Kernel
        One, or two where one operator is the backward of an input and a weight. `Affine` figures have only a base here.
    unknown : str
        Why the call has no cost formula ("" if it has one).
    """
    if info.is_view and isinstance(result, torch.Tensor):  # half of all calls
        return [Kernel(info.name, "free", _NONE, _NONE, (), _dtype(result), wrt)], ""
    leaves = list(result) if isinstance(result, (list, tuple)) else [result]
    flat = [t for leaf in leaves for t in (leaf if isinstance(leaf, list) else [leaf])]
    outputs = [t for t in flat if isinstance(t, torch.Tensor)]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    first = outputs[0] if outputs else tensors[0] if tensors else None
    dtype = _dtype(first) if first is not None else "float32"
    if info.is_view or info.base in _FREE:
        return [Kernel(info.name, "free", _NONE, _NONE, (), dtype, wrt)], ""
    moved = least_bytes(info, [*args, *kwargs.values()], outputs)

    def make(kind: str, flops: float, dims: Sequence[float] = (), of: torch.dtype | None = None) -> Kernel:
        name = dtype if of is None else str(of).removeprefix("torch.")
        return Kernel(info.name, kind, Affine(flops), Affine(moved), tuple(Affine(d) for d in dims), name, wrt)

    if info.base in _ATTENTION:
        return [_attention(info, args, kwargs, make)], ""
    if info.base == "grouped_mm_fallback_backward":
        return _grouped_backward(info, args, leaves), ""
    if info.base in _GROUPED:
        offsets = args[2] if len(args) > 2 else kwargs.get("offs")
        dims = _grouped_dims(args[0], args[1], args[0].shape[0] if offsets is None else offsets.shape[0])
        return [make("gemm", round(2 * dims[0] * dims[1] * dims[2] * dims[3]), dims, args[0].dtype)], ""
    if is_rnn(info.base):
        return _rnn_kernels(info, args, moved), ""
    if info.namespace not in ("aten", "prims", "prim"):
        return [make("memory", 0)], f"{info.name} has no cost formula; priced by its bytes"
    if info.base == "convolution_backward":
        return _convolution_backward(info, args, leaves), ""
    if info.base in _CONVOLUTION:
        x, weight, output = args[0], args[1], outputs[0]
        transposed, groups = (bool(args[6]), args[8]) if len(args) > 8 and "cudnn" not in info.base else (False, 1)
        dims = _convolution_dims(x, weight, output, groups, transposed)
        return [make("conv", _convolution_flops(x, weight, output, transposed), dims)], ""
    if info.base in _GEMM:
        dims = _gemm_dims(info.base, args)
        return [make("gemm", 2 * dims[0] * dims[1] * dims[2] * dims[3], dims, tensors[-1].dtype)], ""
    if info.base in _VECTOR:
        dims = _vector_dims(info.base, args)
        return [make("gemm", 2 * dims[0] * dims[1] * dims[2] * dims[3], dims, tensors[-1].dtype)], ""
    if info.base in ("embedding", "embedding_dense_backward"):
        return [make("embedding", 0)], ""
    if info.packet in flop_registry:
        return [make("memory", flop_registry[info.packet](*args, **kwargs, out_val=result))], ""
    return [make("memory", 0)], ""
