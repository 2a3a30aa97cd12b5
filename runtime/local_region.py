"""Local regions: a module's own code on plain tensors, for operators that DTensor does not carry correctly.

Convolutions (a silently wrong bias gradient on torch 2.11), batch norm and torch's own multi-head attention
run replicated: inputs and parameters are unwrapped, the module's forward runs on whole tensors, outputs are
wrapped again, so that their gradients arrive whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

_LOCAL_TYPES = (_ConvNd, _NormBase, nn.MultiheadAttention)


def runs_locally(module: nn.Module) -> bool:
    """Whether `module` is of a kind that must not see DTensors."""
    return isinstance(module, _LOCAL_TYPES)


def use_local_region(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let `module` run on whole plain tensors; all its parameters must be replicated."""
    module.forward = partial(_run, module, module.forward, mesh)  # type: ignore[method-assign]


def _run(module: nn.Module, forward: Any, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(DTensor, _whole, (args, kwargs))
    with _plain_parameters(module):
        output = forward(*args, **kwargs)
    return tree_map_only(torch.Tensor, partial(_wrap, mesh), output)


@contextmanager
def _plain_parameters(module: nn.Module) -> Iterator[None]:
    """The parameters of `module` and its children as plain whole tensors; gradients flow to the DTensors."""
    tables = [child._parameters for child in module.modules()]
    saved = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: _whole(p) for name, p in table.items() if isinstance(p, DTensor)})  # type: ignore[misc]
        yield
    finally:
        for table, values in zip(tables, saved, strict=True):
            table.update(values)


def _whole(tensor: DTensor) -> torch.Tensor:
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()


def _wrap(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor) or not tensor.is_floating_point():
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
