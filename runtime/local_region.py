"""Local regions: a module's own code on plain tensors, where nothing that it reads is split over tp.

Two kinds. Convolutions (a silently wrong bias gradient on torch 2.11), batch norm and torch's own multi-head
attention never see DTensors: what comes in split is gathered. Any other module that holds no divided
parameter runs on plain tensors whenever its inputs are whole, so that its code meets no gap of DTensor; with
split inputs (dropout or a norm between two projections) it runs on DTensors. Inputs and parameters are
unwrapped, outputs wrapped again, so that their gradients arrive whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .compat import tree_flatten, tree_map_only
from .full_tensors import is_transposed
from .packed import PackedOutput

_LOCAL_TYPES = (_ConvNd, _NormBase, nn.MultiheadAttention)
# DTensor carries these well, and sums the gradients of a whole linear's output later than a region would.
_DTENSOR_TYPES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Identity)


def runs_locally(module: nn.Module) -> bool:
    """Whether `module` is of a kind that must not see DTensors."""
    return isinstance(module, _LOCAL_TYPES)


def use_local_region(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let `module` run on whole plain tensors; all its parameters must be replicated."""
    module.forward = partial(_run, module, module.forward, mesh)  # type: ignore[method-assign]


def use_local_regions(
    model: nn.Module,
    divided: Collection[str],
    mesh: DeviceMesh,
    units: Collection[str] = (),
    compiled: Collection[str] = (),
) -> None:
    """Let the largest modules without any of the modules `divided` in them run on plain tensors when they can.

    Parameters
    ----------
    divided : collection of str
        FQNs of the modules whose parameters tp divides, in whole or in part.
    units : collection of str
        FQNs of modules that gather their own parameters (FSDP): a region may be one, but not hold one.
    compiled : collection of str
        FQNs of the modules to compile: inside, a region of each would keep equal blocks from sharing a graph.
    """
    inner = {prefix for fqn in divided for prefix in _prefixes(fqn)} | {""}
    inner |= {prefix for fqn in units for prefix in _prefixes(fqn)[1:]}
    for fqn, module in model.named_modules():
        parent = fqn.rpartition(".")[0]
        known = fqn in inner or parent not in inner or any(prefix in compiled for prefix in _prefixes(fqn))
        if known or runs_locally(module):
            continue
        for part in _called_parts(module):
            part.forward = partial(_run_if_whole, part, part.forward, mesh)  # type: ignore[method-assign]


def _prefixes(fqn: str) -> list[str]:
    """`fqn` and what it is in, from the inside out."""
    return [fqn.rsplit(".", depth)[0] for depth in range(fqn.count(".") + 1)]


def _called_parts(module: nn.Module) -> list[nn.Module]:
    """`module`, or what it contains if it is a container that nobody calls."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [part for child in module.children() for part in _called_parts(child)]
    # What changes its input in place must change the caller's own tensor.
    stays = runs_locally(module) or isinstance(module, _DTENSOR_TYPES) or is_transposed(module)
    return [] if stays or getattr(module, "inplace", False) else [module]


def _run_if_whole(module: nn.Module, forward: Any, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    if not _are_whole(args, kwargs):
        return forward(*args, **kwargs)
    return _run(module, forward, mesh, *args, **kwargs)


def _are_whole(args: Any, kwargs: Any) -> bool:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    opaque = any(isinstance(leaf, PackedOutput) for leaf in leaves)
    split = any(isinstance(t, DTensor) and not t.placements[0].is_replicate() for t in tensors)
    return not opaque and not split


def _run(module: nn.Module, forward: Any, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    known = [*tree_flatten((args, kwargs))[0], *module.parameters()]
    if not any(isinstance(tensor, DTensor) for tensor in known):
        return forward(*args, **kwargs)  # inside a region that is plain already
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
