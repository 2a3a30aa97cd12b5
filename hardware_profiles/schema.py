"""The file format of a hardware profile: strict keys, and a source and a kind of evidence for every figure."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Evidence = Literal["datasheet", "measured", "fitted", "published", "assumed"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["float64", "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "int8"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Sourced(_Section):
    """Anything with a number in it says where the number is from, and how well it is known."""

    source: Annotated[str, Field(min_length=8)]
    evidence: Evidence


class Figure(_Sourced):
    """One number in base SI units (s, B, FLOP/s, B/s, or a ratio)."""

    value: Annotated[float, Field(ge=0)]


class MemorySection(_Section):
    """What of the device's memory a plan may use, and what goes before the first tensor.

    device_bytes : what the driver offers; context_bytes : a bare CUDA context; nccl_base_bytes : libraries
    and the first process group; nccl_communicator_bytes : each communicator; reserve_fraction : reserved by the
    allocator above the peak of active bytes, as a fraction of that peak.
    """

    device_bytes: Figure
    context_bytes: Figure
    nccl_base_bytes: Figure
    nccl_communicator_bytes: Figure
    reserve_fraction: Figure


GemmRow = tuple[Positive, Positive, Positive, Positive]


class GemmRows(_Sourced):
    """Measured products out[m, n] = a[m, k] b[k, n]: rows of (m, n, k, seconds) by what they compute."""

    forward: list[GemmRow]
    input: list[GemmRow]
    weight: list[GemmRow]


class GemmSection(_Section):
    """Matrix products; `max_efficiency`, `half_flops`, `exponent` are the law of device.GemmModel."""

    dtype: Dtype
    max_efficiency: Figure
    half_flops: Figure
    exponent: Figure
    odd_efficiency: Figure
    even_efficiency: Figure
    sustained_flops: Figure
    rows: GemmRows | None


AttentionRow = tuple[Positive, Positive, Positive, Positive, Positive, Positive, Literal[0, 1], Positive, Positive]


class AttentionRows(_Sourced):
    """Measured fused attention: (batch, heads, kv_heads, q_len, kv_len, head_dim, causal, forward s, backward s)."""

    rows: list[AttentionRow]


class AttentionSection(_Section):
    """Fused attention; efficiencies count a causal mask as half the FLOPs."""

    dtype: Dtype
    backend: str
    forward_efficiency: Figure
    backward_efficiency: Figure
    half_length: Figure
    rows: AttentionRows | None


class CurveRows(_Sourced):
    """Points (x, y), x ascending, y positive."""

    rows: Annotated[list[tuple[Positive, Positive]], Field(min_length=1)]

    @field_validator("rows")
    @classmethod
    def _ascending(cls, rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
        if any(a[0] >= b[0] for a, b in pairwise(rows)):
            raise ValueError("the first column must ascend")
        return rows


class ConvolutionSection(_Section):
    """FLOP/s of convolutions by arithmetic intensity (FLOP per byte moved)."""

    dtype: Dtype
    layout: Literal["nchw", "channels_last"]
    forward: CurveRows
    backward: CurveRows


class OptimizerSection(_Section):
    """Fused AdamW and gradient clipping as traffic over a bandwidth, with a floor per call."""

    bytes_per_parameter: Figure
    bandwidth_bytes_per_s: Figure
    floor_s: Figure
    clip_bytes_per_parameter: Figure
    clip_bandwidth_bytes_per_s: Figure


class ComputeSection(_Section):
    """Rates of one device.

    `operator_efficiency`: rates of named memory-bound operators as fractions of `memory_time_s`, by aten name
    ("native_layer_norm"), or by name and output dtype ("_to_copy.float32"). `shared_cores` where processes share
    a host's cores (CPU), else null.
    """

    peak_flops: dict[Dtype, Figure]
    memory_bandwidth_bytes_per_s: Figure
    memory_time_s: CurveRows
    operator_efficiency: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9]+)?$")], Figure]
    kernel_floor_s: Figure
    gemm: GemmSection
    attention: AttentionSection
    embedding_forward_efficiency: Figure
    embedding_backward_efficiency: Figure
    convolution: ConvolutionSection
    fused_factor: Figure
    optimizer: OptimizerSection
    shared_cores: Figure | None

    @model_validator(mode="after")
    def _peaks(self) -> ComputeSection:
        for name, dtype in (
            ("gemm", self.gemm.dtype),
            ("attention", self.attention.dtype),
            ("convolution", self.convolution.dtype),
        ):
            if dtype not in self.peak_flops:
                raise ValueError(f"peak_flops lacks {dtype!r}, the dtype of {name}")
        return self


class HostSection(_Section):
    """Host seconds per operator: plain eager, eager under fully_shard over several ranks, compiled."""

    eager_s_per_op: Figure
    fully_shard_s_per_op: Figure
    compiled_s_per_op: Figure


class OverlapSection(_Section):
    """How much longer compute and collectives take while they run together (>= 1)."""

    compute_slowdown: Figure
    communication_slowdown: Figure


class CollectiveSection(_Sourced):
    """One collective on one level: launch_s + steps * step_s + wire bytes / bandwidth, and measured rows
    (group size, bytes, seconds) that go before the formula."""

    launch_s: Annotated[float, Field(ge=0)]
    step_s: Annotated[float, Field(ge=0)]
    bandwidth_bytes_per_s: Positive
    rows: list[tuple[Annotated[int, Field(ge=2)], Positive, Positive]]


class LinkSection(_Section):
    """One level of links. `size`: GPUs in a domain, null for as many as there are. `bandwidth` is one way per GPU;
    launch_s and latency_s (a step between two GPUs) price what `collectives` does not list."""

    name: str
    size: Annotated[int, Field(ge=1)] | None
    bandwidth_bytes_per_s: Figure
    latency_s: Figure
    launch_s: Figure
    collectives: dict[Collective, CollectiveSection]


class ProfileContent(_Section):
    """A whole profile file."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str
    kind: Literal["cuda", "cpu"]
    device_names: list[str]
    gpus_per_node: Figure
    memory: MemorySection
    compute: ComputeSection
    host: HostSection
    overlap: OverlapSection
    links: Annotated[list[LinkSection], Field(min_length=1)]

    @model_validator(mode="after")
    def _nested(self) -> ProfileContent:
        sizes = [level.size for level in self.links]
        if sizes[-1] is not None:
            raise ValueError("the last link level must have size null (unlimited)")
        inner = sizes[:-1]
        if any(size is None for size in inner):
            raise ValueError("only the last link level may have size null")
        known = [size for size in inner if size is not None]
        if known != sorted(set(known)):
            raise ValueError("link levels must grow from the innermost domain outwards")
        return self
