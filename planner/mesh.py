"""The meshes that are searched: the GPUs factored into degrees, with microbatches, schedule and order of the axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from ..costmodels.collectives import ranks_inside
from ..hardware_profiles.device import LinkModel
from .request import Request

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
# Orders of the axes, outermost first; the usual one is the first.
ORDERS = (AXES, *(order for order in permutations(AXES) if order != AXES))
LARGEST_MICROBATCH = 64
LARGEST_TP = 16
CHUNKS = range(2, 9)
# Interleaved chunks hold equal numbers of blocks, but for the first and the last, which may hold one block less.
LAYOUTS = ((0, 0), (0, 1), (1, 0), (1, 1))


@dataclass(frozen=True, slots=True, order=True)
class Mesh:
    """One combination; the field order breaks ties: fewer stages, less tp, fewer microbatches first.

    virtual : chunks a rank (1 but for interleaved)
    gradient_sync : gradients are reduced after "every" or the "last" microbatch
    schedule : 1f1b, gpipe, interleaved or zb (with one stage all are plain gradient accumulation, named 1f1b)
    order : index into `ORDERS`: which axes lie inside a node
    layout : index into `LAYOUTS`, for interleaved
    """

    pp: int
    tp: int
    virtual: int
    sequence_parallel: bool
    microbatches: int
    dp_replicate: int
    gradient_sync: str
    schedule: str
    dp_shard: int
    microbatch_size: int
    order: int = 0
    layout: int = 0

    @property
    def key(self) -> tuple:
        """The fields in their order: `Mesh(*key)` is this mesh again."""
        return tuple(getattr(self, name) for name in Mesh.__slots__)

    @property
    def dp(self) -> int:
        """Replicas that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """GPUs used."""
        return self.pp * self.dp * self.tp

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes, outermost first."""
        return ORDERS[self.order]

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours along `axis`.

        >>> mesh = Mesh(2, 4, 1, False, 8, 1, "last", "1f1b", 2, 1)
        >>> mesh.stride("tp"), mesh.stride("dp_shard"), mesh.stride("pp")
        (1, 4, 8)
        """
        inner = self.axes[self.axes.index(axis) + 1 :]
        stride = 1
        for name in inner:
            stride *= getattr(self, name)
        return stride

    def describe(self) -> str:
        """A short name, for people.

        >>> Mesh(2, 4, 1, False, 8, 1, "last", "1f1b", 2, 1).describe()
        'tp4 x pp2 x fsdp2'
        """
        parts = [("tp", self.tp), ("pp", self.pp), ("ddp", self.dp_replicate), ("fsdp", self.dp_shard)]
        return " x ".join(f"{name}{degree}" for name, degree in parts if degree > 1) or "one GPU"


