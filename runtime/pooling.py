"""Functions of images and sequences that treat each channel alone (pooling, resizing, padding), on split channels.

DTensor has no rules for most of them, and some would change strides in place. Each rank runs torch's own function
on its channels; whole operands run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard

from .compat import tree_map_only
from .placements import split_dim

_NAMES = (
    *(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)),
    *(f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)),
    "interpolate",
)


def _run(torch_function: Callable[..., Any], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, DTensor):
        return torch_function(input, *args, **kwargs)
    dim = split_dim(input)
    # The channels, or the samples: what is before the places. Any other split is gathered.
    alone = dim is not None and dim < min(2, input.ndim - 1)
    placement = Shard(dim) if dim is not None and alone else Replicate()
    if input.placements != (placement,):
        input = input.redistribute(placements=[placement])
    output = torch_function(input.to_local(), *args, **kwargs)
    return tree_map_only(
        torch.Tensor, lambda t: DTensor.from_local(t, input.device_mesh, [placement], run_check=False), output
    )


def _pad(torch_pad: Callable[..., Any], input: torch.Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    dim = split_dim(input)
    if dim is None or not isinstance(input, DTensor) or dim >= input.ndim - len(pad) // 2:
        return torch_pad(input, pad, *args, **kwargs)  # whole, or along its split: as DTensor does it
    output = torch_pad(input.to_local(), pad, *args, **kwargs)
    return DTensor.from_local(output, input.device_mesh, [Shard(dim)], run_check=False)


def _standing_for(torch_function: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """`own` with torch's function bound, under its name: the compiler asks functions for theirs."""

    @wraps(torch_function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return own(torch_function, *args, **kwargs)

    return run


CHANNELWISE: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _standing_for(function, _run) for function in (getattr(F, name) for name in _NAMES)
} | {F.pad: _standing_for(F.pad, _pad)}
