"""Builds a module without its memory: on the meta device, or for real with only the parameters there."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import TpplanError
from .blame import describe

_LAZY = (UninitializedBuffer, UninitializedParameter)


def build_on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, str]:
    """The module that `make` constructs, with its parameters on the meta device.

    First under ``torch.device("meta")``, where buffers are meta too. If that raises, for real with every
    parameter sent to meta as it is registered, so that only one is ever in memory. If that raises too (the
    constructor looks at its weights), for real, and copied to meta afterwards.

    Returns
    -------
    module : nn.Module
    note : str
        For the user, which of these it was; "" for the first.

    Raises
    ------
    Exception
        What `make` raises the last time.
    """
    try:
        with torch.device("meta"):
            return _all_on_meta(make()), ""
    except TpplanError:
        raise
    except Exception as error:
        why = f"The constructor fails on the meta device ({describe(error)}); it ran for real"
    try:
        with parameters_on_meta():
            return _all_on_meta(make()), f"{why} with only the parameters on meta."
    except Exception:
        return meta_copy(make()), f"{why}, with the whole model in memory for a moment."


def _all_on_meta(model: nn.Module) -> nn.Module:
    """`model`, or a copy if some of it is real: what was built earlier is the user's own and stays as it is."""
    return model if all(_stays(p) for p in model.parameters()) else meta_copy(model)


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` with parameters and buffers on meta; their values are not copied on the way."""
    memo: dict[int, object] = {id(p): _parameter_on_meta(p) for p in model.parameters() if not _stays(p)}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers() if not isinstance(b, _LAZY)}
    return copy.deepcopy(model, memo)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While active, a parameter goes to the meta device when a module registers it (ties are kept)."""
    original = nn.Module.register_parameter
    twins: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, nn.Parameter) and not _stays(param):
            known = twins.get(id(param))
            # an id is reused once its parameter is gone: only a living one is the same
            if known is None or known[0]() is not param:
                known = (weakref.ref(param), _parameter_on_meta(param))
                twins[id(param)] = known
            param = known[1]
        original(self, name, param)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def lazy_parameters(model: nn.Module) -> list[str]:
    """Names of parameters and buffers whose shape only a first forward decides (nn.LazyLinear and kin)."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if isinstance(tensor, _LAZY)]


def _stays(param: nn.Parameter) -> bool:
    return isinstance(param, _LAZY) or param.device.type == "meta"


def _parameter_on_meta(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
