"""What a computation and a collective cost when they run side by side on one GPU: both slow down."""

from __future__ import annotations

from typing import Any

import numpy as np


def overlapped_s(compute_s: Any, comm_s: Any, compute_slowdown: float = 1.0, comm_slowdown: float = 1.0) -> Any:
    """Time until both a computation and a collective that start together have ended.

    While both run, compute advances at rate 1/compute_slowdown and communication at 1/comm_slowdown; when one
    ends, the other goes on at full speed:

        comm ends first   (c_m <= c_c):  c_m + compute - c_m / compute_slowdown
        compute ends first:              c_c + comm - c_c / comm_slowdown
        with c_m = comm * comm_slowdown, c_c = compute * compute_slowdown

    Parameters
    ----------
    compute_s, comm_s : float or array
        Seconds of each when alone.
    compute_slowdown, comm_slowdown : float
        Factors >= 1 by which each is slowed while the other runs (measured, from the hardware profile).

    Returns
    -------
    float or array
        Seconds; between max(compute_s, comm_s) and compute_s + comm_s where the slowdowns are not larger than
        running one after the other, which is then what is returned.

    Examples
    --------
    >>> overlapped_s(10.0, 4.0)
    10.0
    >>> overlapped_s(10.0, 4.0, compute_slowdown=1.25, comm_slowdown=1.5)
    11.2
    """
    comm_end = comm_s * comm_slowdown
    compute_end = compute_s * compute_slowdown
    total = np.where(
        comm_end <= compute_end,
        comm_end + compute_s - comm_end / compute_slowdown,
        compute_end + comm_s - compute_end / comm_slowdown,
    )
    total = np.minimum(total, compute_s + comm_s)
    return total if total.ndim else float(total)
