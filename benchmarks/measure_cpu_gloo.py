"""Measure this machine's CPU and gloo as a hardware profile: one thread a process, a few processes a host.

    python benchmarks/measure_cpu_gloo.py --out hardware_profiles

Takes about a minute and a half on 2 idle cores. Every time is the least of several repeats.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from profile_format import Json, figure, rounded, write_profile
from profile_kernels import fit_gemm_law
from torch import multiprocessing

GROUPS = (2, 4)
MESSAGES = (4096, 65536, 2**20, 4 * 2**20, 16 * 2**20, 64 * 2**20)


def best_s(run: Callable[[], Any], budget_s: float = 0.15) -> float:
    """Seconds of one call: least over many bursts of about 0.2 ms (other work on the machine then rarely shows)."""
    run()
    start = time.perf_counter()
    run()
    calls = max(1, int(2e-4 / max(time.perf_counter() - start, 1e-7)))
    least, end, bursts = float("inf"), time.perf_counter() + budget_s, 0
    while True:
        bursts += 1
        start = time.perf_counter()
        for _ in range(calls):
            run()
        stop = time.perf_counter()
        least = min(least, (stop - start) / calls)
        if stop > end and bursts >= 12:
            return least


def gemm_rows() -> dict[str, list[list[float]]]:
    """float32 products by shape: y = x W^T, dx = dy W, dW = dy^T x."""
    rows: dict[str, list[list[float]]] = {"forward": [], "input": [], "weight": []}
    shapes = [
        (t, n, k)
        for t in (64, 256, 1024)
        for n, k in ((64, 64), (256, 64), (192, 256), (256, 256), (1024, 256), (256, 1024), (768, 768))
    ]
    for tokens, n, k in [*shapes, (512, 2304, 768), (512, 768, 3072), (256, 8192, 256)]:
        x, dy, w = torch.randn(tokens, k), torch.randn(tokens, n), torch.randn(n, k)
        rows["forward"].append([tokens, n, k, rounded(best_s(lambda x=x, w=w: x @ w.t(), 0.08))])
        rows["input"].append([tokens, k, n, rounded(best_s(lambda dy=dy, w=w: dy @ w, 0.08))])
        rows["weight"].append([n, k, tokens, rounded(best_s(lambda dy=dy, x=x: dy.t() @ x, 0.08))])
    return rows


def square_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 768-cube in `dtype`."""
    a, b = torch.randn(768, 768).to(dtype), torch.randn(768, 768).to(dtype)
    return 2 * 768**3 / best_s(lambda: a @ b, 0.3)


def attention_rows() -> list[list[float]]:
    """scaled_dot_product_attention, causal and not, forward and backward."""
    rows = []
    for batch, heads, length, size in (
        (4, 4, 64, 16),
        (4, 4, 128, 32),
        (8, 8, 128, 64),
        (2, 8, 512, 64),
        (1, 8, 1024, 64),
    ):
        for causal in (0, 1):
            q, k, v = (torch.randn(batch, heads, length, size, requires_grad=True) for _ in range(3))
            run = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=bool(causal))
            forward = best_s(run)
            grad = torch.randn(batch, heads, length, size)
            both = best_s(lambda run=run, q=q, k=k, v=v, grad=grad: torch.autograd.grad(run(), (q, k, v), grad))
            rows.append([batch, heads, heads, length, length, size, causal, rounded(forward), rounded(both - forward)])
    return rows


