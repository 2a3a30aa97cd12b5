"""lb0 and the memory floor (`bounds`) of all meshes of a space at once, as array expressions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf

import numpy as np

from ..costmodels.schedules import in_flight_vectors
from .bounds import ROUNDING, least_in_flight, longest_rank, mixture, most_in_flight
from .candidate import Candidate
from .choices import CostModel
from .mesh import Mesh
from .pricing import Flags, GroupPrices


def space_candidates(model: CostModel, meshes: Sequence[Mesh]) -> list[Candidate]:
    """The candidates of a search, with their bounds."""
    bounds, floors = space_bounds(model, meshes)
    return [
        Candidate(mesh.key, partial(model.problem, mesh), bound_s, floor - model.active_limit(mesh))
        for mesh, bound_s, floor in zip(meshes, bounds.tolist(), floors.tolist(), strict=True)
    ]


def space_bounds(model: CostModel, meshes: Sequence[Mesh]) -> tuple[np.ndarray, np.ndarray]:
    """`lb0` [s] and `memory_floor` [B] of the problem of every mesh, without building it.

    Parameters
    ----------
    model : CostModel
    meshes : sequence of n Mesh

    Returns
    -------
    (n,) arrays
        A mesh without any choice for some layer (the pins forbid all) has infinite bounds.
    """
    model.prepare(meshes)
    bounds, floors = np.empty(len(meshes)), np.empty(len(meshes))
    if not meshes:
        return bounds, floors
    together: dict[int, list[int]] = {}
    for i, mesh in enumerate(meshes):
        together.setdefault(id(model.batch(mesh)[0]), []).append(i)
    for members in together.values():
        flags = model.batch(meshes[members[0]])[0].flags
        _bound_batch(model, flags, meshes, np.array(members), bounds, floors)
    fixed = model.step_fixed_s(meshes[0])
    return bounds * (1 - ROUNDING) + fixed, floors


def _bound_batch(
    model: CostModel, flags: Flags, meshes: Sequence[Mesh], members: np.ndarray, bounds: np.ndarray, floors: np.ndarray
) -> None:
    """Fill in the bounds of `members`, meshes with equal flags whose prices lie in one batch."""
    found = [model.batch(meshes[i]) for i in members]
    places = np.array([place for _, place in found])
    prices = found[0][0].groups
    groups = model.groups(flags.tp, flags.piped)
    counts = Counter(groups)
    m = np.array([meshes[i].microbatches for i in members])
    pp = np.array([meshes[i].pp for i in members])
    least = np.array([least_in_flight(meshes[i].schedule, meshes[i].pp, meshes[i].microbatches) for i in members])
    most = np.array([most_in_flight(meshes[i].schedule, meshes[i].pp, meshes[i].microbatches) for i in members])
    floors[members] = _memory_floor(prices, counts, places, pp, least, most)
    if not flags.piped:
        bounds[members] = sum(n * _least_step(prices[g], places, m) for g, n in counts.items())
        return
    work = {
        g: _least(prices[g], prices[g].numbers["forward_s"] + prices[g].numbers["backward_s"], places) for g in counts
    }
    total = sum(n * work[g] for g, n in counts.items())
    factor = [mixture(meshes[i].schedule, meshes[i].pp, meshes[i].microbatches) for i in members]
    bounds[members] = np.array(factor) * total
    chunked: dict[tuple[int, int, int], list[int]] = {}
    for k, i in enumerate(members):
        if meshes[i].virtual > 1:
            chunked.setdefault((meshes[i].pp, meshes[i].virtual, meshes[i].layout), []).append(k)
    for (stages, virtual, layout), those in chunked.items():
        ends = model.ends(stages * virtual, layout)
        assert ends is not None
        held = [Counter(groups[a:b]) for a, b in zip((0, *ends), ends, strict=False)]
        chunks = [sum(n * work[g][those] for g, n in counted.items()) for counted in held]
        bounds[members[those]] = longest_rank(np.array(chunks), stages, m[those])
        for count in np.unique(m[those]):
            some = [k for k in those if m[k] == count]
            vectors = in_flight_vectors("interleaved", stages, int(count), virtual)
            least_at = _LeastMemory(prices, places[some])
            needs = [_rank_floor(least_at, held, s, stages, max(vectors[s], key=sum)) for s in range(stages)]
            floors[members[some]] = np.maximum(floors[members[some]], np.maximum.reduce(needs))


def _least(prices: GroupPrices, values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The least over the variants at each place; inf without any."""
    return values[:, places].min(0, initial=inf)


