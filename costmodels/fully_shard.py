"""What FSDP2's gathers and reductions add to a unit's forward and backward, with prefetch and overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import DataParallel
from .overlap import overlapped_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """Seconds of one unit's FSDP traffic on one rank: collectives (of one layout, or an array of layouts), and the
    copies around them."""

    gather_s: Any
    reduce_s: Any
    gather_copy_s: float
    reduce_copy_s: float
    accumulate_s: float
    compute_slowdown: float
    comm_slowdown: float

    def exposed(self, forward_s: Any, backward_s: Any, dp: DataParallel, *, first: bool) -> tuple[Any, Any, Any, Any]:
        """(forward, backward, first-forward extra, last-backward extra) with FSDP's prefetch and overlap.

                                gather in            reduce in
            ZeRO-3, every       forward, backward    every backward
            ZeRO-2, every       forward              every backward
            ZeRO-3, last        forward, backward    last backward
            ZeRO-2, last        first forward        last backward

        The step's first gather and last reduction (unit `first`) have nothing to hide behind.
        """

        def beside(compute: Any, comm: Any) -> Any:
            if first:
                return compute + comm
            return overlapped_s(compute, comm, self.compute_slowdown, self.comm_slowdown)

        again = dp.reshard_after_forward
        gathered_forward = beside(forward_s + self.gather_copy_s, self.gather_s)
        copy, comm = (self.gather_copy_s, self.gather_s) if again else (0.0, 0.0)
        reduced = beside(backward_s + copy + self.reduce_copy_s, comm + self.reduce_s)
        if dp.sync_every:
            return gathered_forward, reduced, 0.0, 0.0
        kept = beside(backward_s + copy, comm) + self.accumulate_s
        if again:
            return gathered_forward, kept, 0.0, np.maximum(0.0, reduced - kept)
        return forward_s, kept, gathered_forward - forward_s, np.maximum(0.0, reduced - kept)