def memory_rows() -> list[list[float]]:
    """out = a + b in float32 by bytes moved."""
    rows: list[list[float]] = []
    for numel in (1, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
        a, b, out = torch.randn(numel), torch.randn(numel), torch.empty(numel)
        seconds = best_s(lambda a=a, b=b, out=out: torch.add(a, b, out=out))
        while rows and rows[-1][1] >= seconds:  # a later, larger one was faster: the smaller one was disturbed
            rows.pop()
        rows.append([12 * numel, rounded(seconds)])
    return rows


def convolution_rows() -> dict[str, list[list[float]]]:
    """FLOP/s by FLOP per byte, forward and backward, made to ascend."""
    points: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
    for channels, size, kernel in ((16, 32, 1), (16, 32, 3), (64, 16, 1), (64, 16, 3), (128, 8, 3)):
        x = torch.randn(8, channels, size, size, requires_grad=True)
        w = torch.randn(channels, channels, kernel, kernel, requires_grad=True)
        run = partial(functional.conv2d, x, w, padding=kernel // 2)
        flops = 2 * x.numel() * channels * kernel**2
        moved = 4 * (2 * x.numel() + w.numel())
        grad = torch.randn_like(run())
        forward = best_s(run)
        both = best_s(lambda run=run, x=x, w=w, grad=grad: torch.autograd.grad(run(), (x, w), grad))
        points["forward"].append((flops / moved, flops / forward))
        points["backward"].append((flops / moved, 2 * flops / (both - forward)))
    rows = {}
    for name, values in points.items():
        kept: list[list[float]] = []
        for intensity, rate in sorted(values):
            if not kept or intensity > 1.05 * kept[-1][0]:
                kept.append([rounded(intensity), rounded(max(rate, kept[-1][1] if kept else 0.0), 4)])
        rows[name] = kept
    return rows


def optimizer_rates() -> tuple[float, float, float]:
    """(AdamW B/s at 28 B a parameter, its least seconds a call, clipping B/s at 12 B)."""
    big = [torch.nn.Parameter(torch.randn(512, 1024)) for _ in range(8)]
    small = [torch.nn.Parameter(torch.randn(8)) for _ in range(8)]
    seconds = []
    for parameters in (big, small):
        for p in parameters:
            p.grad = torch.randn_like(p)
        seconds.append(best_s(torch.optim.AdamW(parameters, fused=True).step))
    clip = best_s(lambda: torch.nn.utils.clip_grad_norm_(big, 1.0))
    n = sum(p.numel() for p in big)
    return 28 * n / seconds[0], seconds[1], 12 * n / clip


def operator_efficiencies(add_s: Callable[[float], float], source: str) -> Json:
    """Norms, softmax, activations and their backward against out = a + b of as many bytes (float32)."""
    x = torch.randn(512, 768, requires_grad=True)
    pixels = torch.randn(8, 64, 28, 28, requires_grad=True)
    scale, shift = torch.ones(768, requires_grad=True), torch.zeros(768, requires_grad=True)
    gain, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    cases: dict[str, tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...], str]] = {
        "native_layer_norm": (lambda: functional.layer_norm(x, (768,), scale, shift), (x, scale, shift), "_backward"),
        "gelu": (lambda: functional.gelu(x), (x,), "_backward"),
        "silu": (lambda: functional.silu(x), (x,), "_backward"),
        "_softmax": (lambda: functional.softmax(x, -1), (x,), "_backward_data"),
        "_log_softmax": (lambda: functional.log_softmax(x, -1), (x,), "_backward_data"),
        "native_batch_norm": (
            lambda: functional.batch_norm(pixels, None, None, gain, bias, training=True),
            (pixels, gain, bias),
            "_backward",
        ),
    }
    found = {}
    for name, (run, wanted, suffix) in cases.items():
        moved = 4 * wanted[0].numel()
        grad = torch.randn_like(wanted[0])
        forward = best_s(run)
        both = best_s(lambda run=run, wanted=wanted, grad=grad: torch.autograd.grad(run(), wanted, grad))
        found[name] = add_s(2 * moved) / forward
        found[name + suffix] = add_s(3 * moved) / max(both - forward, 1e-9)
    text = f"{source}; against out = a + b of as many bytes"
    return {name: figure(rounded(value, 3), text, "measured") for name, value in found.items()}


