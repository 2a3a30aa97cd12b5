"""From a profile's checked content to the records of plain numbers that the cost functions take."""

from __future__ import annotations

import numpy as np

from .device import (
    BACKWARD_ATTENTION_FLOPS,
    AttentionModel,
    CollectiveModel,
    Curve,
    DeviceModel,
    GemmModel,
    LinkLevel,
    LinkModel,
    ShapeTable,
    attention_features,
    attention_flops,
    attention_law_s,
    gemm_law_s,
)
from .schema import AttentionSection, CollectiveSection, CurveRows, GemmSection, LinkSection, ProfileContent


def wire_bytes(op: str, n_bytes: float, size: int) -> float:
    """Bytes that one rank of `size` sends for a collective on a tensor of `n_bytes` (ring algorithms).

    all_gather, reduce_scatter (full tensor) and all_to_all (a rank's whole buffer): (g - 1) / g n;
    all_reduce: 2 (g - 1) / g n; send_recv: n (the message).
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 2005; nccl-tests, doc/PERFORMANCE.md.

    >>> wire_bytes("all_reduce", 100, 4)
    150.0
    """
    if op == "send_recv":
        return float(n_bytes)
    once = n_bytes * (size - 1) / size
    return 2 * once if op == "all_reduce" else once


def device_model(content: ProfileContent) -> DeviceModel:
    """The device of a profile."""
    compute, memory = content.compute, content.memory
    peaks = {name: figure.value for name, figure in compute.peak_flops.items()}
    shared = compute.shared_cores
    return DeviceModel(
        name=content.name,
        kind=content.kind,
        memory_bytes=int(memory.device_bytes.value),
        peak_flops=peaks,
        memory_bandwidth=compute.memory_bandwidth_bytes_per_s.value,
        memory_time=_curve(compute.memory_time_s),
        operator_efficiency={name: figure.value for name, figure in compute.operator_efficiency.items()},
        kernel_floor_s=compute.kernel_floor_s.value,
        gemm=_gemm(compute.gemm, peaks[compute.gemm.dtype]),
        attention=_attention(compute.attention, peaks[compute.attention.dtype]),
        embedding_forward_efficiency=compute.embedding_forward_efficiency.value,
        embedding_backward_efficiency=compute.embedding_backward_efficiency.value,
        convolution_dtype=compute.convolution.dtype,
        convolution_forward=_curve(compute.convolution.forward),
        convolution_backward=_curve(compute.convolution.backward),
        fused_factor=compute.fused_factor.value,
        optimizer_bytes_per_parameter=compute.optimizer.bytes_per_parameter.value,
        optimizer_bandwidth=compute.optimizer.bandwidth_bytes_per_s.value,
        optimizer_floor_s=compute.optimizer.floor_s.value,
        clip_bytes_per_parameter=compute.optimizer.clip_bytes_per_parameter.value,
        clip_bandwidth=compute.optimizer.clip_bandwidth_bytes_per_s.value,
        host_eager_s_per_op=content.host.eager_s_per_op.value,
        host_fully_shard_s_per_op=content.host.fully_shard_s_per_op.value,
        host_compiled_s_per_op=content.host.compiled_s_per_op.value,
        overlap_compute_slowdown=content.overlap.compute_slowdown.value,
        overlap_communication_slowdown=content.overlap.communication_slowdown.value,
        context_bytes=int(memory.context_bytes.value),
        nccl_base_bytes=int(memory.nccl_base_bytes.value),
        nccl_communicator_bytes=int(memory.nccl_communicator_bytes.value),
        reserve_fraction=memory.reserve_fraction.value,
        shared_cores=int(shared.value) if shared is not None else None,
    )


def link_model(content: ProfileContent) -> LinkModel:
    """The link levels of a profile."""
    return LinkModel(tuple(_level(section) for section in content.links))


def _curve(section: CurveRows) -> Curve:
    return Curve(tuple(x for x, _ in section.rows), tuple(y for _, y in section.rows))


def _gemm(section: GemmSection, peak: float) -> GemmModel:
    law = GemmModel(
        dtype=section.dtype,
        max_efficiency=section.max_efficiency.value,
        half_flops=section.half_flops.value,
        exponent=section.exponent.value,
        odd_efficiency=section.odd_efficiency.value,
        even_efficiency=section.even_efficiency.value,
        sustained_flops=section.sustained_flops.value,
        tables={},
    )
    if section.rows is None:
        return law
    tables = {}
    for wrt in ("forward", "input", "weight"):
        rows = np.array(getattr(section.rows, wrt), dtype=np.float64).reshape(-1, 4)
        if len(rows):
            expected = gemm_law_s(2 * rows[:, 0] * rows[:, 1] * rows[:, 2], law, peak)
            tables[wrt] = ShapeTable.of(np.log(rows[:, :3]), np.log(rows[:, 3] / expected))
    return GemmModel(**{name: getattr(law, name) for name in law.__slots__ if name != "tables"}, tables=tables)


def _attention(section: AttentionSection, peak: float) -> AttentionModel:
    efficiency = {"forward": section.forward_efficiency.value, "backward": section.backward_efficiency.value}
    half, tables = section.half_length.value, {}
    if section.rows is not None and section.rows.rows:
        features = np.array([attention_features(*row[:7]) for row in section.rows.rows])
        for index, wrt in ((7, "forward"), (8, "backward")):
            ratios = []
            for row in section.rows.rows:
                batch, heads, _, q_len, kv_len, head_dim, causal = row[:7]
                flops = attention_flops(batch, heads, q_len, kv_len, head_dim, causal)
                flops *= BACKWARD_ATTENTION_FLOPS if wrt == "backward" else 1.0
                law = attention_law_s(flops, (q_len * kv_len) ** 0.5, efficiency[wrt], half, peak)
                ratios.append(np.log(row[index] / law))
            tables[wrt] = ShapeTable.of(features, np.array(ratios))
    return AttentionModel(section.dtype, efficiency["forward"], efficiency["backward"], half, tables)


def _level(section: LinkSection) -> LinkLevel:
    default = CollectiveModel(
        launch_s=section.launch_s.value,
        step_s=section.latency_s.value,
        bandwidth=section.bandwidth_bytes_per_s.value,
    )
    operations = {op: _collective(op, rows) for op, rows in section.collectives.items()}
    return LinkLevel(section.name, section.size, default, operations)


def _collective(op: str, section: CollectiveSection) -> CollectiveModel:
    groups: dict[int, list[tuple[float, float]]] = {}
    for size, n_bytes, seconds in section.rows:
        groups.setdefault(size, []).append((wire_bytes(op, n_bytes, size), seconds))
    curves = {}
    for size, points in sorted(groups.items()):
        points.sort()
        curves[size] = Curve(tuple(x for x, _ in points), tuple(y for _, y in points))
    return CollectiveModel(section.launch_s, section.step_s, section.bandwidth_bytes_per_s, curves)
