"""Set predicted kernel times beside those profiled in whole training steps of Llamas (matrix products, attention).

    python benchmarks/kernels_in_situ.py RUNS.csv PROFILE.csv --hardware h100-sxm --out benchmarks/results/kernels.json

RUNS.csv has a row a run: run_id, model, n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab, seq_len, tp, pp,
world, microbatch_seqs, n_microbatches, ac, power_w_mean. PROFILE.csv has run_id, rank, category (gemm, attn or
attention), ms. Nothing of these runs is fitted: the profile's rows were timed alone, in other processes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from tpplan.costmodels.compute import kernel_s
from tpplan.hardware_profiles import load_profile
from tpplan.hardware_profiles.device import DeviceModel


def gemm_s(tokens: int, n: int, k: int, device: DeviceModel) -> float:
    """Forward, input gradient and weight gradient of a linear layer of k inputs and n outputs."""
    shapes = (("forward", (tokens, n, k)), ("input", (tokens, k, n)), ("weight", (n, k, tokens)))
    flops, moved = 2.0 * tokens * n * k, 2.0 * (tokens * n + n * k + tokens * k)
    return sum(kernel_s("gemm", flops, moved, (1, *s), "bfloat16", wrt, device) for wrt, s in shapes)


def predicted_s(run: Any, device: DeviceModel) -> tuple[float, float]:
    """(matrix products, attention) seconds of a step, mean over ranks."""
    tokens, hidden, tp = run.microbatch_seqs * run.seq_len, run.hidden, run.tp
    heads, kv = run.n_heads // tp, max(1, run.n_kv_heads // tp)
    linear = [(heads * run.head_dim, hidden), (hidden, heads * run.head_dim), (hidden, run.ffn // tp)]
    linear += [(kv * run.head_dim, hidden)] * 2 + [(run.ffn // tp, hidden)] * 2
    layer = sum(gemm_s(tokens, n, k, device) for n, k in linear)
    products = run.n_layers * layer + gemm_s(tokens, run.vocab // tp, hidden, device)
    dims = (run.microbatch_seqs, heads, kv, run.seq_len, run.seq_len, run.head_dim, 1)
    attention = sum(kernel_s("attention", 0, 0, dims, "bfloat16", wrt, device) for wrt in ("forward", "other"))
    return run.n_microbatches * products / run.pp, run.n_microbatches * run.n_layers * attention / run.pp


def main() -> None:
    """Read the runs, print the ratios, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--hardware", default="h100-sxm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = load_profile(args.hardware).device
    times = (
        pd.read_csv(args.profile)
        .groupby(["run_id", "category"])
        .ms.sum()
        .unstack()
        .rename(columns={"attention": "attn"})
    )
    rows = []
    for run in pd.read_csv(args.runs).itertuples():
        if run.run_id not in times.index or run.ac != "none":
            continue
        products, attention = predicted_s(run, device)
        measured = times.loc[run.run_id] * 1e-3 / run.world
        rows.append(
            {
                "run": run.run_id,
                "gemm_measured_s": round(float(measured.gemm), 5),
                "gemm_ratio": round(products / measured.gemm, 3),
                "attention_measured_s": round(float(measured.attn), 5),
                "attention_ratio": round(attention / measured.attn, 3),
                "power_w": round(run.power_w_mean),
            }
        )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    summary = {
        f"{kind}_{name}": round(float(value), 3)
        for kind in ("gemm_ratio", "attention_ratio")
        for name, value in table[kind].quantile([0.1, 0.5, 0.9]).set_axis(["p10", "median", "p90"]).items()
    }
    print(summary)
    if args.out:
        args.out.write_text(json.dumps({"hardware": args.hardware, "summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