def embedding_efficiencies(add_s: Callable[[float], float]) -> tuple[float, float]:
    """Lookup of 4096 rows of 256, and its dense gradient for 8192 rows, against an element-wise kernel."""
    weight = torch.randn(8192, 256, requires_grad=True)
    ids = torch.randint(0, 8192, (4096,))
    forward = best_s(lambda: functional.embedding(ids, weight))
    grad = torch.randn(4096, 256)
    both = best_s(lambda: torch.autograd.grad(functional.embedding(ids, weight), weight, grad))
    moved = 4 * 2 * 4096 * 256
    return add_s(moved) / forward, add_s(moved // 2 + 4 * 8192 * 256) / (both - forward)


def operator_s() -> float:
    """Host seconds a kernel in a training step of tiny layers: a step's time over its kernels (3 a layer)."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(50)))
    x = torch.randn(2, 4)
    return best_s(lambda: layers(x).sum().backward(), 0.4) / (3 * 50)


def collective_worker(rank: int, size: int, port: int, results: Any) -> None:
    """One process: every collective at every message size, slowest rank counted."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    # torch 2.13 has new names for both; the old ones warn there.
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    for n_bytes in MESSAGES:
        full = torch.zeros(n_bytes // 4)
        part = torch.zeros(n_bytes // 4 // size)

        def send(full: torch.Tensor = full) -> None:
            if rank == 0:
                dist.send(full, 1)
            elif rank == 1:
                dist.recv(full, 0)

        operations: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda full=full: dist.all_reduce(full),
            "all_gather": lambda full=full, part=part: all_gather(full, part),
            "reduce_scatter": lambda full=full, part=part: reduce_scatter(part, full),
            "all_to_all": lambda full=full: dist.all_to_all_single(torch.empty_like(full), full),
            "send_recv": send,
        }
        for op, run in operations.items():
            if op == "send_recv" and size > 2:
                continue
            least = float("inf")
            for _ in range(8 if n_bytes > 2**23 else 40):
                dist.barrier()
                start = time.perf_counter()
                run()
                seconds = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                least = min(least, float(seconds))
            if rank == 0:
                results.put((op, size, n_bytes, least))
    dist.destroy_process_group()


def collective_times() -> dict[str, list[list[float]]]:
    """(group size, bytes, seconds) by operation, made monotone in the bytes."""
    found: dict[str, list[list[float]]] = {}
    context = multiprocessing.get_context("spawn")
    for i, size in enumerate(GROUPS):
        results = context.SimpleQueue()
        port = 29500 + os.getpid() % 1000 + i
        multiprocessing.spawn(collective_worker, args=(size, port, results), nprocs=size)
        while not results.empty():
            op, group, n_bytes, seconds = results.get()
            rows = found.setdefault(op, [])
            while rows and rows[-1][0] == group and rows[-1][2] >= seconds:
                rows.pop()
            rows.append([group, n_bytes, rounded(seconds)])
    return found


def collective_sections(source: str) -> dict[str, Json]:
    """The link level's tables; launch, step and bandwidth from the first and last rows, for other group sizes."""
    sections = {}
    for op, rows in collective_times().items():
        first, last = min(rows, key=lambda r: (r[1], r[0])), max(rows, key=lambda r: (r[1], -r[0]))
        wire = last[1] if op == "send_recv" else last[1] / 2 * (2 if op == "all_reduce" else 1)
        sections[op] = {
            "source": source,
            "evidence": "measured",
            "launch_s": 0.0,
            "step_s": rounded(first[2] / (2 if op == "all_reduce" else 1), 3),
            "bandwidth_bytes_per_s": rounded(wire / last[2], 3),
            "rows": rows,
        }
    return sections


def build() -> Json:
    """The whole profile."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = (
        f"benchmarks/measure_cpu_gloo.py on {cores} cores of a virtual {platform.machine()} machine, "
        f"1 thread a process, torch {torch.__version__}, {today}"
    )
    assumed = "stated for the local demonstration; another machine has other figures"
    none = "a CPU process has none"
    gemm, memory, convolution = gemm_rows(), memory_rows(), convolution_rows()
    rates = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
    peaks = {name: square_rate(dtype) for name, dtype in rates.items()}
    best = max(2 * m * n * k / t for rows in gemm.values() for m, n, k, t in rows)
    peaks["float32"] = max(peaks["float32"], best)
    peak = rounded(peaks["float32"], 4)
    law = fit_gemm_law(gemm, peak)
    bandwidth = max(x / t for x, t in memory)

    def add_s(n_bytes: float) -> float:
        return min((abs(x - n_bytes), t * n_bytes / x) for x, t in memory)[1]

    embed_forward, embed_backward = embedding_efficiencies(add_s)
    adam, adam_floor, clip = optimizer_rates()
    host = operator_s()
    collectives = collective_sections(f"{source}; gloo over loopback, slowest rank")
    fit = f"least squares on the rows of this file ({source})"

    def measured(value: float, what: str = "") -> Json:
        return figure(rounded(value, 4), f"{source}{'; ' + what if what else ''}", "measured")

    return {
        "schema_version": 1,
        "name": "cpu-gloo",
        "description": f"Local CPU processes over gloo, 1 thread each, {cores} shared cores (for demonstration)",
        "kind": "cpu",
        "device_names": [],
        "gpus_per_node": figure(8, assumed, "assumed"),
        "memory": {
            "device_bytes": figure(4 * 2**30, f"4 GiB a process, {assumed}", "assumed"),
            "context_bytes": figure(0, none, "assumed"),
            "nccl_base_bytes": figure(0, none, "assumed"),
            "nccl_communicator_bytes": figure(0, none, "assumed"),
            "reserve_fraction": figure(0.1, f"what malloc keeps, {assumed}", "assumed"),
        },
        "compute": {
            "peak_flops": {
                name: measured(rate, "largest measured rate of a matrix product") for name, rate in peaks.items()
            },
            "memory_bandwidth_bytes_per_s": measured(bandwidth, "largest rate of out = a + b, caches included"),
            "memory_time_s": {"source": f"{source}; out = a + b, float32", "evidence": "measured", "rows": memory},
            "operator_efficiency": operator_efficiencies(add_s, source),
            "kernel_floor_s": measured(host, "a training step of 50 tiny layers over its kernels"),
            "gemm": {
                "dtype": "float32",
                "max_efficiency": figure(law[0], fit, "fitted"),
                "half_flops": figure(law[1], fit, "fitted"),
                "exponent": figure(law[2], fit, "fitted"),
                "odd_efficiency": figure(1.0, "no penalty is known on CPUs", "assumed"),
                "even_efficiency": figure(1.0, "no penalty is known on CPUs", "assumed"),
                "sustained_flops": figure(peak, f"{source}; the largest rate, no power limit seen", "measured"),
                "rows": {"source": f"{source}; float32", "evidence": "measured", **gemm},
            },
            "attention": {
                "dtype": "float32",
                "backend": "cpu flash",
                "forward_efficiency": figure(0.5, f"law that the rows of this file correct ({source})", "fitted"),
                "backward_efficiency": figure(0.4, f"law that the rows of this file correct ({source})", "fitted"),
                "half_length": figure(50, f"law that the rows of this file correct ({source})", "fitted"),
                "rows": {"source": f"{source}; float32", "evidence": "measured", "rows": attention_rows()},
            },
            "embedding_forward_efficiency": measured(embed_forward, "lookup against out = a + b of as many bytes"),
            "embedding_backward_efficiency": measured(embed_backward, "dense gradient of 8192 rows of 256"),
            "convolution": {
                "dtype": "float32",
                "layout": "nchw",
                **{
                    k: {"source": f"{source}; float32, NCHW", "evidence": "measured", "rows": v}
                    for k, v in convolution.items()
                },
            },
            "fused_factor": figure(1.0, "CPU runs are not compiled", "assumed"),
            "optimizer": {
                "bytes_per_parameter": figure(
                    28, "float32 parameter, gradient, two moments read, three of them written", "datasheet"
                ),
                "bandwidth_bytes_per_s": measured(adam, "fused AdamW on 4 million parameters"),
                "floor_s": measured(adam_floor, "fused AdamW on 8 tensors of 8 elements"),
                "clip_bytes_per_parameter": figure(
                    12, "gradient read for the norm, read and written to scale", "datasheet"
                ),
                "clip_bandwidth_bytes_per_s": measured(clip, "clip_grad_norm_ on 4 million parameters"),
            },
            "shared_cores": figure(cores, source, "measured"),
        },
        "host": {
            "eager_s_per_op": measured(host, "a training step of 50 tiny layers over its kernels"),
            "fully_shard_s_per_op": figure(rounded(2 * host, 4), "twice eager, the ratio seen on GPU hosts", "assumed"),
            "compiled_s_per_op": measured(host, "CPU runs are not compiled: as eager"),
        },
        "overlap": {
            "compute_slowdown": figure(1.5, f"gloo's threads share the cores, {assumed}", "assumed"),
            "communication_slowdown": figure(1.5, f"gloo's threads share the cores, {assumed}", "assumed"),
        },
        "links": [
            {
                "name": "loopback",
                "size": 8,
                "bandwidth_bytes_per_s": figure(
                    collectives["send_recv"]["bandwidth_bytes_per_s"], f"{source}; send of 64 MiB", "measured"
                ),
                "latency_s": figure(collectives["send_recv"]["step_s"], f"{source}; send of 4 KiB", "measured"),
                "launch_s": figure(0, "held in the latency", "assumed"),
                "collectives": collectives,
            },
            {
                "name": "ethernet",
                "size": None,
                "bandwidth_bytes_per_s": figure(1.25e9, f"10 Gb/s between hosts, {assumed}", "assumed"),
                "latency_s": figure(50e-6, f"between hosts, {assumed}", "assumed"),
                "launch_s": figure(0, "held in the latency", "assumed"),
                "collectives": {},
            },
        ],
    }


def least_or_most(key: str) -> Callable[[float, float], float]:
    """min for times, max for rates."""
    is_time = key.endswith(("_s", "_per_op")) and not key.endswith("per_s")
    return min if is_time else max


def better(new: Any, old: Any, key: str = "") -> Any:
    """`new` with every measured time the lesser, every measured rate the larger of the two runs.

    Rows are matched by their leading columns; those of a convolution end in a rate, all others in seconds.
    """
    if isinstance(new, dict):
        if new.get("evidence") == "measured" and "value" in new:
            return {**new, "value": least_or_most(key)(new["value"], old["value"])}
        pick = "convolution" if key == "convolution" else None
        return {k: better(v, old[k], pick or k) if k in old and k != "evidence" else v for k, v in new.items()}
    if key in ("step_s", "bandwidth_bytes_per_s"):
        return least_or_most(key)(new, old)
    if isinstance(new, list) and new and isinstance(new[0], dict):
        return [better(a, b, key) for a, b in zip(new, old, strict=True)]
    if isinstance(new, list) and new and isinstance(new[0], list):
        seconds = 2 if len(new[0]) == 9 else 1
        earlier = {tuple(row[:-seconds]): row for row in old}
        choose = max if key == "convolution" else min
        merged = []
        for row in new:
            before = earlier.get(tuple(row[:-seconds]), row)
            merged.append(
                row[:-seconds] + [choose(a, b) for a, b in zip(row[-seconds:], before[-seconds:], strict=True)]
            )
        return merged
    return new


def ascending(profile: Json) -> Json:
    """The profile without rows of a curve that a larger size undercuts, and with its law fitted again."""
    compute = profile["compute"]
    curves = [compute["memory_time_s"], *profile["links"][0]["collectives"].values()]
    for section in curves:
        rows = section["rows"]
        section["rows"] = [
            row for i, row in enumerate(rows) if not any(r[:-2] == row[:-2] and r[-1] <= row[-1] for r in rows[i + 1 :])
        ]
    gemm, peak = compute["gemm"], compute["peak_flops"]["float32"]["value"]
    law = fit_gemm_law({wrt: gemm["rows"][wrt] for wrt in ("forward", "input", "weight")}, peak)
    for key, value in zip(("max_efficiency", "half_flops", "exponent"), law, strict=True):
        gemm[key]["value"] = value
    return profile


def main() -> None:
    """Measure and write cpu-gloo.json into --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cpu-gloo.json")
    parser.add_argument("--earlier", type=Path, help="an earlier file of this machine: the better of both runs is kept")
    args = parser.parse_args()
    profile = build()
    if args.earlier is not None:
        profile = better(profile, json.loads(args.earlier.read_text()))
    write_profile(ascending(profile), args.out)


if __name__ == "__main__":
    main()
