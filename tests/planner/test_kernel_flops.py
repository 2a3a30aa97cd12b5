"""FLOPs and dimensions of kernels: against torch's counter, operator by operator, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tpplan.planner.equal_calls import EqualCalls
from tpplan.planner.kernels import op_info, price
from tpplan.planner.quick_fake import ALIKE, QUICK, quick

aten = torch.ops.aten
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 5), padding=1, dilation=2), (2, 4, 11, 13)),
    "3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7, 7)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 7)),
}


class Priced(TorchDispatchMode):
    """What every operator inside is priced as: forward kernels, then backward ones."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found, unknown = price(op_info(func), args, kwargs or {}, result, "forward")
        assert not unknown
        self.kernels += found
        return result

    def total(self) -> float:
        return sum(k.flops.base for k in self.kernels)


def counter() -> FlopCounterMode:
    """torch's counter with what it lacks: attention of the CPU, and backward of grouped convolutions (2 x forward)."""

    def attention(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, q, k, v)

    def convolution_backward(grad, x, w, *args, out_shape=None, **kwargs):
        transposed, mask = args[4], args[7]
        n = x if transposed else grad
        return sum(mask[:2]) * 2 * torch.Size(n).numel() * torch.Size(w[1:]).numel()

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
            aten.convolution_backward: convolution_backward,
        },
    )


