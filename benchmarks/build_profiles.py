"""Build the GPU profiles from measured tables: clean the rows, fit the laws, write one JSON a system.

    python benchmarks/build_profiles.py --h100 DIR --h200 DIR --nccl FILE --gemm-bins FILE --out hardware_profiles

DIR holds gemm.csv, sdpa.csv, memory_bound.csv, comm.csv and so on (docs/hardware-profiles.md lists their columns).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

GIB = 2**30
H100 = (
    "measured for tpplan on 4x H100 80GB HBM3 SXM (700 W), torch 2.11.0+cu130, CUDA 13.0, cuDNN 9.19, NCCL 2.28.9, "
    "2026-11-22"
)
H200 = "measured for tpplan on 4x H200 141GB SXM, torch 2.11.0+cu130, CUDA 13.0, NCCL 2.28.9, 2026-11-22"
TRAINING = "torch 2.11 training runs of Llamas of 0.4B to 8B on 4x H100 SXM and of 15 other models on H200, 2026-11-22"
PUBLISHED = "ai-dynamo/aiconfigurator (Apache-2.0), measured tables of A100-SXM4-80GB"
H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet, SXM5 column (dense rates: half of those with sparsity)"
H200_SHEET = "NVIDIA H200 Tensor Core GPU datasheet, SXM column (dense rates: half of those with sparsity)"
A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM column (dense rates)"

Json = dict[str, Any]


def figure(value: float, source: str, evidence: str) -> Json:
    """One number with where it is from."""
    return {"value": value, "source": source, "evidence": evidence}


def rounded(x: float, digits: int = 5) -> float:
    """`x` to significant digits, an int where it is one (shorter files)."""
    y = float(f"{x:.{digits}g}")
    return int(y) if y == int(y) and abs(y) < 1e15 and abs(y) >= 1 else y


# ---------------------------------------------------------------------------------------------- matrix products


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


# ---------------------------------------------------------------------------------------------- attention, memory


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


# ---------------------------------------------------------------------------------------------- collectives


def busbw_kept(points: list[tuple[int, float]], dip: float = 0.8) -> list[tuple[int, float]]:
    """Points without outliers: a larger message may not be faster, nor bandwidth be under `dip` of both neighbours."""
    kept = []
    for i, (n_bytes, seconds) in enumerate(points):
        rate = n_bytes / seconds
        around = [points[j][0] / points[j][1] for j in (i - 1, i + 1) if 0 <= j < len(points)]
        later = [t for _, t in points[i + 1 :]]
        if any(t <= seconds for t in later) or (len(around) == 2 and rate < dip * min(around)):
            continue
        kept.append((n_bytes, seconds))
    return kept


def collective_rows(folder: Path, op: str, least_bytes: int) -> list[list[float]]:
    """(group size, bytes, seconds): the device's time where a graph gave it, else eager rows from `least_bytes` up
    (below, the host's issue time shows)."""
    names = {"send_recv": ["sendrecv_uni"], "all_to_all": ["all_to_all"]}.get(op, [op])
    table = pd.read_csv(folder / "comm.csv")
    table = table[table.op.isin(names) & (table.dtype == "bf16") & (table.bytes >= least_bytes)]
    best = dict(table.groupby(["world", "bytes"]).us.min().items())
    graphed = folder / "comm_graphed_small.csv"
    if graphed.exists():
        small = pd.read_csv(graphed)
        small = small[small.op == f"{op}_graphed"]
        best.update(small.groupby(["world", "bytes"]).us.min().items())
    rows = []
    for size in sorted({key[0] for key in best}):
        points = sorted((int(b), us * 1e-6) for (world, b), us in best.items() if world == size)
        rows += [[int(size), b, rounded(t)] for b, t in busbw_kept(points)]
    return rows


def nvlink(h100: Path, h200: Path | None) -> dict[str, Json]:
    """Collectives inside a node over NVLink 4; an H200's own rows go before the H100's of the same size."""
    steps = {"all_reduce": (5.0e-6, 2.0e-6), "all_gather": (6.4e-6, 1.9e-6), "reduce_scatter": (6.2e-6, 1.9e-6)}
    sections = {}
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"):
        rows = {(g, b): t for g, b, t in collective_rows(h100, op, 8 * 2**20)}
        source = f"{H100}; device time (CUDA graph) to 64 MiB where run, eager above"
        if h200 is not None:
            own = collective_rows(h200, op, 64 * 2**20)
            rows.update({(g, b): t for g, b, t in own})
            source = f"{H200} from 64 MiB up; below, and all_to_all: {source}"
        launch, step = steps.get(op, (8.0e-6, 1.9e-6))
        kept = []
        for size in sorted({g for g, _ in rows}):
            points = busbw_kept(sorted((b, t) for (g, b), t in rows.items() if g == size))
            kept += [[size, b, t] for b, t in points]
        sections[op] = {
            "source": source + "; outliers (a larger message faster, or a dip below 0.8 of both neighbours) left out; "
            "launch and step fitted to 4 KiB on 2 and 4 GPUs",
            "evidence": "measured",
            "launch_s": launch,
            "step_s": step,
            "bandwidth_bytes_per_s": 330e9,
            "rows": kept,
        }
    return sections


def fitted_collectives(path: Path, system: str) -> dict[str, Json]:
    """Rows of a law fitted to 2, 4 and 8 GPUs: t = launch + step * steps + root * sqrt(wire) + wire / bandwidth.

    Least squares of the relative error; the square root takes the slow climb to full bandwidth. The table counts
    messages in elements of 2 bytes: only the fit leaves it.
    """
    table = pd.read_csv(path)
    table = table[table.sys == system]
    names = {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "alltoall": "all_to_all",
    }
    sections = {}
    for theirs, op in names.items():
        measured = table[table.op_name == theirs]
        seconds = measured.latency.to_numpy(float) * 1e-3
        design = collective_terms(op, measured.num_gpus.to_numpy(float), 2.0 * measured.message_size.to_numpy(float))
        law = np.linalg.lstsq(design / seconds[:, None], np.ones_like(seconds), rcond=None)[0]
        error = float(np.median(np.abs(design @ law / seconds - 1)))
        rows = []
        for size in (2, 4, 8):
            n_bytes = 4.0 ** np.arange(6, 16)
            fitted = collective_terms(op, np.full_like(n_bytes, size), n_bytes) @ law
            rows += [[size, int(x), rounded(float(t), 4)] for x, t in zip(n_bytes, fitted, strict=True)]
        sections[op] = {
            "source": f"rows of a law fitted to {PUBLISHED}, NCCL 2.27.3, 2, 4 and 8 GPUs (median error {error:.0%})",
            "evidence": "fitted",
            "launch_s": rounded(max(float(law[0]), 0.0), 3),
            "step_s": rounded(max(float(law[1]), 0.0), 3),
            "bandwidth_bytes_per_s": rounded(float(1 / law[3]), 4),
            "rows": rows,
        }
    return sections


def collective_terms(op: str, size: np.ndarray, n_bytes: np.ndarray) -> np.ndarray:
    """Columns 1, steps, sqrt(wire bytes), wire bytes of the law of a collective."""
    wire = n_bytes * (size - 1) / size * (2 if op == "all_reduce" else 1)
    steps = 2 * np.ceil(np.log2(size)) if op == "all_reduce" else size - 1
    return np.stack([np.ones_like(wire), steps, np.sqrt(wire), wire], axis=1)


def network(rate: float, text: str) -> Json:
    """The level between nodes: one network card a GPU."""
    return {
        "name": "network",
        "size": None,
        "bandwidth_bytes_per_s": figure(
            0.9 * rate,
            f"{text} = {rate / 1e9:.4g} GB/s, times 0.9 for protocol and imbalance; not measured by us",
            "assumed",
        ),
        "latency_s": figure(
            8e-6, "one step between nodes with GPUDirect RDMA, as commonly reported; not measured by us", "assumed"
        ),
        "launch_s": figure(8e-6, "as inside a node", "assumed"),
        "collectives": {},
    }


# ---------------------------------------------------------------------------------------------- shared sections


def memory_section(device_bytes: Json) -> Json:
    """Memory before the first tensor, from NVML against the allocator's own count in the training runs."""
    return {
        "device_bytes": device_bytes,
        "context_bytes": figure(int(0.52 * GIB), f"bare CUDA context, {TRAINING}", "measured"),
        "nccl_base_bytes": figure(
            int(0.78 * GIB), f"device in use - reserved - context with one process, {TRAINING}", "measured"
        ),
        "nccl_communicator_bytes": figure(
            int(0.5 * GIB),
            f"{TRAINING}: 0.3 (fsdp4, tp4), 0.7 (pp4), 1.2-2.1 GiB (two axes), counting a communicator for each "
            "axis with degree > 1 and one for the world where there are two or more axes",
            "fitted",
        ),
        "reserve_fraction": figure(
            0.09,
            f"(reserved - active) / active at the peak, median of 194 runs 0.08-0.11, 9 in 10 below 0.24; {TRAINING}",
            "fitted",
        ),
    }


def host_section(evidence: str = "fitted", prefix: str = "") -> Json:
    """Host seconds per operator from the host-bound training runs: step time over kernels of the eager trace."""
    return {
        "eager_s_per_op": figure(
            38e-6, f"{prefix}median of 23 host-bound one-GPU runs (31-72 us), {TRAINING}", evidence
        ),
        "fully_shard_s_per_op": figure(
            72e-6, f"{prefix}median of 9 host-bound fsdp4 runs (43-95 us), {TRAINING}", evidence
        ),
        "compiled_s_per_op": figure(
            42e-6,
            f"{prefix}median of 12 host-bound block-compiled runs, over the kernels of the eager trace, {TRAINING}",
            evidence,
        ),
    }


def overlap_section(folder: Path, evidence: str = "measured", prefix: str = "") -> Json:
    """Medians over matrix products and attention where both run all the time (covered = 3)."""
    table = pd.read_csv(folder / "overlap.csv")
    table = table[(table.covered == 3) & ~table.compute.str.startswith("add")]
    source = f"{prefix}median of {len(table)} pairs of a kernel and a collective of 16-436 MiB, {H100}"
    return {
        "compute_slowdown": figure(rounded(float(table.compute_slowdown.median()), 3), source, evidence),
        "communication_slowdown": figure(rounded(float(table.comm_slowdown.median()), 3), source, evidence),
    }


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


# ---------------------------------------------------------------------------------------------- systems


def h100_profile(h100: Path) -> Json:
    """H100 80GB SXM: measured."""
    sheet = H100_SHEET
    ops = ("copy", "add", "mul", "silu", "cast_fp32_bf16")
    return {
        "schema_version": 1,
        "name": "h100-sxm",
        "description": "NVIDIA H100 80GB SXM5, 8 a node over NVLink 4, one 400 Gb/s network card a GPU",
        "kind": "cuda",
        "device_names": ["NVIDIA H100 80GB HBM3"],
        "gpus_per_node": figure(8, "NVIDIA HGX H100 8-GPU baseboard datasheet", "datasheet"),
        "memory": memory_section(figure(int(79.18 * GIB), f"what the driver reports to torch, {H100}", "measured")),
        "compute": {
            "peak_flops": peaks(sheet, 989.4e12, 494.7e12, 66.9e12, 66.9e12, 1978.9e12, 1978.9e12),
            "memory_bandwidth_bytes_per_s": figure(3.35e12, sheet, "datasheet"),
            "memory_time_s": {
                "source": f"{H100}; copy, add, mul, silu, cast: median",
                "evidence": "measured",
                "rows": memory_curve(h100, ops),
            },
            "operator_efficiency": operator_efficiencies("h100-sxm", f"{H100} and {H200}", "fitted"),
            "kernel_floor_s": figure(
                3.98e-6, f"{H100}; tiny kernel in a filled eager stream (1.02 us inside a CUDA graph)", "measured"
            ),
            "gemm": gemm_section(h100, 989.4e12, H100, 677e12),
            "attention": attention_section(attention_rows(h100), H100),
            "embedding_forward_efficiency": figure(
                0.85, f"{H100}; lookup against an element-wise kernel of as many bytes", "measured"
            ),
            "embedding_backward_efficiency": figure(
                0.45, f"{H100}; forward + dense gradient, 128k vocabulary (32k: 0.2)", "measured"
            ),
            "convolution": convolution_section(
                0.7,
                f"rates of NCHW convolutions ({H200}) scaled by the ratio of memory bandwidths, 3.35 / 4.8",
                "fitted",
            ),
            "fused_factor": fused_factor(),
            "optimizer": optimizer_section(h100, H100),
            "shared_cores": None,
        },
        "host": host_section(),
        "overlap": overlap_section(h100),
        "links": [
            nvlink_level(450e9, sheet, nvlink(h100, None)),
            network(50e9, "400 Gb/s network card a GPU (DGX H100 datasheet)"),
        ],
    }


def nvlink_level(rate: float, sheet: str, collectives: dict[str, Json]) -> Json:
    """The level inside a node."""
    return {
        "name": "nvlink",
        "size": 8,
        "bandwidth_bytes_per_s": figure(rate, f"{sheet}: half of the two-way rate", "datasheet"),
        "latency_s": figure(1.9e-6, f"difference of 4 KiB collectives on 4 and 2 GPUs, {H100}", "fitted"),
        "launch_s": figure(8e-6, f"4 KiB collective on 2 GPUs, {H100}", "measured"),
        "collectives": collectives,
    }


def h200_profile(h100: Path, h200: Path) -> Json:
    """H200 141GB SXM: measured where the tables have it, else the H100's."""
    base, sheet = h100_profile(h100), H200_SHEET
    compute = base["compute"]
    ops = ("copy", "add", "silu", "cast_fp32_bf16")
    rows = {tuple(r[:7]): r for r in attention_rows(h100)}
    rows.update({tuple(r[:7]): r for r in attention_rows(h200)})
    compute.update(
        peak_flops=peaks(sheet, 989.4e12, 494.7e12, 66.9e12, 66.9e12, 1978.9e12, 1978.9e12),
        memory_bandwidth_bytes_per_s=figure(4.8e12, sheet, "datasheet"),
        memory_time_s={
            "source": f"{H200}; copy, add, silu, cast: median",
            "evidence": "measured",
            "rows": memory_curve(h200, ops),
        },
        operator_efficiency=operator_efficiencies("h200-sxm", H200, "fitted"),
        gemm=gemm_section(h200, 989.4e12, H200, 664e12, merge=h100),
        attention=attention_section(sorted(rows.values()), f"{H200}; shapes not run there from the H100 ({H100})"),
        convolution=convolution_section(1.0, H200, "measured"),
        optimizer=optimizer_section(h200, H200),
    )
    base.update(
        name="h200-sxm",
        description="NVIDIA H200 141GB SXM5, 8 a node over NVLink 4, one 400 Gb/s network card a GPU",
        device_names=["NVIDIA H200"],
        memory=memory_section(
            figure(int(139.8 * GIB), "total capacity in torch's out-of-memory messages on H200", "published")
        ),
        overlap=overlap_section(h100, "assumed", "as the H100: "),
        links=[
            nvlink_level(450e9, sheet, nvlink(h100, h200)),
            network(50e9, "400 Gb/s network card a GPU (DGX H200 datasheet)"),
        ],
    )
    return base


def a100_profile(h100: Path, nccl: Path, bins: Path) -> Json:
    """A100 80GB SXM: datasheet, fits to published measurements, and the H100's figures for what the host does."""
    sheet = A100_SHEET
    ratio = 3.35 / 2.039
    ops = ("copy", "add", "mul", "silu", "cast_fp32_bf16")
    curve = [[x, rounded(y * ratio)] for x, y in memory_curve(h100, ops)]
    law = fit_binned_law(bins, "a100_sxm")
    law_source = f"fit to medians by FLOPs of {PUBLISHED}"
    paper = "Dao, FlashAttention-2 (2023), figures 4-6: A100 SXM4, up to 230 TFLOP/s forward"
    collectives = fitted_collectives(nccl, "a100_sxm")
    adam = 0.78 * 2.039e12
    return {
        "schema_version": 1,
        "name": "a100-sxm-80g",
        "description": "NVIDIA A100 80GB SXM4, 8 a node over NVLink 3, one 200 Gb/s network card a GPU",
        "kind": "cuda",
        "device_names": ["NVIDIA A100-SXM4-80GB"],
        "gpus_per_node": figure(8, "NVIDIA HGX A100 8-GPU baseboard datasheet", "datasheet"),
        "memory": memory_section(
            figure(int(79.15 * GIB), "total capacity in torch's out-of-memory messages on A100-SXM4-80GB", "published")
        ),
        "compute": {
            "peak_flops": peaks(sheet, 312e12, 156e12, 19.5e12, 19.5e12, None, 624e12),
            "memory_bandwidth_bytes_per_s": figure(2.039e12, sheet, "datasheet"),
            "memory_time_s": {
                "source": f"H100 curve times the ratio of the datasheet bandwidths, 3350 / 2039 ({H100})",
                "evidence": "fitted",
                "rows": curve,
            },
            "operator_efficiency": operator_efficiencies("h100-sxm", f"as the H100: {H100}", "assumed"),
            "kernel_floor_s": figure(4e-6, f"as the H100 ({H100})", "assumed"),
            "gemm": {
                "dtype": "bfloat16",
                "max_efficiency": figure(law[0], law_source, "fitted"),
                "half_flops": figure(law[1], law_source, "fitted"),
                "exponent": figure(law[2], law_source, "fitted"),
                **alignment(TRAINING),
                "sustained_flops": figure(
                    271.2e12, "stas00/ml-engineering, maximum achievable matmul on A100 SXM", "published"
                ),
                "rows": None,
            },
            "attention": {
                "dtype": "bfloat16",
                "backend": "flash",
                "forward_efficiency": figure(0.7, paper, "published"),
                "backward_efficiency": figure(0.62, paper, "published"),
                "half_length": figure(500, f"law fitted by eye to {paper}", "fitted"),
                "rows": None,
            },
            "embedding_forward_efficiency": figure(0.85, f"as the H100 ({H100})", "assumed"),
            "embedding_backward_efficiency": figure(0.45, f"as the H100 ({H100})", "assumed"),
            "convolution": convolution_section(312 / 989.4, f"{H200}, times the ratio of the dense peaks", "fitted"),
            "fused_factor": fused_factor(),
            "optimizer": {
                "bytes_per_parameter": figure(
                    28, "float32 parameter, gradient, two moments read, three of them written", "datasheet"
                ),
                "bandwidth_bytes_per_s": figure(
                    adam, f"0.76-0.78 of the datasheet bandwidth, as on the H100 ({H100})", "assumed"
                ),
                "floor_s": figure(46e-6, f"as the H100 ({H100})", "assumed"),
                "clip_bytes_per_parameter": figure(
                    12, "gradient read for the norm, read and written to scale", "datasheet"
                ),
                "clip_bandwidth_bytes_per_s": figure(
                    0.75 * 2.039e12, f"0.75 of the datasheet bandwidth, as on the H100 ({H100})", "assumed"
                ),
            },
            "shared_cores": None,
        },
        "host": host_section("assumed", "as measured on hosts of H100 and H200: "),
        "overlap": overlap_section(h100, "assumed", "as the H100: "),
        "links": [
            {
                **nvlink_level(300e9, sheet, collectives),
                "latency_s": figure(collectives["all_gather"]["step_s"], collectives["all_gather"]["source"], "fitted"),
                "launch_s": figure(
                    collectives["all_gather"]["launch_s"], collectives["all_gather"]["source"], "fitted"
                ),
            },
            network(25e9, "200 Gb/s network card a GPU (DGX A100 datasheet)"),
        ],
    }


def fit_binned_law(path: Path, system: str) -> tuple[float, float, float]:
    """The GEMM law through medians by bins of GFLOP (geometric middles; open ends at half and twice the edge)."""
    table = pd.read_csv(path)
    edges = table[table.sys == system].bin.str.strip("([]").str.split(",", expand=True).astype(float)
    low, high = edges[0].to_numpy(), edges[1].to_numpy()
    middle = np.sqrt(np.where(low > 0, low, 0.25 * high) * np.where(high < 1e8, high, 4 * low)) * 1e9
    rate = table[table.sys == system].med.to_numpy()
    data = [[(f / 2) ** (1 / 3)] * 3 + [f / (312e12 * e)] for f, e in zip(middle, rate, strict=True)]
    return fit_gemm_law({"forward": data[1:]}, 312e12)


def write_profile(profile: Json, folder: Path) -> None:
    """One JSON file: objects indented, rows of numbers one a line."""
    (folder / f"{profile['name']}.json").write_text(to_text(profile) + "\n", encoding="utf-8")


def to_text(node: Any, indent: int = 0) -> str:
    """JSON with lists of numbers kept on one line."""
    pad = "  " * (indent + 1)
    if isinstance(node, dict) and node:
        items = [f"{pad}{json.dumps(k)}: {to_text(v, indent + 1)}" for k, v in node.items()]
        return "{\n" + ",\n".join(items) + "\n" + "  " * indent + "}"
    if isinstance(node, list) and any(isinstance(v, (dict, list)) for v in node):
        return "[\n" + ",\n".join(pad + to_text(v, indent + 1) for v in node) + "\n" + "  " * indent + "]"
    return json.dumps(node)


def main() -> None:
    """Read the tables named on the command line and write the profiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--h100", "--h200", "--nccl", "--gemm-bins", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    write_profile(h100_profile(args.h100), args.out)
    write_profile(h200_profile(args.h100, args.h200), args.out)
    write_profile(a100_profile(args.h100, args.nccl, args.gemm_bins), args.out)


if __name__ == "__main__":
    main()
