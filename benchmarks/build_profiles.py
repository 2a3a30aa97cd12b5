"""Build the GPU profiles from measured tables: clean the rows, fit the laws, write one JSON a system.

    python benchmarks/build_profiles.py --h100 DIR --h200 DIR --nccl FILE --gemm-bins FILE --out hardware_profiles

DIR holds gemm.csv, sdpa.csv, memory_bound.csv, comm.csv and so on (docs/hardware-profiles.md lists their columns).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from profile_format import (
    A100_SHEET,
    GIB,
    H100,
    H100_SHEET,
    H200,
    H200_SHEET,
    PUBLISHED,
    TRAINING,
    Json,
    figure,
    rounded,
    write_profile,
)
from profile_kernels import (
    alignment,
    attention_rows,
    attention_section,
    convolution_section,
    fit_binned_law,
    fused_factor,
    gemm_section,
    memory_curve,
    operator_efficiencies,
    optimizer_section,
    peaks,
)
from profile_links import fitted_collectives, network, nvlink, nvlink_level


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
