"""Sections on kernels, from measured tables: products, attention, element-wise, convolutions, the optimizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from profile_format import H100, TRAINING, Json, figure, rounded
from profile_links import busbw_kept


def gemm_rows(path: Path) -> dict[str, list[list[float]]]:
    """Rows (m, n, k, seconds) of the kernel that ran, least time of repeats.

    The table names the linear layer: M tokens, N outputs, K inputs. dgrad is [M, N] x [N, K], wgrad [N, M] x [M, K].
    """
    table = pd.read_csv(path)
    table = table[table.op.isin(["fwd", "dgrad", "wgrad"])].groupby(["op", "M", "N", "K"], as_index=False).us.min()
    order = {"fwd": ("forward", "MNK"), "dgrad": ("input", "MKN"), "wgrad": ("weight", "NKM")}
    rows: dict[str, list[list[float]]] = {"forward": [], "input": [], "weight": []}
    for row in table.to_dict("records"):
        name, dims = order[row["op"]]
        rows[name].append([*(int(row[d]) for d in dims), rounded(row["us"] * 1e-6)])
    return {name: sorted(values) for name, values in rows.items()}


def fit_gemm_law(rows: dict[str, list[list[float]]], peak: float) -> tuple[float, float, float]:
    """(max_efficiency, half_flops, exponent) of efficiency = max / (1 + (half / f) ** p): least squares of logs."""
    data = np.array([row for values in rows.values() for row in values], dtype=float)
    flops = 2 * data[:, 0] * data[:, 1] * data[:, 2]
    measured = np.log(flops / (peak * data[:, 3]))
    best = (np.inf, 0.0, 0.0, 0.0)
    for half in np.geomspace(1e4, 2e10, 120):
        for exponent in np.linspace(0.4, 1.2, 33):
            shape = -np.log1p((half / flops) ** exponent)
            log_max = float(np.mean(measured - shape))
            error = float(np.sum((measured - shape - log_max) ** 2))
            if error < best[0]:
                best = (error, float(np.exp(log_max)), float(half), float(exponent))
    return rounded(best[1], 4), rounded(best[2], 4), rounded(best[3], 4)


def fit_binned_law(path: Path, system: str) -> tuple[float, float, float]:
    """The GEMM law through medians by bins of GFLOP (geometric middles; open ends at half and twice the edge)."""
    table = pd.read_csv(path)
    edges = table[table.sys == system].bin.str.strip("([]").str.split(",", expand=True).astype(float)
    low, high = edges[0].to_numpy(), edges[1].to_numpy()
    middle = np.sqrt(np.where(low > 0, low, 0.25 * high) * np.where(high < 1e8, high, 4 * low)) * 1e9
    rate = table[table.sys == system].med.to_numpy()
    data = [[(f / 2) ** (1 / 3)] * 3 + [f / (312e12 * e)] for f, e in zip(middle, rate, strict=True)]
    return fit_gemm_law({"forward": data[1:]}, 312e12)


def alignment(source: str) -> Json:
    """Caps of matrix products whose contiguous dimensions are no multiple of 8 elements."""
    text = f"heads of vocabularies not divisible by 8 in {source}"
    return {
        "odd_efficiency": figure(0.12, f"odd vocabularies ran at 89-150 TFLOP/s of 989: {text}", "fitted"),
        "even_efficiency": figure(0.26, f"even ones at 240-280 TFLOP/s of 989: {text}", "fitted"),
    }


def gemm_section(folder: Path, peak: float, source: str, sustained: float, merge: Path | None = None) -> Json:
    """The GEMM section of a measured GPU; `merge` adds another table's rows where this one has few."""
    rows = gemm_rows(folder / "gemm.csv")
    note = f"{source}; bfloat16, CUDA-graph replay over rotating buffers"
    if merge is not None:
        rows = merge_gemm(rows, gemm_rows(merge / "gemm.csv"))
        note += f"; shapes not run there: H100 times x the median ratio of the shapes run on both ({H100})"
    efficiency, half, exponent = fit_gemm_law(rows, peak)
    text = f"least squares on the rows of this file ({note})"
    return {
        "dtype": "bfloat16",
        "max_efficiency": figure(efficiency, text, "fitted"),
        "half_flops": figure(half, text, "fitted"),
        "exponent": figure(exponent, text, "fitted"),
        **alignment(TRAINING),
        "sustained_flops": figure(
            sustained, f"{source}; 4096 and 8192 cubes repeated for 1.5 s, at the power cap", "measured"
        ),
        "rows": {"source": note, "evidence": "measured", **rows},
    }


