"""Seconds of one kernel, of the optimizer and of the host: roofline on measured curves, pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import HardwareError
from ..hardware_profiles.device import (
    BACKWARD_ATTENTION_FLOPS,
    DeviceModel,
    ShapeTable,
    attention_features,
    attention_flops,
    attention_law_s,
    gemm_law_s,
)
from ..units import DTYPE_BYTES

NEIGHBOURS = 6
"""Measured shapes that correct the law at a new shape: 6 gave the smallest leave-one-out error but for 8 (4.3 %)."""


def kernel_s(
    kind: str,
    flops: float,
    bytes_moved: float,
    dims: Sequence[float],
    dtype: str,
    wrt: str,
    device: DeviceModel,
    *,
    fused: bool = False,
    sustained: bool = False,
    name: str = "",
) -> float:
    """Seconds of one kernel: the larger of its compute time and its memory time, never their sum.

        t = slowdown * max(floor, t_compute, bytes / bandwidth)

    gemm : law(flops) x exp(correction), the correction being the inverse-square-distance mean of ln(measured / law)
        of the nearest measured (m, n, k) on log axes, in the table of `wrt`; shapes whose contiguous dimensions
        are no multiple of 8 leave the fast kernels and are capped.
    attention : the same on (batch x heads, lengths, head size, mask, grouping); causal counts as half the FLOPs,
        backward as 2.5 times the forward.
    conv : FLOP/s by arithmetic intensity. embedding, memory : the curve of element-wise kernels by bytes, divided
        by the measured efficiency of the operator where the profile knows it by `name` (norms, softmax, casts).
    free : 0 (a view).

    Another dtype than the table's takes the compute time times the ratio of the dense peaks (float32 convolutions
    count as TF32 where the device has it, as torch runs them by default).

    Parameters
    ----------
    kind : gemm | attention | conv | embedding | memory | free
    flops, bytes_moved : FLOP and B of the kernel (distinct inputs read once, outputs written once).
    dims : gemm (batch, m, n, k) with out[m, n] = a[m, k] b[k, n]; attention (batch, heads, kv_heads, q_len, kv_len,
        head_dim, causal 0 or 1); otherwise not used.
    dtype : torch's name of the dtype that is computed in.
    wrt : "forward", or of a backward kernel "input", "weight" or "other".
    device : the profile's device.
    fused : under torch.compile, where memory-bound kernels are merged: their time is multiplied by the profile's
        fitted `fused_factor`, and the floor of an eager stream does not apply.
    sustained : cap matrix products at the rate the power limit allows for long (docs/hardware-profiles.md).
    name : the aten operator ("aten.native_layer_norm.default"), for kernels of kind memory.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    HardwareError
        The profile has no peak for `dtype`.
    ValueError
        `kind` is unknown.

    Examples
    --------
    >>> from ..hardware_profiles import load_profile
    >>> h100 = load_profile("h100-sxm").device
    >>> t = kernel_s("gemm", 2 * 8192**3, 3 * 2 * 8192**2, (1, 8192, 8192, 8192), "bfloat16", "forward", h100)
    >>> round(2 * 8192**3 / t / 1e12)  # TFLOP/s, as measured
    800
    >>> kernel_s("free", 0, 0, (), "bfloat16", "forward", h100)
    0.0
    """
    if kind == "free":
        return 0.0
    if kind in ("memory", "embedding"):
        return device.slowdown * _memory_s(kind, bytes_moved, dtype, wrt, device, fused, name)
    if kind == "gemm":
        compute = _gemm_s(flops, dims, dtype, wrt, device, sustained)
    elif kind == "attention":
        compute = _attention_s(dims, dtype, wrt, device)
    elif kind == "conv":
        compute = _convolution_s(flops, bytes_moved, dtype, wrt, device)
    else:
        raise ValueError(f"unknown kernel kind {kind!r}")
    floor = 0.0 if fused else device.kernel_floor_s
    return device.slowdown * max(compute, bytes_moved / device.memory_bandwidth, floor)


def optimizer_s(n_parameters: float, device: DeviceModel) -> float:
    """Seconds of one fused AdamW step on `n_parameters` held by this rank, never under the floor of a call.

    t = max(floor, bytes_per_parameter n / bandwidth); 28 B a parameter: float32 parameter, gradient and two
    moments read, three of them written.

    >>> from ..hardware_profiles import load_profile
    >>> round(optimizer_s(1e9, load_profile("h100-sxm").device), 4)
    0.011
    """
    if n_parameters <= 0:
        return 0.0
    traffic = device.optimizer_bytes_per_parameter * n_parameters
    return device.slowdown * max(device.optimizer_floor_s, traffic / device.optimizer_bandwidth)


def clip_s(n_parameters: float, device: DeviceModel) -> float:
    """Seconds of the gradient norm and of scaling by it (12 B a parameter in float32): max(floor, bytes / bandwidth).

    >>> from ..hardware_profiles import load_profile
    >>> round(clip_s(1e9, load_profile("h100-sxm").device), 4)
    0.0047
    """
    if n_parameters <= 0:
        return 0.0
    traffic = device.clip_bytes_per_parameter * n_parameters
    return device.slowdown * max(device.optimizer_floor_s, traffic / device.clip_bandwidth)


def host_floor_s(n_ops: float, device: DeviceModel, mode: str = "eager") -> float:
    """Seconds the host needs to issue `n_ops` operators (kernels of the eager trace): the GPU cannot go faster.

    mode : "eager" (one rank, or replicas), "fully_shard" (eager under FSDP over several ranks), "compiled"
        (torch.compile per block; still counted in eager operators).

    Raises
    ------
    ValueError
        `mode` is unknown.

    >>> from ..hardware_profiles import load_profile
    >>> round(host_floor_s(1000, load_profile("h100-sxm").device), 3)
    0.038
    """
    seconds = {
        "eager": device.host_eager_s_per_op,
        "fully_shard": device.host_fully_shard_s_per_op,
        "compiled": device.host_compiled_s_per_op,
    }
    if mode not in seconds:
        raise ValueError(f"unknown host mode {mode!r}")
    return device.slowdown * n_ops * seconds[mode]


def peak_flops(dtype: str, device: DeviceModel) -> float:
    """Dense peak of `dtype` in FLOP/s.

    Raises
    ------
    HardwareError
        The profile has no peak for `dtype`.
    """
    try:
        return device.peak_flops[dtype]
    except KeyError:
        known = ", ".join(sorted(device.peak_flops))
        raise HardwareError(
            f"The profile {device.name} has no peak rate for {dtype} (it has {known}).",
            "Use another precision, or add peak_flops to a copy of the profile and name it with --hardware.",
        ) from None


def _correction(table: ShapeTable, features: Sequence[float]) -> float:
    """exp of the inverse-square-distance mean of the log ratios of the nearest rows."""
    point = np.array(features)
    # |a - b|^2 without the constant |b|^2, which does not change the order.
    distance = table.squares - 2.0 * (table.features @ point)
    if len(distance) > NEIGHBOURS:
        nearest = distance.argpartition(NEIGHBOURS)[:NEIGHBOURS]
        distance, ratio = distance[nearest], table.log_ratio[nearest]
    else:
        ratio = table.log_ratio
    length = float(point @ point)
    total = weighted = 0.0
    for d, r in zip(distance.tolist(), ratio.tolist(), strict=True):
        weight = 1.0 / (max(d + length, 0.0) + 1e-9)
        total += weight
        weighted += weight * r
    return math.exp(weighted / total)


def _gemm_s(flops: float, dims: Sequence[float], dtype: str, wrt: str, device: DeviceModel, sustained: bool) -> float:
    gemm = device.gemm
    batch, m, n, k = dims
    if flops <= 0 or min(batch, m, n, k) <= 0:
        return 0.0
    table_peak = device.peak_flops[gemm.dtype]
    ratio = 1.0 if dtype == gemm.dtype else table_peak / peak_flops(dtype, device)
    seconds = float(gemm_law_s(flops, gemm, table_peak))
    table = gemm.tables.get(wrt if wrt in ("input", "weight") else "forward")
    if table is not None:
        # A batch of small products fills the device like one product with as many rows.
        seconds *= _correction(table, (math.log(batch * m), math.log(n), math.log(k)))
    if DTYPE_BYTES.get(dtype) == 2:
        # The dimensions that are contiguous in some operand; the tokens (m, or k of a weight gradient) never are.
        contiguous = (m, n) if wrt == "weight" else (n, k)
        seconds = max(seconds, flops / (_alignment_efficiency(contiguous, device) * table_peak))
    if sustained:
        seconds = max(seconds, flops / gemm.sustained_flops)
    return seconds * ratio


def _alignment_efficiency(contiguous: tuple[float, float], device: DeviceModel) -> float:
    """Largest efficiency that the alignment of the contiguous dimensions allows."""
    if any(size % 2 for size in contiguous if size > 1):
        return device.gemm.odd_efficiency
    if any(size % 8 for size in contiguous if size > 1):
        return device.gemm.even_efficiency
    return 1.0


def _attention_s(dims: Sequence[float], dtype: str, wrt: str, device: DeviceModel) -> float:
    attention = device.attention
    batch, heads, kv_heads, q_len, kv_len, head_dim, causal = dims
    if min(batch, heads, kv_heads, q_len, kv_len, head_dim) <= 0:
        return 0.0
    forward = wrt == "forward"
    flops = attention_flops(batch, heads, q_len, kv_len, head_dim, causal)
    flops *= 1.0 if forward else BACKWARD_ATTENTION_FLOPS
    table_peak = device.peak_flops[attention.dtype]
    ratio = 1.0 if dtype == attention.dtype else table_peak / peak_flops(dtype, device)
    efficiency = attention.forward_efficiency if forward else attention.backward_efficiency
    length = math.sqrt(q_len * kv_len)
    seconds = attention_law_s(flops, length, efficiency, attention.half_length, table_peak)
    table = attention.tables.get("forward" if forward else "backward")
    if table is not None:
        seconds *= _correction(table, attention_features(batch, heads, kv_heads, q_len, kv_len, head_dim, causal))
    return seconds * ratio


def _convolution_s(flops: float, bytes_moved: float, dtype: str, wrt: str, device: DeviceModel) -> float:
    if flops <= 0:
        return 0.0
    curve = device.convolution_forward if wrt == "forward" else device.convolution_backward
    # Above the last point the rate stays; below the first it falls with the intensity (a bandwidth).
    intensity = min(flops / max(bytes_moved, 1.0), curve.x[-1])
    table_peak = device.peak_flops[device.convolution_dtype]
    # torch lets cuDNN use TF32 for float32 convolutions (torch.backends.cudnn.allow_tf32), not for products.
    computed = "tf32" if dtype == "float32" and "tf32" in device.peak_flops else dtype
    ratio = 1.0 if computed == device.convolution_dtype else table_peak / peak_flops(computed, device)
    return flops / curve.at(intensity) * ratio


def _memory_s(
    kind: str, bytes_moved: float, dtype: str, wrt: str, device: DeviceModel, fused: bool, name: str
) -> float:
    if bytes_moved <= 0:
        return 0.0
    if kind == "embedding":
        forward = wrt == "forward"
        efficiency = device.embedding_forward_efficiency if forward else device.embedding_backward_efficiency
        return max(device.memory_time.at(bytes_moved) / efficiency, device.kernel_floor_s)
    seconds = device.memory_time.at(bytes_moved) / operator_efficiency(name, dtype, device)
    # A fused kernel has no launch of its own to wait for.
    return device.fused_factor * seconds if fused else max(seconds, device.kernel_floor_s)


def operator_efficiency(name: str, dtype: str, device: DeviceModel) -> float:
    """Rate of a memory-bound operator over that of an element-wise kernel of as many bytes; 1 if not measured.

    >>> from ..hardware_profiles import load_profile
    >>> operator_efficiency("aten.native_layer_norm.default", "bfloat16", load_profile("h200-sxm").device)
    0.62
    >>> operator_efficiency("aten.add.Tensor", "bfloat16", load_profile("h200-sxm").device)
    1.0
    """
    known = device.operator_efficiency
    base = name.removeprefix("aten.").partition(".")[0]
    return known.get(f"{base}.{dtype}", known.get(base, 1.0))
