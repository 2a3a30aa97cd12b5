"""Kernels: measured rows given back, unseen shapes predicted, and the effects that a planner must see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpplan.costmodels.compute import clip_s, host_floor_s, kernel_s, optimizer_s
from tpplan.errors import HardwareError
from tpplan.hardware_profiles import list_profiles, load_profile
from tpplan.hardware_profiles.device import DeviceModel, ShapeTable, attention_flops

H100 = load_profile("h100-sxm").device
A100 = load_profile("a100-sxm-80g").device


def gemm_s(m: int, n: int, k: int, wrt: str = "forward", device: DeviceModel = H100, dtype: str = "bfloat16") -> float:
    moved = 2 * (m * n + n * k + m * k)
    return kernel_s("gemm", 2 * m * n * k, moved, (1, m, n, k), dtype, wrt, device)


def rate(m: int, n: int, k: int, **options) -> float:
    return 2 * m * n * k / gemm_s(m, n, k, **options) / 1e12


def without_row(table: ShapeTable, i: int) -> ShapeTable:
    return ShapeTable(*(np.delete(a, i, axis=0) for a in (table.features, table.log_ratio, table.squares)))


@pytest.mark.parametrize("name", ["h100-sxm", "h200-sxm", "cpu-gloo"])
def test_measured_products_are_given_back(name):
    profile = load_profile(name)
    rows = profile.content.compute.gemm.rows
    assert rows is not None
    errors = []
    for wrt in ("forward", "input", "weight"):
        for m, n, k, seconds in getattr(rows, wrt):
            if seconds > profile.device.kernel_floor_s:
                dtype = profile.content.compute.gemm.dtype
                predicted = kernel_s("gemm", 2 * m * n * k, 0, (1, m, n, k), dtype, wrt, profile.device)
                errors.append(abs(predicted / seconds - 1))
    assert len(errors) > 60
    assert np.median(errors) < 1e-3
    assert np.quantile(errors, 0.95) < 0.03


@pytest.mark.parametrize("wrt", ["forward", "input", "weight"])
def test_products_of_unseen_shapes_are_predicted(wrt):
    """Leave one out: the row is taken from the table before it is predicted."""
    profile = load_profile("h100-sxm")
    table, rows = H100.gemm.tables[wrt], profile.content.compute.gemm.rows
    assert rows is not None
    errors = []
    for i, (m, n, k, seconds) in enumerate(getattr(rows, wrt)):
        gemm = replace(H100.gemm, tables={wrt: without_row(table, i)})
        predicted = kernel_s("gemm", 2 * m * n * k, 0, (1, m, n, k), "bfloat16", wrt, replace(H100, gemm=gemm))
        errors.append(abs(predicted / seconds - 1))
    assert len(errors) > 500
    assert np.median(errors) <= 0.06
    assert np.quantile(errors, 0.9) <= 0.16


@pytest.mark.parametrize(("wrt", "column"), [("forward", 7), ("backward", 8)])
def test_attention_rows_are_given_back_and_unseen_ones_predicted(wrt, column):
    profile = load_profile("h100-sxm")
    section = profile.content.compute.attention.rows
    assert section is not None
    exact, unseen = [], []
    for i, row in enumerate(section.rows):
        kind = "forward" if wrt == "forward" else "other"
        exact.append(abs(kernel_s("attention", 0, 0, row[:7], "bfloat16", kind, H100) / row[column] - 1))
        attention = replace(H100.attention, tables={wrt: without_row(H100.attention.tables[wrt], i)})
        device = replace(H100, attention=attention)
        unseen.append(abs(kernel_s("attention", 0, 0, row[:7], "bfloat16", kind, device) / row[column] - 1))
    assert len(exact) > 60
    assert max(exact) < 0.02
    assert np.median(unseen) <= 0.05
    assert np.quantile(unseen, 0.9) <= 0.15


def test_tensor_parallel_shrinks_the_rate_of_a_product():
    tokens, hidden, ffn = 4096, 4096, 14336
    rates = [rate(tokens, ffn // tp, hidden) for tp in (1, 2, 4, 8)]
    assert 700 < rates[0] < 850
    assert rates[3] < 0.97 * rates[0]
    small = [rate(1024, 1024 // tp, 1024) for tp in (1, 2, 4)]
    assert small[0] > 1.3 * small[1] > 1.5 * small[2]


def test_odd_vocabularies_leave_the_fast_kernels():
    """Measured: odd vocabularies 89-150 TFLOP/s, even ones 240-280, multiples of 8 about 700."""
    assert 89 < rate(8192, 50257, 1600) < 150
    assert 240 < rate(8192, 50258, 1600) < 280
    assert rate(8192, 50304, 1600) > 500
    assert 89 < rate(8192, 1600, 50257, wrt="input") < 150
    assert 89 < rate(50257, 1600, 8192, wrt="weight") < 150
    assert rate(8191, 4096, 4096) > 500  # the tokens are contiguous in no operand
    assert rate(4096, 4096, 8191, wrt="weight") > 500


def test_float32_is_slower_by_the_ratio_of_the_peaks():
    ratio = H100.peak_flops["bfloat16"] / H100.peak_flops["float32"]
    assert gemm_s(4096, 4096, 4096, dtype="float32") == pytest.approx(ratio * gemm_s(4096, 4096, 4096))
    assert gemm_s(4096, 4096, 4096, dtype="float16") == gemm_s(4096, 4096, 4096)


def test_a_dtype_without_a_peak_is_an_error_that_names_it():
    with pytest.raises(HardwareError, match="complex64"):
        gemm_s(64, 64, 64, dtype="complex64")


def test_a_batch_of_small_products_is_priced_as_a_whole():
    one = kernel_s("gemm", 2 * 128**3, 0, (1, 128, 128, 128), "bfloat16", "forward", H100)
    many = kernel_s("gemm", 256 * 2 * 128**3, 0, (256, 128, 128, 128), "bfloat16", "forward", H100)
    assert one < many < 64 * one


def test_roofline_takes_the_larger_side():
    assert kernel_s("gemm", 2 * 64**3, 3.35e9, (1, 64, 64, 64), "bfloat16", "forward", H100) == pytest.approx(1e-3)


def test_power_limit_caps_the_rate_when_asked():
    flops = 2 * 8192**3
    sustained = kernel_s("gemm", flops, 0, (1, 8192, 8192, 8192), "bfloat16", "forward", H100, sustained=True)
    assert flops / sustained == pytest.approx(677e12)
    assert gemm_s(8192, 8192, 8192) < sustained


def test_causal_attention_costs_about_half():
    full = kernel_s("attention", 0, 0, (1, 16, 16, 8192, 8192, 128, 0), "bfloat16", "forward", H100)
    causal = kernel_s("attention", 0, 0, (1, 16, 16, 8192, 8192, 128, 1), "bfloat16", "forward", H100)
    assert 0.5 < causal / full < 0.65


def test_attention_falls_with_fewer_heads_a_rank():
    def achieved(heads: int) -> float:
        seconds = kernel_s("attention", 0, 0, (1, heads, heads, 4096, 4096, 128, 1), "bfloat16", "forward", H100)
        return attention_flops(1, heads, 4096, 4096, 128, 1) / seconds

    assert achieved(32) > 1.2 * achieved(4)


def test_large_copies_run_at_the_measured_bandwidth():
    assert 2.9e12 < 1e9 / kernel_s("memory", 0, 1e9, (), "bfloat16", "forward", H100) < 3.1e12
    assert kernel_s("memory", 0, 100, (), "bfloat16", "forward", H100) == H100.kernel_floor_s


def test_compiled_memory_kernels_take_the_fitted_share():
    eager = kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100)
    fused = kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100, fused=True)
    assert fused == pytest.approx(H100.fused_factor * eager)


def test_dense_embedding_gradients_are_slower_than_lookups():
    lookup = kernel_s("embedding", 0, 1e8, (), "bfloat16", "forward", H100)
    gradient = kernel_s("embedding", 0, 1e8, (), "bfloat16", "other", H100)
    assert lookup > kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100)
    assert gradient > 1.5 * lookup


def test_convolutions_follow_their_intensity():
    """256 channels, 14 x 14, batch 256 on H200: measured 408 TFLOP/s NCHW forward."""
    device = load_profile("h200-sxm").device
    flops, moved = 59190018048, 2 * (2 * 256 * 256 * 14 * 14 + 256 * 256 * 9)
    assert 350e12 < flops / kernel_s("conv", flops, moved, (), "bfloat16", "forward", device) < 450e12
    thin = kernel_s("conv", flops, 30 * moved, (), "bfloat16", "forward", device)
    assert thin >= 30 * moved / device.memory_bandwidth


def test_float32_convolutions_run_in_tf32_as_torch_does_by_default():
    half = kernel_s("conv", 1e12, 1e9, (), "bfloat16", "forward", H100)
    single = kernel_s("conv", 1e12, 1e9, (), "float32", "forward", H100)
    assert single == pytest.approx(half * H100.peak_flops["bfloat16"] / H100.peak_flops["tf32"])


def test_named_operators_run_at_their_own_rate():
    plain = kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100)
    norm = kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100, name="aten.native_layer_norm.default")
    assert norm == pytest.approx(plain / H100.operator_efficiency["native_layer_norm"])
    widen = kernel_s("memory", 0, 1e8, (), "float32", "forward", H100, name="aten._to_copy.default")
    narrow = kernel_s("memory", 0, 1e8, (), "bfloat16", "forward", H100, name="aten._to_copy.default")
    assert widen > 1.3 * narrow == 1.3 * plain


def test_views_are_free_and_unknown_kinds_are_refused():
    assert kernel_s("free", 0, 1e9, (), "bfloat16", "forward", H100) == 0.0
    with pytest.raises(ValueError, match="magic"):
        kernel_s("magic", 0, 0, (), "bfloat16", "forward", H100)


def test_optimizer_and_clipping_by_their_traffic():
    """Measured: 1.267e9 parameters, AdamW 14.5 ms, clipping 6.0 ms."""
    assert optimizer_s(1.26678e9, H100) == pytest.approx(14.54e-3, rel=0.06)
    assert clip_s(1.26678e9, H100) == pytest.approx(5.95e-3, rel=0.06)
    assert optimizer_s(10, H100) == H100.optimizer_floor_s
    assert optimizer_s(0, H100) == 0.0


def test_host_floor_by_mode():
    eager, sharded, compiled = (host_floor_s(100, H100, mode) for mode in ("eager", "fully_shard", "compiled"))
    assert 25e-4 < eager <= compiled < sharded < 103e-4
    with pytest.raises(ValueError, match="turbo"):
        host_floor_s(1, H100, "turbo")


def test_processes_beyond_the_cores_slow_each_other():
    cpu = load_profile("cpu-gloo").device
    assert cpu.shared_cores is not None
    alone = kernel_s("memory", 0, 1e6, (), "float32", "forward", cpu)
    for processes in (1, cpu.shared_cores, 2 * cpu.shared_cores):
        shared = kernel_s("memory", 0, 1e6, (), "float32", "forward", cpu.shared_by(processes))
        assert shared == pytest.approx(alone * max(1, processes / cpu.shared_cores))
    assert H100.shared_by(8) is H100


@given(
    st.sampled_from(list_profiles()),
    st.sampled_from(["memory", "embedding"]),
    st.sampled_from(["forward", "other"]),
    st.floats(1, 1e12),
    st.floats(1, 100),
    st.booleans(),
)
def test_more_bytes_never_take_less_time(profile, kind, wrt, n_bytes, factor, fused):
    small = kernel_s(kind, 0, n_bytes, (), "float32", wrt, profile.device, fused=fused)
    large = kernel_s(kind, 0, n_bytes * factor, (), "float32", wrt, profile.device, fused=fused)
    assert 0 < small <= large * (1 + 1e-12)


shapes = st.integers(1, 1 << 17)


@given(st.sampled_from(list_profiles()), shapes, shapes, shapes, st.sampled_from(["forward", "input", "weight"]))
def test_no_product_beats_the_peak_or_the_memory(profile, m, n, k, wrt):
    device = profile.device
    dtype = profile.content.compute.gemm.dtype
    flops, moved = 2.0 * m * n * k, 2.0 * (m * n + n * k + m * k)
    seconds = kernel_s("gemm", flops, moved, (1, m, n, k), dtype, wrt, device)
    assert math.isfinite(seconds)
    assert flops / seconds <= device.peak_flops[dtype] * 1.001
    assert moved / seconds <= device.memory_bandwidth * 1.001


@given(shapes, shapes, shapes, st.floats(1, 4))
def test_more_memory_bandwidth_is_never_slower(m, n, k, factor):
    flops, moved = 2.0 * m * n * k, 2.0 * (m * n + n * k + m * k)
    faster = replace(A100, memory_bandwidth=A100.memory_bandwidth * factor)
    before = kernel_s("gemm", flops, moved, (1, m, n, k), "bfloat16", "forward", A100)
    assert kernel_s("gemm", flops, moved, (1, m, n, k), "bfloat16", "forward", faster) <= before
