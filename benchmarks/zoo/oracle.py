"""What torch itself says of a model: FLOPs of its counter, parameters that nothing reads, bytes kept for backward.

Nothing of the tracer's recording or pricing is used. torch's `FlopCounterMode` lacks some operators and counts the
CPU's fall-backs where a GPU has one kernel, so attention, recurrent layers and grouped products are counted here by
their formulas, and a convolution's backward as the two products it consists of (torch counts a grouped one
as if it were not grouped).
"""

from __future__ import annotations

import functools
import gc
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tpplan.planner.attention import falls_apart, learned_mask_attention, stays_whole, whole_attention
from tpplan.planner.rnn import stand_in_for
from tpplan.planner.stand_in import FakeModel, RealModel
from tpplan.planner.target import Target

aten = torch.ops.aten
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(slots=True)
class Oracle:
    """FLOPs of one step at one batch size; trainable parameters that nothing reads, or that got no gradient."""

    forward: int = 0
    backward: int = 0
    unused: set[str] = field(default_factory=set)
    without_gradient: set[str] = field(default_factory=set)


class _Counted(torch.autograd.Function):
    """Outputs of given shapes; calls back when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, shapes: Any, on_backward: Callable[[], None], like: Any, *inputs: Any) -> Any:
        ctx.on_backward, ctx.inputs = on_backward, [(t.shape, t.dtype) for t in inputs]
        ctx.like = like
        return tuple(like.new_zeros(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.on_backward()
        wanted = ctx.needs_input_grad[3:]
        made = [
            ctx.like.new_zeros(shape, dtype=dtype) if want else None
            for (shape, dtype), want in zip(ctx.inputs, wanted, strict=True)
        ]
        return (None, None, None, *made)


class _Formulas(TorchFunctionMode):
    """Counts attention, recurrent layers and grouped products by formula, and keeps chance out."""

    def __init__(self, found: Oracle) -> None:
        super().__init__()
        self.found = found
        self.read: set[int] = set()  # parameters that went into a function of torch with tensors as result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            self.read.update(id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.nn.Parameter))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # its attention is out of sight of function modes
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments["dropout_p"] = 0.0
            args, kwargs = bound.args, bound.kwargs
        if func in (F.grouped_mm, torch._grouped_mm):
            return self._grouped(*args, **kwargs)
        if getattr(func, "__name__", "") in _RECURRENT and isinstance(args[0], torch.Tensor):
            return self._recurrent(func.__name__, *args)
        result = func(*args, **kwargs)
        if func is torch.rand and result.dim() == 0:
            return torch.ones_like(result)
        return result

    def _count(self, shapes: Sequence[Any], forward: int, backward: int, *inputs: torch.Tensor) -> Any:
        self.found.forward += forward

        def on_backward() -> None:
            self.found.backward += backward

        return _Counted.apply(shapes, on_backward, inputs[0], *inputs)

    def _attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **named: Any) -> Any:
        """2 b h s_q s_kv (d_qk + d_v) forward; backward computes the scores again: 3 d_qk + 2 d_v.

        No fused kernel broadcasts heads unless it is told to (enable_gqa), and none has a gradient for a mask whose
        last dimension is not contiguous: then the products run one by one, and backward is twice the forward.
        """
        *batch, _, width = query.shape
        pairs = 2 * math.prod(batch) * query.shape[-2] * key.shape[-2]
        out = (*query.shape[:-1], value.shape[-1])
        forward, backward = pairs * (width + value.shape[-1]), pairs * (3 * width + 2 * value.shape[-1])
        learned_mask = attn_mask is not None and attn_mask.requires_grad
        if (learned_mask and attn_mask.stride(-1) != 1) or (
            key.shape[-3] != query.shape[-3] and not named.get("enable_gqa")
        ):
            backward = 2 * forward
        inputs = [query, key, value, *([attn_mask] if learned_mask else [])]
        return self._count([out], forward, backward, *inputs)[0]

    def _grouped(self, a: Any, b: Any, *, offs: Any = None, **_: Any) -> Any:
        """Every row of `a` meets one matrix of `b`."""
        flops = 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        backward = flops * (int(a.requires_grad) + int(b.requires_grad))
        return self._count([(*a.shape[:-1], b.shape[-1])], flops, backward, a, b)[0]

    def _recurrent(self, name: str, x: Any, state: Any, weights: Any, *rest: Any) -> Any:
        """Each weight matrix meets every time step; gradients of inputs and of weights are as many products each."""
        both = rest[4]
        steps = x.shape[0] * x.shape[1]
        flops = 2 * steps * sum(w.numel() for w in weights if w.dim() == 2)
        states = state if isinstance(state, (tuple, list)) else [state]
        width = states[0].shape[-1] * (2 if both else 1)
        shapes = [(*x.shape[:2], width), *(s.shape for s in states)]
        made = self._count(shapes, flops, 2 * flops, x, *states, *weights)
        return tuple(made)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """The gradients of input and weight are as many multiply-adds as the forward, each."""
    transposed, mask = rest[4], rest[7]
    per_element = 2 * math.prod(weight[1:])
    return per_element * math.prod(x if transposed else grad) * (int(mask[0]) + int(mask[1]))


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_MISSING = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def count(target: Target, batch: int, seq: int, precision: str, real: bool = False) -> Oracle:
    """Run the whole model, no layer replayed, under torch's counter.

    Parameters
    ----------
    target : Target
    batch, seq : int
        Samples; tokens or image side.
    precision : {"bf16", "fp32"}
    real : bool
        On real tensors (for a small model whose code looks at its data).
    """
    found = Oracle()
    if real:
        _forget_cached()
        torch.manual_seed(0)
    fake = (RealModel if real else FakeModel)(target.build("cpu" if real else "meta").train(), precision)
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = target.example_inputs(fake.model, batch, seq).map(fake.input)
        formulas = _Formulas(found)
        with counter, formulas:
            loss = target.loss(fake.model(*inputs.args, **inputs.kwargs), inputs)
            forward = counter.get_total_flops()
            loss.backward()
    found.forward += forward
    found.backward += counter.get_total_flops() - forward
    trained = {n: p for n, p in fake.model.named_parameters() if p.requires_grad}
    found.unused = {n for n, p in trained.items() if id(p) not in formulas.read}
    found.without_gradient = {n for n, p in trained.items() if p.grad is None}
    return found


def _forget_cached() -> None:
    """Empty the function caches of model code: a run on fake tensors leaves its own there."""
    for found in gc.get_objects():
        if isinstance(found, functools._lru_cache_wrapper) and (found.__module__ or "").startswith("transformers."):
            found.cache_clear()


class _GpuKernels(TorchFunctionMode):
    """What the CPU would take apart stays one operator, as on a GPU: attention (without dropout), RNNs, dropout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _without_dropout(*args, **kwargs)
        if func is F.dropout and kwargs["p"] > 0 and kwargs["training"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return (stand_in_for(func) or func)(*args, **kwargs)


def _without_dropout(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    kernel = F.scaled_dot_product_attention if stays_whole(query, value, attn_mask) else whole_attention
    if falls_apart(query, attn_mask):
        kernel = learned_mask_attention
    return kernel(query, key, value, attn_mask, 0.0, is_causal, **kwargs)


def saved_bytes(target: Target, batch: int, seq: int) -> int:
    """Bytes of the distinct storages that autograd keeps in a real float32 forward, without parameters and buffers."""
    _forget_cached()
    torch.manual_seed(0)
    model = target.build("cpu").train()
    inputs = target.example_inputs(model, batch, seq)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address may be used anew only when nothing holds it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _GpuKernels():
        loss = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
    del loss
    return sum(kept.values())
