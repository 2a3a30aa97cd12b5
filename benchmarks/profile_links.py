"""Sections on links, from measured tables: rows without outliers inside a node, laws, the assumed network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from profile_format import H100, H200, PUBLISHED, Json, figure, rounded


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
