"""What the cost functions see of a hardware profile: frozen records of plain numbers and numpy arrays."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """A positive function given at points, interpolated on log-log axes (`x` ascending, both positive).

    Outside the points the end value is scaled in proportion to x: a time curve keeps the bandwidth of its end.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    def at(self, x: float) -> float:
        """The value at `x` > 0.

        >>> Curve((1.0, 100.0), (2.0, 20.0)).at(10.0)  # halfway in the logarithms
        6.324555320336759
        >>> Curve((1.0, 100.0), (2.0, 20.0)).at(200.0)
        40.0
        """
        xs, ys = self.x, self.y
        if x <= xs[0]:
            return ys[0] * x / xs[0]
        if x >= xs[-1]:
            return ys[-1] * x / xs[-1]
        i = bisect_left(xs, x)
        share = math.log(x / xs[i - 1]) / math.log(xs[i] / xs[i - 1])
        return ys[i - 1] * (ys[i] / ys[i - 1]) ** share


@dataclass(frozen=True, slots=True)
class ShapeTable:
    """Measured kernels as corrections of a smooth law: nearest neighbours of `features` carry `log_ratio`.

    features : (rows, d), natural logarithms of the shape; log_ratio : (rows,), ln(measured / law);
    squares : (rows,), the squared length of each row of features.
    """

    features: Array
    log_ratio: Array
    squares: Array

    @classmethod
    def of(cls, features: Array, log_ratio: Array) -> ShapeTable:
        """A table with its squares."""
        return cls(features, log_ratio, (features**2).sum(axis=1))


@dataclass(frozen=True, slots=True)
class GemmModel:
    """Matrix products in one dtype: a saturating law of the FLOPs, corrected by measured rows where there are any.

    law: efficiency(f) = max_efficiency / (1 + (half_flops / f) ** exponent), relative to the dense peak of `dtype`.
    `odd_efficiency` and `even_efficiency` cap shapes whose contiguous dimensions are odd, or even but not a
    multiple of 8. `tables` has the keys forward, input, weight (or none at all).
    """

    dtype: str
    max_efficiency: float
    half_flops: float
    exponent: float
    odd_efficiency: float
    even_efficiency: float
    sustained_flops: float
    tables: Mapping[str, ShapeTable]


@dataclass(frozen=True, slots=True)
class AttentionModel:
    """Fused attention: law efficiency(s) = max / (1 + half_length / s), s = sqrt(q_len * kv_len), and measured rows.

    The FLOPs it is relative to count a causal mask as half. `tables` has forward and backward (or is empty).
    """

    dtype: str
    forward_efficiency: float
    backward_efficiency: float
    half_length: float
    tables: Mapping[str, ShapeTable]


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """One device: rates, curves, host costs and memory overheads, all in s, B, FLOP.

    `peak_flops` are dense peaks by torch dtype name. `memory_time` is seconds of a well-made element-wise kernel by
    bytes moved (read + written); `operator_efficiency` are the rates of named operators as fractions of it.
    `kernel_floor_s` is the least time of a kernel in an eager stream.
    `convolution_forward` / `_backward` are FLOP/s by arithmetic intensity (FLOP per byte moved).
    `fused_factor` is the time of compiled over eager memory-bound kernels. `slowdown` multiplies every kernel
    (1.0 unless processes share cores).
    """

    name: str
    kind: str
    memory_bytes: int
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    memory_time: Curve
    operator_efficiency: Mapping[str, float]
    kernel_floor_s: float
    gemm: GemmModel
    attention: AttentionModel
    embedding_forward_efficiency: float
    embedding_backward_efficiency: float
    convolution_dtype: str
    convolution_forward: Curve
    convolution_backward: Curve
    fused_factor: float
    optimizer_bytes_per_parameter: float
    optimizer_bandwidth: float
    optimizer_floor_s: float
    clip_bytes_per_parameter: float
    clip_bandwidth: float
    host_eager_s_per_op: float
    host_fully_shard_s_per_op: float
    host_compiled_s_per_op: float
    overlap_compute_slowdown: float
    overlap_communication_slowdown: float
    context_bytes: int
    nccl_base_bytes: int
    nccl_communicator_bytes: int
    reserve_fraction: float
    shared_cores: int | None = None
    slowdown: float = 1.0

    def shared_by(self, processes: int) -> DeviceModel:
        """The device as one of `processes` on a host: kernels slow by max(1, processes / shared_cores).

        Unchanged where the device is not shared (GPUs: `shared_cores` is None).
        """
        if self.shared_cores is None:
            return self
        return replace(self, slowdown=max(1.0, processes / self.shared_cores))


