"""Seconds of one collective on the link levels that its group spans: measured curves, else latency + bytes / bandwidth.

A group of g ranks, `stride` ranks apart, has g_0 ranks inside a node, g_1 inside the next domain, ..., g_L = g:

    level 0  |r0 r1 r2 r3|  |r4 r5 r6 r7|     g_0 = 4   every rank talks to its neighbours
    level 1  |--------------------------|     g_1 = 8   each of the 4 ranks of a node has a network card of its own

Ring collectives move x bytes through every rank (`wire_bytes`). Inside a node all x pass each rank's link; between
domains the rings are striped over the g_{l-1} ranks of a domain, so each uplink carries x / g_{l-1}. The levels
work at the same time, chunk by chunk:

    t = max_l transfer_l + sum_l latency_l,    transfer_0 = T_0(x),  transfer_l = x / (g_{l-1} bandwidth_l)

(NCCL's multi-node rings; Thakur, Rabenseifner and Gropp 2005 for the counts.) Groups of other offsets in
the same nodes use the other cards, so they do not slow each other.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ..hardware_profiles.convert import wire_bytes
from ..hardware_profiles.device import CollectiveModel, LinkModel

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


def collective_s(op: str, n_bytes: float, size: int, stride: int, links: LinkModel) -> float:
    """Seconds of one collective over a group of `size` ranks whose ranks lie `stride` apart.

        t = max_l transfer_l + sum_l latency_l        (0 for one rank or no bytes)

    Parameters
    ----------
    op : all_reduce | all_gather | reduce_scatter | all_to_all | send_recv
    n_bytes : bytes of the full (unsharded) tensor for all_reduce, all_gather and reduce_scatter; of one rank's whole
        buffer for all_to_all; of the message for send_recv.
    size : ranks in the group; for send_recv the number of stages along the axis (1 sends nothing).
    stride : distance between neighbours in ranks (tensor parallel 1, then times the inner degrees).
    links : the profile's levels.

    Returns
    -------
    float
        Seconds on the device, without the host's time to issue the call.

    Raises
    ------
    ValueError
        Unknown `op`, or a size or stride below 1.

    Examples
    --------
    >>> from ..hardware_profiles.device import CollectiveModel, LinkLevel, LinkModel
    >>> node = LinkLevel("node", 4, CollectiveModel(0.0, 0.0, 100.0))
    >>> wide = LinkLevel("network", None, CollectiveModel(0.0, 0.0, 10.0))
    >>> links = LinkModel((node, wide))
    >>> collective_s("all_gather", 400, 4, 1, links)  # 3/4 of 400 B at 100 B/s
    3.0
    >>> collective_s("all_gather", 400, 8, 1, links)  # 350 B over 4 cards of 10 B/s
    8.75
    >>> collective_s("all_gather", 400, 2, 4, links)  # one rank a node: 200 B over one card
    20.0
    """
    if op not in COLLECTIVES:
        raise ValueError(f"unknown collective {op!r}")
    if size < 1 or stride < 1:
        raise ValueError(f"group of size {size} and stride {stride}")
    if size == 1 or n_bytes <= 0:
        return 0.0
    inside = ranks_inside(size, stride, links)
    if op == "send_recv":
        return _send_s(n_bytes, inside, links)
    transfer, latency = 0.0, 0.0
    below = 1
    for level, here in zip(links.levels, inside, strict=True):
        if here > below:
            model = level.model(op)
            level_latency, level_transfer = _level_s(
                op, model, _wire(op, n_bytes, size, here, below), math.ceil(here / below), below
            )
            latency += level_latency
            transfer = max(transfer, level_transfer)
        below = here
    return transfer + latency


def ranks_inside(size: int, stride: int, links: LinkModel) -> tuple[int, ...]:
    """How many ranks of the group lie inside one domain of each level, for the group that is worst off.

    The largest divisor d of `size` for which d ranks, `stride` apart, fill domains without one of them lying in two:
    all groups step together, so one that straddles domains (3 ranks in nodes of 8) slows them all.

    >>> from ..hardware_profiles import load_profile
    >>> links = load_profile("h100-sxm").links
    >>> ranks_inside(16, 2, links), ranks_inside(3, 1, links), ranks_inside(6, 1, links)
    ((4, 16), (1, 3), (2, 6))
    """
    return _inside(size, stride, tuple(level.size for level in links.levels))


@lru_cache(maxsize=65536)
def _inside(size: int, stride: int, domains: tuple[int | None, ...]) -> tuple[int, ...]:
    inside = []
    for domain in domains:
        fits = (d for d in range(size, 0, -1) if size % d == 0 and (domain is None or domain % (d * stride) == 0))
        inside.append(next(fits, 1))
    return tuple(inside)


def _send_s(n_bytes: float, inside: tuple[int, ...], links: LinkModel) -> float:
    """A message between neighbours, on the outermost level that the axis crosses (its slowest hop)."""
    level = next(i for i, here in enumerate(inside) if here == inside[-1])
    latency, transfer = _level_s("send_recv", links.levels[level].model("send_recv"), n_bytes, 2, 1)
    return latency + transfer


def _wire(op: str, n_bytes: float, size: int, here: int, below: int) -> float:
    """Bytes that a rank sends over its own link of a level where its domain holds `here` ranks of the group.

    Rings: x / below. all_to_all: the parts for ranks that share this domain but not the one below.
    """
    if op == "all_to_all":
        return n_bytes * (here - below) / size
    return wire_bytes(op, n_bytes, size) / below


def _steps(op: str, size: int) -> int:
    """Dependent messages: a ring's size - 1, a tree's 2 ceil(log2 size) for all_reduce, 1 for a message."""
    if op == "all_reduce":
        return 2 * math.ceil(math.log2(size))
    return 1 if op == "send_recv" else size - 1


def _level_s(op: str, model: CollectiveModel, wire: float, size: int, below: int) -> tuple[float, float]:
    """(latency, transfer) of one level; a measured curve holds both, and is taken where ranks talk one to one."""
    latency = model.launch_s + _steps(op, size) * model.step_s
    if not model.curves or below > 1:
        return latency, wire / model.bandwidth
    sizes = list(model.curves)
    smaller = max((g for g in sizes if g <= size), default=sizes[0])
    larger = min((g for g in sizes if g >= size), default=sizes[-1])
    seconds = _measured_s(op, model, smaller, wire)
    if size > larger:
        return (_steps(op, size) - _steps(op, larger)) * model.step_s, seconds
    if larger > smaller:
        share = math.log(size / smaller) / math.log(larger / smaller)
        seconds += share * (_measured_s(op, model, larger, wire) - seconds)
    return 0.0, seconds


def _measured_s(op: str, model: CollectiveModel, size: int, wire: float) -> float:
    """The curve of a measured group size; small messages take the latency, but no more than the first point."""
    curve = model.curves[size]
    floor = model.launch_s + _steps(op, size) * model.step_s
    return max(curve.at(wire), min(floor, curve.y[0]))