def agree(run: Callable[[], torch.Tensor]) -> Priced:
    """Both count the same in a forward and backward of `run`."""
    with counter() as expected:
        run().sum().backward()
    with Priced() as found:
        run().sum().backward()
    assert found.total() == expected.get_total_flops() > 0
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    module, x = make(), torch.randn(shape, requires_grad=True)
    kernels = [k for k in agree(lambda: module(x)).kernels if k.kind == "conv"]
    forward = kernels[0].flops.base
    assert [k.wrt for k in kernels] == ["forward", "input", "weight"]
    assert all(k.flops.base == forward for k in kernels)
    n, c_in, c_out, groups, outputs, taps, transposed = (d.base for d in kernels[0].dims)
    per_tap = torch.Size(shape[2:]).numel() if transposed else outputs
    assert forward == 2 * n * c_in * c_out // groups * per_tap * taps
    assert kernels[1].dims == kernels[2].dims == kernels[0].dims


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attention(causal: bool, masked: bool) -> None:
    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (8, 8, 8))
    mask = torch.zeros(8, 8) if masked else None
    agree(lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal))


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda: torch.mv(torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (lambda: torch.addmv(torch.ones(3), torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (lambda: torch.dot(torch.ones(7), torch.ones(7)), 2 * 7),
        (lambda: torch.addbmm(torch.ones(3, 4), torch.ones(2, 3, 5), torch.ones(2, 5, 4)), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.einsum("bik,bkj->bij", torch.ones(2, 3, 5), torch.ones(2, 5, 4)), 2 * 2 * 3 * 4 * 5),
    ],
    ids=["mv", "addmv", "dot", "addbmm", "einsum"],
)
def test_products_by_hand(run: Callable[[], torch.Tensor], flops: int) -> None:
    with Priced() as found:
        run()
    assert found.total() == flops


QUICK_CALLS = {
    "add": lambda x, y, z: x + y,
    "broadcast": lambda x, y, z: x * z,
    "scalar": lambda x, y, z: x * 2,
    "transposed": lambda x, y, z: x.transpose(1, 2) + y.transpose(1, 2),
    "sigmoid": lambda x, y, z: torch.sigmoid(x),
    "promoted": lambda x, y, z: x + y.to(torch.bfloat16),
    "view": lambda x, y, z: x.view(2, 12),
    "slice": lambda x, y, z: x[:, 1:, ::2],
    "split": lambda x, y, z: x.split(2, dim=2),
    "bmm": lambda x, y, z: torch.bmm(x, y.transpose(1, 2)),
    "softmax": lambda x, y, z: torch.softmax(x, 1),
    "sum": lambda x, y, z: x.sum(1, keepdim=True),
    "cat": lambda x, y, z: torch.cat([x, y], 2),
    "in place": lambda x, y, z: x.add_(y),
    "to": lambda x, y, z: x.transpose(1, 2).to(torch.bfloat16),
    "group norm": lambda x, y, z: torch.native_group_norm(x, x[0, :, 0], None, 2, 3, 4, 3, 1e-5),
    "group norm's backward": lambda x, y, z: torch.ops.aten.native_group_norm_backward(
        x, y, x[:, :, 0], y[:, :, 0], x[0, :, 0], 2, 3, 4, 3, [True, True, False]
    ),
    "layer norm": lambda x, y, z: torch.native_layer_norm(x.transpose(1, 2), [3], x[0, :, 0], None, 1e-5),
    "layer norm's backward": lambda x, y, z: torch.ops.aten.native_layer_norm_backward(
        x, y, [4], x[:, :, :1], y[:, :, :1], x[0, 0], x[1, 1], [True, False, True]
    ),
}


@pytest.mark.parametrize("name", QUICK_CALLS)
def test_quick_results_are_those_of_the_fake_mode(name: str) -> None:
    mode = FakeTensorMode()
    compared = []

    class Both(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = quick(mode, func, op_info(func), args, kwargs or {})
            result = func(*args, **(kwargs or {}))
            if found is not NotImplemented:
                pairs = zip(*(r if isinstance(r, (list, tuple)) else [r] for r in (found, result)), strict=True)
                for a, b in pairs:
                    compared.append(func)
                    if a is None or b is None:
                        assert a is b
                        continue
                    assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
                    assert a.storage_offset() == b.storage_offset()
                    assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
            return result

    for dtype in (torch.float32, torch.bfloat16):
        x, y, z = (mode.from_tensor(torch.randn(s, dtype=dtype)) for s in ((2, 3, 4), (2, 3, 4), (3, 1)))
        with Both():
            QUICK_CALLS[name](x, y, z)
    assert compared
    assert ALIKE <= QUICK


def new_tensors(result: Any) -> list[tuple[Any, ...] | None]:
    """What tells the results of two calls apart."""
    found = result if isinstance(result, (list, tuple)) else [result]
    return [
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.untyped_storage().nbytes()) for t in found
    ]


EQUAL_CALLS = {
    "product": (torch.ops.aten.mm.default, lambda x, y: (x, y.t())),
    "promoted": (torch.ops.aten.add.Tensor, lambda x, y: (x, y.to(torch.bfloat16))),
    "layer norm": (torch.ops.aten.native_layer_norm.default, lambda x, y: (x, [4], y[0], y[1], 1e-5)),
    "convolution": (
        torch.ops.aten.convolution.default,
        lambda x, y: (x.view(1, 3, 4), y.view(1, 3, 4), None, [1], [0], [1], False, [0], 1),
    ),
}


@pytest.mark.parametrize("name", EQUAL_CALLS)
def test_equal_calls_give_equal_results(name: str) -> None:
    mode = FakeTensorMode()
    equal = EqualCalls(mode)
    func, arguments = EQUAL_CALLS[name]
    x, y = (mode.from_tensor(torch.randn(3, 4)) for _ in range(2))
    args = arguments(x, y)
    key = equal.key(func, op_info(func), args, {})
    assert key is not None
    assert equal.again(key) is NotImplemented
    first = func(*args)
    equal.keep(key, args, first)
    again = equal.again(equal.key(func, op_info(func), args, {}) or ())
    assert new_tensors(again) == new_tensors(first)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.ops.aten.view.default, ([12],)),
        (torch.ops.aten.add_.Tensor, (1,)),
        (torch.ops.aten.nonzero.default, ()),
        (torch.ops.aten.contiguous.default, ()),
    ],
)
def test_only_new_tensors_of_known_shapes_are_remembered(func: Any, args: tuple[Any, ...]) -> None:
    mode = FakeTensorMode()
    equal = EqualCalls(mode)
    args = (mode.from_tensor(torch.randn(3, 4)), *args)
    key = equal.key(func, op_info(func), args, {})
    if key is not None:  # whether it is a copy follows from the argument: this one is not
        equal.keep(key, args, func(*args))
        assert equal.again(key) is NotImplemented


def test_numbers_of_other_types_are_other_calls() -> None:
    mode = FakeTensorMode()
    equal = EqualCalls(mode)
    whole = mode.from_tensor(torch.ones(3, dtype=torch.int64))
    func = torch.ops.aten.mul.Tensor
    keys = {equal.key(func, op_info(func), (whole, number), {}) for number in (1, 1.0, True)}
    assert len(keys) == 3