@dataclass(frozen=True, slots=True)
class CollectiveModel:
    """One collective on one level: launch_s + steps * step_s + wire bytes / bandwidth, or measured curves.

    `curves[g]` gives seconds of a group of g ranks by wire bytes per rank (see costmodels.collectives for the wire
    bytes and steps of each operation); empty where nothing was measured.
    """

    launch_s: float
    step_s: float
    bandwidth: float
    curves: Mapping[int, Curve] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LinkLevel:
    """One level of the network: `size` GPUs in a domain (None: as many as there are); `default` prices any
    operation that `operations` lacks."""

    name: str
    size: int | None
    default: CollectiveModel
    operations: Mapping[str, CollectiveModel] = field(default_factory=dict)

    def model(self, op: str) -> CollectiveModel:
        """The figures of one collective on this level."""
        return self.operations.get(op, self.default)


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Link levels from the innermost (inside a node) to the outermost (unlimited)."""

    levels: tuple[LinkLevel, ...]

    def with_node_size(self, gpus_per_node: int) -> LinkModel:
        """The same links with `gpus_per_node` GPUs in the innermost domain."""
        return LinkModel((replace(self.levels[0], size=gpus_per_node), *self.levels[1:]))

    def within(self, gpus: int) -> LinkModel:
        """The same links for a job of so many GPUs: a domain that holds them all has no borders."""
        whole = (level.size is not None and level.size >= gpus for level in self.levels)
        return LinkModel(tuple(replace(v, size=None) if w else v for v, w in zip(self.levels, whole, strict=True)))


def gemm_law_s(flops: float | Array, gemm: GemmModel, peak: float) -> float | Array:
    """Seconds of a matrix product by the smooth law: f / (peak * efficiency(f)).

    >>> law = GemmModel("bfloat16", 0.8, 1e9, 1.0, 0.1, 0.2, 1e12, {})
    >>> float(gemm_law_s(1e9, law, 1e12))  # at half_flops: 0.4 of the peak
    0.0025
    """
    return flops * (1 + (gemm.half_flops / flops) ** gemm.exponent) / (peak * gemm.max_efficiency)


def attention_law_s(flops: float, length: float, efficiency: float, half_length: float, peak: float) -> float:
    """Seconds of an attention kernel by the smooth law: f (1 + half_length / length) / (peak * efficiency)."""
    return flops * (1 + half_length / length) / (peak * efficiency)


def attention_flops(batch: float, heads: float, q_len: float, kv_len: float, head_dim: float, causal: float) -> float:
    """FLOPs of a forward attention, a causal mask counted as half: 4 b h q kv d (1 - causal / 2).

    >>> attention_flops(1, 2, 4, 4, 8, 0)
    1024.0
    """
    return 4.0 * batch * heads * q_len * kv_len * head_dim * (1 - 0.5 * causal)


BACKWARD_ATTENTION_FLOPS = 2.5
"""Backward over forward FLOPs of fused attention: five products against two (FlashAttention-2, Dao 2023)."""


def attention_features(
    batch: float, heads: float, kv_heads: float, q_len: float, kv_len: float, head_dim: float, causal: float
) -> tuple[float, ...]:
    """Where an attention call lies among the measured ones (natural logarithms; head size and mask weigh most)."""
    return (
        math.log(batch * heads),
        math.log(q_len),
        math.log(kv_len),
        4.0 * math.log(head_dim),
        4.0 * causal,
        0.5 * math.log(max(heads / kv_heads, 1.0)),
    )