def divisors(n: int) -> list[int]:
    """All divisors of n in rising order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def gradient_syncs(pp: int, microbatches: int) -> tuple[str, ...]:
    """When gradients may be reduced.

    With one microbatch "every" and "last" are the same. Pipelines reduce once a step: a reduction inside the
    schedule would stall its neighbours.
    """
    return ("last",) if pp > 1 or microbatches == 1 else ("every", "last")


@cache
def _orders_of(active: tuple[str, ...]) -> tuple[int, ...]:
    """Orders that differ in the sequence of the axes that have a degree above 1; the first of equal ones."""
    found: dict[tuple[str, ...], int] = {}
    for index, order in enumerate(ORDERS):
        found.setdefault(tuple(axis for axis in order if axis in active), index)
    return tuple(sorted(found.values()))


def axis_orders(pp: int, dp_replicate: int, dp_shard: int, tp: int, links: LinkModel) -> tuple[int, ...]:
    """Orders of the axes that differ in how many ranks of a group lie inside each domain of the links.

    Costs depend on nothing else of the order, so of equal ones the first stands for all.
    """
    degrees = dict(zip(AXES, (pp, dp_replicate, dp_shard, tp), strict=True))
    active = tuple(axis for axis in AXES if degrees[axis] > 1)
    found: dict[tuple[object, ...], int] = {}
    for index in _orders_of(active):
        stride = 1
        inside: dict[str, tuple[int, ...]] = {}
        for axis in reversed(ORDERS[index]):
            inside[axis] = ranks_inside(degrees[axis], stride, links)
            stride *= degrees[axis]
        found.setdefault(tuple(inside[axis] for axis in active), index)
    return tuple(sorted(found.values()))


@dataclass(frozen=True, slots=True)
class Space:
    """What the model allows.

    tp_degrees : tensor-parallel degrees
    sequence_degrees : those of them that may split the stream along its tokens too
    stages : the most stages that the legal cuts allow
    layouts : for pp x v chunks, the indices of the `LAYOUTS` under which interleaved chunks are near-equal
    """

    tp_degrees: tuple[int, ...]
    stages: int
    sequence_degrees: tuple[int, ...] = ()
    layouts: dict[int, tuple[int, ...]] | None = None


def enumerate_meshes(request: Request, space: Space, links: LinkModel) -> list[Mesh]:
    """Every mesh of the declared space that satisfies the pins, in tie-breaking order.

    The space: tp up to 16 (or a node) and legal for the model; pp up to the number of legal stages; dp_replicate x
    dp_shard the rest; microbatch sizes are the divisors up to 64 of a replica's share; 1F1B, GPipe and interleaved
    (zero-bubble where it is pinned); axes in any order. A mesh needs dp x microbatch size to divide the global batch,
    and a pipeline at least as many microbatches as stages.
    """
    pins = request.pins
    found = []
    for tp, pp in _degrees(request, space):
        dp = request.gpus // (tp * pp)
        if request.global_batch % dp or not pins.allows("dp", dp):
            continue
        shapes = list(_pipelines(request, space, pp, request.global_batch // dp))
        splits = [
            (dp // shard, shard)
            for shard in divisors(dp)
            if pins.allows("dp_shard", shard) and pins.allows("dp_replicate", dp // shard)
        ]
        sequences = [on for on in (False, True) if _sequence_allowed(request, space, tp, on)]
        for replicate, shard in splits:
            orders = axis_orders(pp, replicate, shard, tp, links)
            for schedule, virtual, layout, microbatches, size in shapes:
                for sync in gradient_syncs(pp, microbatches):
                    if not pins.allows("gradient_sync", sync):
                        continue
                    found += [
                        Mesh(pp, tp, virtual, on, microbatches, replicate, sync, schedule, shard, size, order, layout)
                        for on in sequences
                        for order in orders
                    ]
    return sorted(found)


def _degrees(request: Request, space: Space) -> Iterator[tuple[int, int]]:
    """Legal (tp, pp)."""
    most = max(LARGEST_TP, request.gpus_per_node)
    for tp in sorted(set(space.tp_degrees)):
        if request.gpus % tp == 0 and tp <= most and request.pins.allows("tp", tp):
            for pp in divisors(request.gpus // tp):
                if pp <= space.stages and request.pins.allows("pp", pp):
                    yield tp, pp


def _pipelines(request: Request, space: Space, pp: int, per_replica: int) -> Iterator[tuple[str, int, int, int, int]]:
    """(schedule, v, layout, microbatches, microbatch size) that a replica of so many samples may have."""
    pins = request.pins
    for size in divisors(per_replica):
        microbatches = per_replica // size
        fixed = pins.fixed("microbatch_size") == size
        if (size > LARGEST_MICROBATCH and not fixed) or microbatches < pp:
            continue
        if not (pins.allows("microbatch_size", size) and pins.allows("microbatches", microbatches)):
            continue
        if pp == 1:
            if pins.allows("virtual", 1):
                yield "1f1b", 1, 0, microbatches, size
            continue
        for schedule in pins.schedules():
            if schedule != "interleaved":
                if pins.allows("virtual", 1):
                    yield schedule, 1, 0, microbatches, size
                continue
            if microbatches % (microbatches // pp):
                continue
            for virtual in CHUNKS:
                for layout in (space.layouts or {}).get(pp * virtual, ()):
                    if pins.allows("virtual", virtual):
                        yield schedule, virtual, layout, microbatches, size


def _sequence_allowed(request: Request, space: Space, tp: int, on: bool) -> bool:
    """Whether sequence parallelism may be on (or off) with this degree."""
    if tp == 1:
        return not on
    return request.pins.allows("sequence_parallel", on) and (not on or tp in space.sequence_degrees)


def interleaved_ends(
    blocks: Iterable[int], cuts: Iterable[int], layers: int, chunks: int, layout: int
) -> tuple[int, ...] | None:
    """Where near-equal chunks end: None where the blocks do not divide, or no stage may end there.

    Parameters
    ----------
    blocks : positions of the blocks on the chain
    cuts : positions after which a stage may end
    layers : length of the chain
    layout : index into `LAYOUTS`

    >>> interleaved_ends(range(1, 9), range(10), 10, 4, 0), interleaved_ends(range(1, 8), range(10), 9, 4, 1)
    ((3, 5, 7, 10), (3, 5, 7, 9))
    """
    first, last = LAYOUTS[layout]
    places, legal = sorted(blocks), set(cuts)
    each, surplus = divmod(len(places) + first + last, chunks)
    if surplus or each - max(first, last) < 1:
        return None
    ends = []
    for c in range(1, chunks):
        block = c * each - first - 1
        beyond = places[block + 1]
        end = next((p for p in range(places[block], beyond) if p in legal), None)
        if end is None:
            return None
        ends.append(end + 1)
    return (*ends, layers)