def _least_step(prices: GroupPrices, places: np.ndarray, m: np.ndarray) -> np.ndarray:
    n = {name: values[:, places] for name, values in prices.numbers.items()}
    once = n["first_forward_extra_s"] + n["last_backward_extra_s"] + n["tail_s"]
    return (m * (n["forward_s"] + n["backward_s"]) + once).min(0, initial=inf)


def _least_memory(prices: GroupPrices, places: np.ndarray, x: np.ndarray | int) -> np.ndarray:
    n = prices.numbers
    held = n["static_bytes"][:, places] + x * n["saved_bytes"][:, places]
    return held.astype(np.float64).min(0, initial=inf)


class _LeastMemory(dict[tuple[int, int], np.ndarray]):
    """(group, x) -> the least static + x saved of a unit of the group at each place."""

    def __init__(self, prices: dict[int, GroupPrices], places: np.ndarray) -> None:
        super().__init__()
        self.prices, self.places = prices, places

    def __missing__(self, key: tuple[int, int]) -> np.ndarray:
        group, x = key
        self[key] = _least_memory(self.prices[group], self.places, x)
        return self[key]


def _rank_floor(
    least: _LeastMemory, held: Sequence[Counter[int]], s: int, stages: int, vector: Sequence[int]
) -> np.ndarray:
    """The least that rank s's given chunks (`held` by group) keep with `vector` microbatches in flight."""
    total = np.zeros(len(least.places))
    for counted, x in zip(held[s::stages], vector, strict=True):
        for g, n in counted.items():
            total = total + n * least[g, x]
    return total


def _memory_floor(
    prices: dict[int, GroupPrices],
    counts: Mapping[int, int],
    places: np.ndarray,
    pp: np.ndarray,
    least: np.ndarray,
    most: np.ndarray,
) -> np.ndarray:
    """Lower bound of the least limit under which anything fits, however the layers are split [B].

    With x_s microbatches in flight on rank s (from `most` down to `least`) and any weights u_s > 0: the limit times
    sum_s u_s is at least sum over layers of min over s and choices of u_s (static + x_s saved). The weights are
    1 / (S + x_s A) with the least static bytes S and saved bytes A of all layers together; then the minimum over s of
    a quotient of two lines in x lies at one of the ends.
    """
    zero = np.zeros(len(places))
    static = sum((n * _number(prices[g], "static_bytes", places) for g, n in counts.items()), zero)
    saved = sum((n * _number(prices[g], "saved_bytes", places) for g, n in counts.items()), zero)
    weights = np.zeros(len(places))
    for stages, low, high in np.unique(np.stack([pp, least, most], 1), axis=0):
        those = (pp == stages) & (least == low) & (most == high)
        x = np.linspace(high, low, stages)  # 1F1B: pp, pp - 1, ... 1; the others: equal on all ranks
        weights[those] = (1 / np.maximum(1.0, static[those, None] + x * saved[those, None])).sum(1)
    ends = [1 / np.maximum(1.0, static + x * saved) for x in (least, most)]
    held = sum(
        n * np.minimum(*(u * _least_memory(prices[g], places, x) for u, x in zip(ends, (least, most), strict=True)))
        for g, n in counts.items()
    )
    transient = np.minimum.reduce([_number(prices[g], "transient_bytes", places) for g in counts])
    return held / weights * (1 - ROUNDING) + transient


def _number(prices: GroupPrices, name: str, places: np.ndarray) -> np.ndarray:
    return prices.numbers[name][:, places].astype(np.float64).min(0, initial=inf)
