"""Torch functions that a sharded step runs in tpplan's own way: found by every name that stands for them.

A user's file may call `F.embedding` or have imported `embedding` by name; both are the same function object.
The names are noted once a model, and replaced only inside `interposed()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .attention import attention_on_local_heads, torch_attention
from .channels import (
    CONVOLUTIONS,
    batch_norm_of_local_channels,
    group_norm_of_local_channels,
    torch_batch_norm,
    torch_group_norm,
)
from .packed_products import any_packed_weight, linear_of_packed_rows, torch_linear
from .pooling import CHANNELWISE
from .products import (
    einsum_on_local_batches,
    matmul_on_local_batches,
    matmul_operators,
    torch_einsum,
    torch_matmul,
)
from .vocabulary import embedding_on_local_rows, torch_embedding

_OWN: dict[int, Callable[..., Any]] = {
    id(torch_attention): attention_on_local_heads,
    id(torch_embedding): embedding_on_local_rows,
    id(torch_matmul): matmul_on_local_batches,
    id(torch_linear): linear_of_packed_rows,
    id(torch_einsum): einsum_on_local_batches,
    id(torch_batch_norm): batch_norm_of_local_channels,
    id(torch_group_norm): group_norm_of_local_channels,
    **{id(function): own for function, own in {**CONVOLUTIONS, **CHANNELWISE}.items()},
}
# (namespace, name, torch's function): a property of this process's modules, like sys.modules itself.
_names: list[tuple[dict[str, Any], str, Any]] = []


def find_names(model: nn.Module) -> None:
    """Note every name by which this process's modules, and the code of `model`, know the functions."""
    spaces = [vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    # A model file may be loaded without an entry in sys.modules: its functions still know their globals.
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        spaces += [f.__globals__ for f in vars(kind).values() if hasattr(f, "__globals__")]
    known = {(id(space), name) for space, name, _ in _names}
    for space in spaces:
        owner = str(space.get("__name__", ""))
        if owner.startswith(("torch._", __package__ or "tpplan.runtime")):
            continue
        for name, value in list(space.items()):
            if id(value) in _OWN and (id(space), name) not in known:
                known.add((id(space), name))
                _names.append((space, name, value))


@contextmanager
def interposed() -> Iterator[None]:
    """Inside, the noted names stand for tpplan's functions; without DTensors those call torch's own."""
    left = None if any_packed_weight() else torch_linear  # the compiler sees torch's own where it can
    replaced = [e for e in _names if e[0].get(e[1]) is e[2] and e[2] is not left]
    try:
        for space, name, function in replaced:
            space[name] = _OWN[id(function)]
        with matmul_operators():
            yield
    finally:
        for space, name, function in replaced:
            space[name] = function
