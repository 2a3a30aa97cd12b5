"""The meshes that are searched: every way to factor the GPUs into degrees, with microbatches and ZeRO level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .pins import Pins
from .request import Request

MICROBATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, order=True)
class Mesh:
    """One candidate; the field order breaks ties: fewer stages, less tp, larger microbatches first.

    schedule is "1f1b" or "gpipe" (with one stage both are plain gradient accumulation, named 1f1b).
    zero_stage 3 reshards after forward, 2 does not; gradient_sync is "every" or "last" microbatch.
    """

    pp: int
    tp: int
    microbatches: int
    dp_replicate: int
    zero_stage: int
    gradient_sync: str
    schedule: str
    dp_shard: int
    microbatch_size: int

    @property
    def dp(self) -> int:
        """Replicas that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """GPUs used."""
        return self.pp * self.dp * self.tp

    def describe(self) -> str:
        """A short name, for people.

        >>> Mesh(2, 4, 8, 1, 3, "last", "1f1b", 2, 1).describe()
        'tp4 x pp2 x fsdp2'
        """
        parts = [("tp", self.tp), ("pp", self.pp), ("ddp", self.dp_replicate), ("fsdp", self.dp_shard)]
        return " x ".join(f"{name}{degree}" for name, degree in parts if degree > 1) or "one GPU"


def divisors(n: int) -> list[int]:
    """All divisors of n in rising order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


def data_parallel_modes(pp: int, dp_shard: int, microbatches: int) -> Iterator[tuple[int, str]]:
    """(zero_stage, gradient_sync) pairs that differ for this mesh.

    Without sharding there is nothing to reshard: ZeRO 2 stands for both. With one microbatch "every" and "last"
    are the same. Pipelines reduce once a step: a reduction inside the schedule would stall its neighbours.
    """
    zero_stages = (3, 2) if dp_shard > 1 else (2,)
    if pp > 1 or microbatches == 1:
        syncs = ("last",)
    else:
        syncs = ("every", "last")
    for zero_stage in zero_stages:
        for sync in syncs:
            yield zero_stage, sync


def enumerate_meshes(request: Request, tp_degrees: Iterable[int], max_stages: int) -> list[Mesh]:
    """Every mesh of the declared space that satisfies the pins, in tie-breaking order.

    The space: tp divides one node and is legal for the model; pp up to the number of legal stages; dp_replicate x
    dp_shard the rest; microbatch sizes 1, 2, 4 ... 64; 1F1B, or GPipe where it is pinned (it holds all
    microbatches in memory and gains at most the latency of transfers). A mesh needs dp x microbatch size to divide
    the global batch, and a pipeline at least as many microbatches as stages.
    """
    pins = request.pins
    schedules = tuple(name for name in pins.schedules() if name in ("1f1b", "gpipe"))
    schedules = schedules if pins.of("schedule") else schedules[:1]
    node = min(request.gpus, request.gpus_per_node)
    found = []
    for tp in sorted(set(tp_degrees)):
        if request.gpus % tp or node % tp:
            continue
        for pp in divisors(request.gpus // tp):
            if pp > max_stages:
                break
            dp = request.gpus // (tp * pp)
            if request.global_batch % dp:
                continue
            per_replica = request.global_batch // dp
            sizes = pins.microbatch_sizes(MICROBATCH_SIZES)
            for size in sorted(s for s in sizes if per_replica % s == 0):
                microbatches = per_replica // size
                if microbatches < pp:
                    continue
                for dp_shard in divisors(dp):
                    for zero_stage, sync in data_parallel_modes(pp, dp_shard, microbatches):
                        for schedule in schedules if pp > 1 else ("1f1b",):
                            found.append(
                                Mesh(
                                    pp=pp,
                                    tp=tp,
                                    microbatches=microbatches,
                                    dp_replicate=dp // dp_shard,
                                    zero_stage=zero_stage,
                                    gradient_sync=sync,
                                    schedule=schedule,
                                    dp_shard=dp_shard,
                                    microbatch_size=size,
                                )
                            )
    return sorted(mesh for mesh in found if satisfies(mesh, pins))


def satisfies(mesh: Mesh, pins: Pins) -> bool:
    """Whether a mesh is allowed by the pins.

    `recompute` is pinned inside the problem; a schedule has no meaning with one stage, a ZeRO stage none without
    sharding.
    """
    axes = ["tp", "pp", "dp", "dp_replicate", "dp_shard", "microbatch_size", "microbatches", "gradient_sync"]
    axes += ["schedule"] if mesh.pp > 1 else []
    axes += ["zero_stage"] if mesh.dp_shard > 1 else []
    return all(pins.allows(axis, getattr(mesh, axis)) for axis in axes)
