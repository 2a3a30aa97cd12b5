"""Prices of one group of equal units for many meshes at once, as arrays: seconds and bytes of every choice.

Of a mesh only few numbers matter to a unit (`Flags`, `Point`); points with equal flags are priced together. Every
formula is that of `costmodels`: small tables (by microbatch size, by data-parallel degree) are filled by calling it,
and combined element by element, so one mesh alone has the same prices to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..costmodels.compute import clip_s, kernel_s, optimizer_s
from ..costmodels.fully_shard import Traffic
from ..costmodels.memory import (
    DataParallel,
    UnitParameters,
    backward_transient_bytes,
    ceil_div,
    kept_gathered_bytes,
    kept_gradient_bytes,
    sharded_state_bytes,
)
from .pins import RECOMPUTE
from .request import Request
from .unit_costs import gradient_sums_s, unit_collectives_s

if TYPE_CHECKING:
    from .choices import CostModel

SECONDS = (
    "forward_s",
    "backward_s",
    "first_forward_extra_s",
    "last_backward_extra_s",
    "tail_s",
    "weight_s",
)
BYTES = ("static_bytes", "saved_bytes", "transient_bytes")
PARTS = ("compute_s", "recompute_s", "tp_comm_s", "dp_comm_s", "once_dp_comm_s", "optimizer_s")


class Flags(NamedTuple):
    """What decides which formulas hold.

    piped : one stage of several; sequence : sequence parallel; every : gradients reduced each microbatch;
    stays : all gradients exist while activations are at their peak (more than one microbatch);
    sharded : dp_shard above 1
    """

    tp: int
    piped: bool
    sequence: bool
    every: bool
    stays: bool
    sharded: bool


class Point(NamedTuple):
    """The numbers of a mesh that a unit's prices depend on; strides are distances in ranks along an axis."""

    microbatch_size: int
    dp_shard: int
    dp_replicate: int
    tp_stride: int
    shard_stride: int
    replicate_stride: int


class Variant(NamedTuple):
    """One way to run a unit: recomputation, ZeRO level, cut by tp or whole on every rank of it."""

    recompute: str
    zero_stage: int
    sharding: str