def merge_gemm(rows: dict[str, list[list[float]]], other: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """`rows`, and the shapes that only `other` has with their times scaled by the median ratio of common shapes."""
    merged = {}
    for name, values in rows.items():
        mine = {tuple(row[:3]): row[3] for row in values}
        theirs = {tuple(row[:3]): row[3] for row in other[name]}
        ratio = float(np.median([mine[key] / theirs[key] for key in mine if key in theirs]))
        extra = {key: rounded(t * ratio) for key, t in theirs.items() if key not in mine}
        merged[name] = sorted([*key, t] for key, t in {**mine, **extra}.items())
    return merged


def attention_rows(folder: Path) -> list[list[float]]:
    """cuDNN's fused attention, forward and backward seconds, least of repeats."""
    table = pd.read_csv(folder / "sdpa.csv")
    table = table[(table.backend == "cudnn") & table.fwd_us.notna()]
    keys = ["batch", "heads", "kv_heads", "seq", "head_dim", "causal"]
    rows = []
    for row in table.groupby(keys, as_index=False)[["fwd_us", "bwd_us"]].min().to_dict("records"):
        shape = [int(row[k]) for k in ("batch", "heads", "kv_heads", "seq", "seq", "head_dim", "causal")]
        rows.append([*shape, rounded(row["fwd_us"] * 1e-6), rounded(row["bwd_us"] * 1e-6)])
    return sorted(rows)


def attention_section(rows: list[list[float]], source: str) -> Json:
    """Attention of an H100 or H200: the law by eye over the rows, which then correct it."""
    text = f"fitted to the rows of this file ({source})"
    return {
        "dtype": "bfloat16",
        "backend": "cudnn",
        "forward_efficiency": figure(0.68, text, "fitted"),
        "backward_efficiency": figure(0.6, text, "fitted"),
        "half_length": figure(700, text, "fitted"),
        "rows": {
            "source": f"{source}; scaled_dot_product_attention with cuDNN, bfloat16, CUDA graph",
            "evidence": "measured",
            "rows": rows,
        },
    }


def memory_curve(folder: Path, ops: tuple[str, ...]) -> list[list[float]]:
    """Seconds of element-wise kernels by bytes moved: median over the operators, without outliers."""
    table = pd.read_csv(folder / "memory_bound.csv")
    table = table[table.op.isin(ops)]
    medians = table.groupby("bytes").us.median() * 1e-6
    points = sorted((int(n_bytes), float(seconds)) for n_bytes, seconds in medians.items())
    return [[n_bytes, rounded(seconds)] for n_bytes, seconds in busbw_kept(points, dip=0.95)]


def operator_efficiencies(system: str, source: str, evidence: str) -> Json:
    """Rates of norms, softmax and casts over the element-wise curve: medians above 20 MB.

    native_layer_norm 4 B and its backward 8 B an element; cross entropy = cast, _log_softmax, its backward, cast;
    batch norm from the time of all norms of a ResNet-50 step (batch 1024, NCHW) at 2 passes forward and 3 backward.
    """
    h100 = system == "h100-sxm"
    norms = f"{source}; against copy, add and silu of as many bytes"
    losses = f"{source}; cross entropy on 32k and 128k vocabularies, less its casts"
    batch = f"kernels of normalisation of ResNet-50 steps, NCHW, {TRAINING}"
    values = {
        "native_layer_norm": (0.62, norms),
        "native_layer_norm_backward": (0.46, norms),
        "_fused_rms_norm": (0.82, norms),
        "_fused_rms_norm_backward": (0.5, norms),
        "gelu": (0.77, norms),
        "gelu_backward": (0.76, norms),
        "native_dropout": (0.78, norms),
        "native_dropout_backward": (0.78, norms),
        "_to_copy.float32": (0.65 if h100 else 0.5, norms),
        "_log_softmax": (0.5, losses),
        "_log_softmax_backward_data": (0.7, losses),
        "_softmax": (0.5, losses),
        "_softmax_backward_data": (0.7, losses),
        "native_batch_norm": (0.16 if h100 else 0.115, batch),
        "native_batch_norm_backward": (0.16 if h100 else 0.115, batch),
    }
    return {name: figure(value, text, evidence) for name, (value, text) in values.items()}


def optimizer_section(folder: Path, source: str) -> Json:
    """Fused AdamW and clipping: medians of the measured bandwidths."""
    table = pd.read_csv(folder / "optimizer_launch_hostcopy.csv")
    big = table[table.note.fillna("").str.startswith("shard")]
    adam = float(big[big.kind == "adamw_fused"].gbs.median()) * 1e9
    clip = big[big.kind == "clip_grad_norm"].gbs
    ratio = 2.515e12 / 2.548e12
    return {
        "bytes_per_parameter": figure(
            28, "float32 parameter, gradient, two moments read, three of them written", "datasheet"
        ),
        "bandwidth_bytes_per_s": figure(
            rounded(adam, 4), f"{source}; fused AdamW on lists of 219-291 tensors, median", "measured"
        ),
        "floor_s": figure(46e-6, f"{H100}; fused AdamW on one tensor of 1e5 elements", "measured"),
        "clip_bytes_per_parameter": figure(12, "gradient read for the norm, read and written to scale", "datasheet"),
        "clip_bandwidth_bytes_per_s": figure(
            rounded(float(clip.median()) * 1e9 if len(clip) else adam * ratio, 4),
            f"{source}; clip_grad_norm_ on the same lists"
            if len(clip)
            else f"AdamW's bandwidth x the H100's ratio of the two ({H100})",
            "measured" if len(clip) else "fitted",
        ),
    }


def convolution_section(scale: float, source: str, evidence: str) -> Json:
    """Dense convolutions, NCHW, cuDNN: FLOP/s by FLOP per byte, 1x1 to 3x3 kernels. `scale` for another GPU."""
    points = {
        "forward": [
            (1, 4.3e12),
            (40, 172e12),
            (200, 178e12),
            (290, 190e12),
            (500, 245e12),
            (570, 312e12),
            (1150, 405e12),
            (2300, 464e12),
        ],
        "backward": [
            (1, 4.0e12),
            (35, 140e12),
            (200, 145e12),
            (290, 188e12),
            (500, 237e12),
            (570, 313e12),
            (1150, 361e12),
            (2300, 463e12),
        ],
    }
    text = (
        f"{source}; depthwise, grouped and 3-channel convolutions are slower (3-25 TFLOP/s), "
        "channels_last is up to 2.3x faster"
    )
    return {
        "dtype": "bfloat16",
        "layout": "nchw",
        **{
            key: {"source": text, "evidence": evidence, "rows": [[x, rounded(y * scale, 4)] for x, y in rows]}
            for key, rows in points.items()
        },
    }


def peaks(sheet: str, bf16: float, tf32: float, fp32: float, fp64: float, fp8: float | None, int8: float) -> Json:
    """Dense peaks; float32 is what torch computes by default (no TF32)."""
    rates = {"bfloat16": bf16, "float16": bf16, "tf32": tf32, "float32": fp32, "float64": fp64, "int8": int8}
    if fp8 is not None:
        rates["float8_e4m3fn"] = fp8
    return {name: figure(rate, sheet, "datasheet") for name, rate in rates.items()}


def fused_factor() -> Json:
    """Compiled over eager time of memory-bound kernels."""
    return figure(
        0.55,
        "compiled over eager time of element-wise, norm, reduction and loss kernels: 0.35-0.75 for 12 models that "
        f"compiled; {TRAINING}",
        "fitted",
    )
