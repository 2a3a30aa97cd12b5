"""Bytes that parameters, gradients, optimizer and gathered weights take under FSDP2: pure functions of counts.

The run's precision is fully_shard's mixed precision: parameters, gradients and Adam's moments in float32, sharded
over dp_shard; compute copies in `compute_bytes`; reductions in `reduce_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MASTER_BYTES = 4  # float32 parameters, gradients and each Adam moment


@dataclass(frozen=True, slots=True)
class UnitParameters:
    """Parameters of one unit on one tp rank, before sharding over dp_shard.

    trainable, frozen : elements with and without `requires_grad`
    """

    trainable: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """All elements."""
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True)
class DataParallel:
    """How a unit's parameters live on the data-parallel ranks.

    dp_shard, dp_replicate : degrees (dp_shard of one layout, or an array of layouts: bytes are arrays then too)
    reshard_after_forward : True = ZeRO-3 (gathered again for backward), False = ZeRO-2
    sync_every : gradients reduced after each microbatch (True) or after the last one only
    several : more than one microbatch a step
    compute_bytes, reduce_bytes : bytes of one element in compute and in the gradient reduction
    optimizer_states : float32 states per trainable element (AdamW 2, SGD 0)
    """

    dp_shard: Any
    dp_replicate: int
    reshard_after_forward: bool
    sync_every: bool
    compute_bytes: int
    reduce_bytes: int = 4
    optimizer_states: int = 2
    several: bool = True


def ceil_div(a: int, b: Any) -> Any:
    """a / b rounded up; b may be an array.

    >>> ceil_div(7, 4)
    2
    """
    return -(-a // b)


def sharded_state_bytes(p: UnitParameters, dp: DataParallel) -> Any:
    """Parameters, gradients and optimizer state of one rank:

        4 (total + trainable (1 + states)) / dp_shard

    Sources: ZeRO (Rajbhandari et al. 2020, section 3); measured 12 B a parameter at rest and 16 at the end of
    backward with AdamW under fully_shard.

    >>> sharded_state_bytes(UnitParameters(1000), DataParallel(4, 1, True, True, 2))
    4000
    """
    elements = ceil_div(p.total, dp.dp_shard) + ceil_div(p.trainable, dp.dp_shard) * (1 + dp.optimizer_states)
    return MASTER_BYTES * elements


def kept_gathered_bytes(p: UnitParameters, dp: DataParallel) -> int:
    """Unsharded compute weights that stay from forward to backward: [not reshard_after_forward] compute_bytes x total.

    >>> kept_gathered_bytes(UnitParameters(1000), DataParallel(4, 1, False, False, 2))
    2000
    """
    return 0 if dp.reshard_after_forward else dp.compute_bytes * p.total


def kept_gradient_bytes(p: UnitParameters, dp: DataParallel) -> Any:
    """Gradients that stay from one microbatch to the next:

        [several] (4 trainable / dp_shard where each microbatch reduces, else reduce_bytes x trainable)

    Without a reduction each microbatch, fully_shard accumulates unsharded gradients in the reduce dtype. Each goes when
    it is reduced: whole and sharded gradients of a unit are not there together (measured: docs/accuracy.md).

    >>> kept_gradient_bytes(UnitParameters(1000), DataParallel(4, 1, False, False, 2))
    4000
    >>> kept_gradient_bytes(UnitParameters(1000), DataParallel(4, 1, False, True, 2))
    1000
    """
    if not dp.several:
        return 0
    return MASTER_BYTES * ceil_div(p.trainable, dp.dp_shard) if dp.sync_every else dp.reduce_bytes * p.trainable


def gathered_bytes(p: UnitParameters, dp: DataParallel) -> int:
    """Unsharded compute weights of one unit while it runs, where they do not stay anyway: compute_bytes x total.

    >>> gathered_bytes(UnitParameters(1000), DataParallel(4, 1, True, True, 2))
    2000
    """
    return dp.compute_bytes * p.total if dp.reshard_after_forward else 0


def reduction_bytes(p: UnitParameters, dp: DataParallel) -> Any:
    """Buffers of one unit's gradient reduction: reduce_bytes x trainable (1 + 1/dp_shard), input and output.

    >>> reduction_bytes(UnitParameters(1000), DataParallel(4, 1, True, True, 2))
    5000
    """
    return dp.reduce_bytes * (p.trainable + ceil_div(p.trainable, dp.dp_shard))


def backward_transient_bytes(
    workspace: Any, own: UnitParameters, before: UnitParameters, after: UnitParameters, dp: DataParallel
) -> Any:
    """Peak above what stays and what is saved, while one unit runs backward under fully_shard:

        gathered(own) + gathered(before)        the unit's weights, and the next ones prefetched (backward order)
        + compute_bytes x trainable(own)        its gradients as autograd makes them
        + max(workspace + reduction(after), reduction(own))

    `before` and `after` are its neighbours in forward order. The reduction of `after` is still in flight when
    this unit starts; its own starts when its workspace is free again. `workspace` may be an array of layouts.

    >>> p = UnitParameters(1000)
    >>> int(backward_transient_bytes(300, p, p, p, DataParallel(4, 1, True, True, 2)))
    11300
    """
    gradients = dp.compute_bytes * own.trainable
    buffers = np.maximum(workspace + reduction_bytes(after, dp), reduction_bytes(own, dp))
    return gathered_bytes(own, dp) + gathered_bytes(before, dp) + gradients + buffers
