"""Lets fake tensors pass for real ones where Python code of torch or of transformers looks at what they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .attention import whole_attention
from .recorder import Recorder
from .values import real_tensors


@contextlib.contextmanager
def pass_for_real(recorder: Recorder) -> Iterator[None]:
    """Inside, fake tensors have values for Python too, and flex_attention is one operator.

    transformers keeps masks that hide nothing where tensors are fake; here it is told that none is.
    """
    if recorder.fake is None:
        yield
        return
    changed = [(FakeTensor, "tolist", _tolist(recorder)), (nn.Module, "_apply", _apply(recorder))]
    transformers: Any = sys.modules.get("transformers.utils.import_utils")
    if hasattr(transformers, "is_fake_tensor"):
        changed.append((transformers, "is_fake_tensor", lambda tensor: False))
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None:
        # its code and not its name, which models have imported already
        flex.tpplan_whole_attention = _flex
        changed.append((flex.flex_attention, "__code__", _flex_code.__code__))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def read_out(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` (`numpy`, `__format__`, ...) gives for the values of its first argument."""
    assert recorder.fake is not None
    value = recorder.fake.read_whole(args[0], func.__name__)
    with real_tensors():
        return func(value, *args[1:], **kwargs)


def _tolist(recorder: Recorder) -> Any:
    return lambda tensor: read_out(recorder, torch.Tensor.tolist, (tensor,), {})


def _apply(recorder: Recorder) -> Any:
    def apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
        """`module.to(dtype)` inside a forward: other parameters take the place of those that change."""
        with torch.no_grad(), recorder.pause():
            for inner in module.modules():
                for name, parameter in inner._parameters.items():
                    if parameter is not None and (new := change(parameter)).dtype != parameter.dtype:
                        inner._parameters[name] = recorder.replace_parameter(parameter, new)
        return module

    return apply


def _flex(query: Any, key: Any, value: Any, scale: float | None, wants_more: bool) -> Any:
    """Attention as one operator; its mask, which hides blocks of scores, is not priced."""
    out = whole_attention(query, key, value, scale=scale)
    return (out, out.float().sum(-1)) if wants_more else out


def _flex_code(
    query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False,
    kernel_options=None, *, return_aux=None,
):  # fmt: skip
    """The body that torch's flex_attention gets; it runs among that module's names."""
    return tpplan_whole_attention(query, key, value, scale, return_lse or return_aux is not None)  # noqa: F821 # type: ignore
