"""The private torch names that tpplan uses, in one place, tested on every supported torch."""

from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

__all__ = [
    "FakeTensorMode",
    "TreeSpec",
    "allow_recompiles",
    "dtensor_dispatcher",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
]


def dtensor_dispatcher() -> Any:
    """What carries operators on DTensors to their local tensors."""
    from torch.distributed.tensor import DTensor

    return DTensor._op_dispatcher


def allow_recompiles(units: int) -> None:
    """Let as many units as there are share a compiled function: past the limit they would silently run eager.

    Blocks of one class share their code object, and each may need a graph of its own.
    """
    from torch._dynamo import config  # slow to import, and only needed to compile

    config.recompile_limit = max(config.recompile_limit, units + 8)
