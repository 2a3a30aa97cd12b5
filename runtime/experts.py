"""Experts under tensor parallelism: a module's own code on each rank's parts of its parameters, outputs summed.

Experts keep their weights as raw tensors (experts, in, out) and call grouped products or loops with sizes that
depend on the data: nothing for DTensor. Divided along the inner features, every expert is a column and a row
projection, so each rank computes a part of the sum:

    inputs      whole plain tensors, their gradients summed over tp
    parameters  this rank's part; undivided ones whole, their gradients summed
    outputs     summed over tp (integer ones are equal on all ranks and stay as they are)

What is added once to the sum (the bias of the second projection) counts 1/tp on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..planner.plan import ModuleStyle
from .compat import tree_map_only
from .placements import split_dim, sum_of_ranks, to_each_rank


def use_summed_region(module: nn.Module, fqn: str, style: ModuleStyle, mesh: DeviceMesh) -> None:
    """Let `module`, whose parameters are DTensors by now, run on plain local tensors as `style` says."""
    del fqn
    module.forward = partial(_run, module, module.forward, frozenset(style.shared), mesh)  # type: ignore[method-assign]


def _run(module: nn.Module, forward: Any, shared: frozenset[str], mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: to_each_rank(tensor, mesh), (args, kwargs))
    with local_parameters(module, mesh, shared):
        output = forward(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda t: sum_of_ranks(t, mesh) if t.is_floating_point() else t, output)


@contextmanager
def local_parameters(module: nn.Module, mesh: DeviceMesh, shared: frozenset[str] = frozenset()) -> Iterator[None]:
    """Inside, the parameters of `module` and its children are plain: this rank's parts, and whole ones.

    Parameters
    ----------
    shared : frozenset of str
        Names, relative to `module`, of whole parameters of which each rank takes 1/tp.
    """
    owners = list(module.named_modules())
    saved = [dict(owner._parameters) for _, owner in owners]
    try:
        for prefix, owner in owners:
            for name, parameter in list(owner._parameters.items()):
                if isinstance(parameter, DTensor):
                    cut = split_dim(parameter) is not None
                    local = parameter.to_local() if cut else to_each_rank(parameter, mesh)
                    if f"{prefix}.{name}".lstrip(".") in shared:
                        local = local / mesh.size()
                    owner._parameters[name] = cast(Any, local)
        yield
    finally:
        for (_, owner), table in zip(owners, saved, strict=True):
            owner._parameters.update(table)