@dataclass(slots=True)
class Points:
    """n points as columns, with the distinct rows of some of their columns."""

    columns: np.ndarray
    distinct: dict[tuple[int, ...], tuple[list[list[int]], np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Sequence[Point]) -> Points:
        """The points as an (n, 6) array."""
        return cls(np.array(points, dtype=np.int64).reshape(len(points), len(Point._fields)))

    def table(self, names: Sequence[str], price: Callable[..., Any], dtype: Any = np.float64) -> np.ndarray:
        """price(*values) for each point, called once for each distinct row of the named columns: (n, ...) array."""
        at = tuple(Point._fields.index(name) for name in names)
        if at not in self.distinct:
            rows, inverse = np.unique(self.columns[:, at], axis=0, return_inverse=True)
            self.distinct[at] = (rows.tolist(), inverse.reshape(-1))
        rows, inverse = self.distinct[at]
        return np.array([price(*row) for row in rows], dtype=dtype)[inverse]


@dataclass(frozen=True, slots=True)
class GroupPrices:
    """Numbers of the k variants of one group at n points.

    numbers : name (`SECONDS`, `BYTES`) -> (k, n) array
    parts : name (`PARTS`) -> (k, n) array [s]; empty unless asked for
    """

    variants: tuple[Variant, ...]
    numbers: dict[str, np.ndarray]
    parts: dict[str, np.ndarray]


def variants_of(model: CostModel, position: int, flags: Flags) -> tuple[Variant, ...]:
    """The ways in which the pins let the unit at `position` run."""
    facts, pins, fqn = model.facts[position], model.request.pins, model.graph.units[position].fqn
    owns = facts.own_group and flags.sharded
    # A pinned tp means that layers are cut by it, unless a layer's own pin lets it be.
    asked = pins.fixed("tp") is None or any(p.names(fqn) and p.axis == "sharding" for p in pins.layers())
    free = flags.tp > 1 and not flags.sequence and asked and model.may_replicate(position)
    found = []
    for sharding in ("tp", "replicate") if free else ("tp",):
        if free and not pins.allows_layer(fqn, sharding=sharding):
            continue
        for mode in RECOMPUTE if facts.may_recompute else ("none",):
            if facts.may_recompute and not pins.allows_layer(fqn, recompute=mode):
                continue
            for zero in (2, 3) if owns else (2,):
                if not owns or pins.allows_layer(fqn, zero_stage=zero):
                    found.append(Variant(mode, zero, sharding))
    return tuple(found)


def price_group(
    model: CostModel, position: int, flags: Flags, points: Points, *, with_parts: bool = False
) -> GroupPrices:
    """Price the unit at `position` (and all that equal it) at every point."""
    variants = variants_of(model, position, flags)
    rows: list[dict[str, np.ndarray]] = []
    for sharding in dict.fromkeys(v.sharding for v in variants):
        unit = _Unit(model, position, flags, points, sharding == "replicate")
        rows += [unit.price(v) for v in variants if v.sharding == sharding]
    n = len(points.columns)

    def stack(name: str, dtype: Any) -> np.ndarray:
        stacked = np.empty((len(rows), n), dtype)
        for place, row in enumerate(rows):
            stacked[place] = row[name]
        return stacked

    return GroupPrices(
        variants,
        {name: stack(name, np.float64) for name in SECONDS} | {name: stack(name, np.int64) for name in BYTES},
        {name: stack(name, np.float64) for name in PARTS} if with_parts else {},
    )


class _Unit:
    """One unit, cut by tp or whole, at many points: the tables that its variants share."""

    def __init__(self, model: CostModel, position: int, flags: Flags, points: Points, whole: bool) -> None:
        self.model, self.position, self.flags, self.points = model, position, flags, points
        self.own, self.before, self.after = model.neighbourhood(position, flags.tp, flags.piped, whole)
        tp, links = 1 if whole else flags.tp, model.link_clock

        def times(b: int) -> tuple[float, ...]:
            t = model.times(position, tp, b, flags.piped, flags.sequence)
            return t.forward_s, t.backward_s, t.again_selective_s, t.again_full_s, t.weight_s

        def memory(b: int) -> tuple[int, ...]:
            m = model.memory(position, tp, b, flags.sequence)
            return m.none, m.selective, m.full, m.workspace

        def collectives(b: int, stride: int) -> tuple[float, float]:
            return unit_collectives_s(model.class_sharding(position, flags.sequence), tp, stride, b, links)

        def sums(stride: int) -> float:
            return gradient_sums_s(model.class_sharding(position, flags.sequence), tp, stride, links)

        size = ["microbatch_size"]
        self.forward, self.backward, self.again_selective, self.again_full, self.weight = points.table(size, times).T
        self.none, self.selective, self.full, self.workspace = points.table(size, memory, np.int64).T
        self.tp_forward, self.tp_backward = points.table([*size, "tp_stride"], collectives).T
        self.sums = points.table(["tp_stride"], sums)
        self.optimizer = points.table(["dp_shard"], self._optimizer_s)
        self.shards = points.columns[:, Point._fields.index("dp_shard")]
        self.gradients = 4 * ceil_div(self.own.trainable, self.shards) * (not flags.stays)
        self._traffic = self._price_traffic()

    def data_parallel(self, zero_stage: int, dp_shard: Any = 1) -> DataParallel:
        """How the parameters live on the data-parallel ranks (the degree where a formula reads it)."""
        return data_parallel(self.model.request, zero_stage, self.flags, dp_shard)

    def price(self, variant: Variant) -> dict[str, Any]:
        """All numbers of one variant, (n,) each."""
        mode = variant.recompute
        none = np.zeros(len(self.points.columns))
        again = {"none": none, "selective": self.again_selective, "full": self.again_full}[mode]
        again_tp = self.tp_forward if mode == "full" else none
        forward = self.forward + self.tp_forward
        backward = self.backward + self.tp_backward + again + again_tp
        dp = self.data_parallel(variant.zero_stage)
        f, b, f_once, b_once = self._traffic.exposed(forward, backward, dp, first=self.position == 0)
        b, b_once = (b + self.sums, b_once) if self.flags.every else (b, b_once + self.sums)
        kept = {"none": self.none, "selective": self.selective, "full": self.full}[mode]
        return {
            "forward_s": f,
            "backward_s": b,
            "first_forward_extra_s": f_once,
            "last_backward_extra_s": b_once,
            "tail_s": self.optimizer,
            "weight_s": np.minimum(self.weight, b),
            "static_bytes": self._static(variant.zero_stage),
            "saved_bytes": np.maximum(kept, self.gradients),
            "transient_bytes": np.minimum(kept, self.gradients) + self._transient(variant.zero_stage, kept),
            "compute_s": self.forward + self.backward,
            "recompute_s": again,
            "tp_comm_s": self.tp_forward + self.tp_backward + again_tp,
            "dp_comm_s": f + b - forward - backward,
            "once_dp_comm_s": f_once + b_once,
            "optimizer_s": self.optimizer,
        }

    def _static(self, zero_stage: int) -> Any:
        """Bytes that stay on one rank."""
        parts = static_parts(self.own, self.data_parallel(zero_stage, self.shards))
        return sum(parts.values()) + self.model.buffer_bytes(self.position)

    def _transient(self, zero_stage: int, kept: np.ndarray) -> np.ndarray:
        """Bytes above that and above what is kept, while the unit runs backward."""
        dp = self.data_parallel(zero_stage, self.shards)
        return backward_transient_bytes(self.workspace + self.none - kept, self.own, self.before, self.after, dp)

    def _optimizer_s(self, shard: int) -> float:
        """The optimizer's step and the gradient norm on this rank's shard."""
        local = ceil_div(self.own.trainable, shard)
        return optimizer_s(local, self.model.device) + clip_s(local, self.model.device)

    def _price_traffic(self) -> Traffic:
        links, device, p = self.model.link_clock, self.model.device, self.own
        dp = self.data_parallel(3)

        def gather(shard: int, stride: int) -> float:
            return links.seconds("all_gather", dp.compute_bytes * p.total, shard, stride)

        def reduce(shard: int, stride: int) -> float:
            return links.seconds("reduce_scatter", dp.reduce_bytes * p.trainable, shard, stride)

        def replicate(shard: int, replicas: int, stride: int) -> float:
            return links.seconds("all_reduce", dp.reduce_bytes * ceil_div(p.trainable, shard), replicas, stride)

        def copy_s(n_bytes: float) -> float:
            if not n_bytes:
                return 0.0
            return kernel_s("memory", 0.0, n_bytes, (), "bfloat16", "forward", device)

        sharding, replicas = ["dp_shard", "shard_stride"], ["dp_shard", "dp_replicate", "replicate_stride"]
        return Traffic(
            gather_s=self.points.table(sharding, gather),
            reduce_s=self.points.table(sharding, reduce) + self.points.table(replicas, replicate),
            gather_copy_s=copy_s(2 * dp.compute_bytes * p.total),
            reduce_copy_s=copy_s((dp.compute_bytes + dp.reduce_bytes) * p.trainable),
            accumulate_s=copy_s((dp.compute_bytes + 2 * dp.reduce_bytes) * p.trainable),
            compute_slowdown=device.overlap_compute_slowdown,
            comm_slowdown=device.overlap_communication_slowdown,
        )


def data_parallel(
    request: Request, zero_stage: int, flags: Flags, dp_shard: Any, dp_replicate: int = 1
) -> DataParallel:
    """How parameters live on the data-parallel ranks under a request's precision and optimizer."""
    return DataParallel(
        dp_shard=dp_shard,
        dp_replicate=dp_replicate,
        reshard_after_forward=zero_stage == 3,
        sync_every=flags.every,
        several=flags.stays,
        compute_bytes=2 if request.precision == "bf16" else 4,
        optimizer_states=2 if request.optimizer == "adamw" else 0,
    )


def static_parts(p: UnitParameters, dp: DataParallel) -> dict[str, Any]:
    """Bytes of one unit's parameters that stay on one rank, by part."""
    per_copy = 4 * ceil_div(p.trainable, dp.dp_shard)
    state = sharded_state_bytes(p, dp)
    return {
        "parameters": state - per_copy * (1 + dp.optimizer_states),
        "gradients": kept_gradient_bytes(p, dp),
        "optimizer": per_copy * dp.optimizer_states,
        "gathered": kept_gathered_bytes(p, dp),
    }
