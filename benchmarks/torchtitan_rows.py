"""Predicted against measured step time and peak memory on torchtitan runs of Llama models (a CSV of measured rows).

    python benchmarks/torchtitan_rows.py RUNS.csv --hardware h100-sxm --out benchmarks/results/torchtitan_rows.json

A row needs: model, hidden, n_layers, n_heads, n_kv_heads, ffn, vocab, seq_len, world, dp_replicate, dp_shard,
tp, pp, microbatch_seqs, n_microbatches, pp_schedule, pp_layers_per_rank, ac, compile, step_ms, peak_active_gib_max.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner.choices import CostModel, breakdown
from tpplan.planner.evaluate import evaluate
from tpplan.planner.mesh import Mesh
from tpplan.planner.problem import Assignment, Choice
from tpplan.planner.request import Request
from tpplan.planner.sharding import analyse
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

RECOMPUTE = {"none": "none", "op": "selective", "full": "full"}
SCHEDULES = {"": "1f1b", "1F1B": "1f1b", "GPipe": "gpipe"}


def config_of(row: dict[str, str]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(row["hidden"]),
        "num_hidden_layers": int(row["n_layers"]),
        "num_attention_heads": int(row["n_heads"]),
        "num_key_value_heads": int(row["n_kv_heads"]),
        "intermediate_size": int(row["ffn"]),
        "vocab_size": int(row["vocab"]),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


def layer_split(row: dict[str, str], layers: int, pp: int) -> list[int]:
    """Blocks of each stage; the embedding goes with the first, norm and head with the last."""
    if pp == 1:
        return [layers]
    per_rank = [sum(int(n) for n in cell.split("+")) for cell in row["pp_layers_per_rank"].split()]
    return per_rank[:: len(per_rank) // pp]


def chosen(choices: Sequence[Choice], mode: str, zero_stage: int) -> int:
    """The choice of a unit, cut by tp, that comes nearest: its recomputation and its ZeRO level where it has them."""

    def far(o: int) -> tuple[bool, bool, bool]:
        choice = choices[o]
        return choice.sharding != "tp", choice.name != mode, choice.zero_stage != zero_stage

    return min(range(len(choices)), key=far)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--hardware", default="h100-sxm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profile = load_profile(args.hardware)
    graphs = {}
    results = []
    for row in csv.DictReader(args.csv.open()):
        usable = row["status"] == "OK" and row["ac"] in RECOMPUTE and row["pp_schedule"] in SCHEDULES
        if not usable or row.get("alloc_thrash") == "1":
            continue
        config = config_of(row)
        seq = int(row["seq_len"])
        key = json.dumps([config, seq])
        if key not in graphs:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(config))
                graph = trace(load_target(folder), sequence_length=seq, precision="bf16")
            graphs[key] = (graph, analyse(graph))
        graph, sharding = graphs[key]
        tp, pp = int(row["tp"]), int(row["pp"])
        mesh = Mesh(
            pp=pp,
            tp=tp,
            virtual=1,
            sequence_parallel=False,
            microbatches=int(row["n_microbatches"]),
            dp_replicate=int(row["dp_replicate"]),
            gradient_sync="every" if pp == 1 else "last",
            schedule=SCHEDULES[row["pp_schedule"]],
            dp_shard=int(row["dp_shard"]),
            microbatch_size=int(row["microbatch_seqs"]),
        )
        request = Request(
            gpus=mesh.world_size,
            gpus_per_node=8,
            sequence_length=seq,
            global_batch=mesh.microbatch_size * mesh.microbatches * mesh.dp,
            precision="bf16",
            optimizer="adamw",
            memory_limit_bytes=profile.memory_bytes,
        )
        model = CostModel(graph, sharding, profile, request, compiled=row["compile"] == "1")
        problem = model.problem(mesh)
        n = len(problem.layers)
        first = n - int(row["n_layers"]) - 2
        boundaries, at = [], first
        for blocks in layer_split(row, int(row["n_layers"]), pp)[:-1]:
            at += blocks
            boundaries.append(at)
        mode = RECOMPUTE[row["ac"]]
        choices = tuple(chosen(layer.choices, mode, 3 if pp == 1 else 2) for layer in problem.layers)
        assignment = Assignment((*boundaries, n), choices)
        found = evaluate(problem, assignment)
        measured_s, measured_gib = float(row["step_ms"]) / 1e3, float(row["peak_active_gib_max"])
        parts = breakdown(model, mesh, assignment.boundaries, assignment.choices, found.step_time_s)
        results.append(
            {
                "run_id": row["run_id"],
                "compile": row["compile"],
                "host_bound": row.get("host_bound"),
                "measured_s": measured_s,
                "predicted_s": found.step_time_s,
                "time_error": found.step_time_s / measured_s - 1,
                "measured_gib": measured_gib,
                "predicted_gib": max(found.stage_bytes) / 2**30,
                "memory_error": max(found.stage_bytes) / 2**30 / measured_gib - 1,
                "parts": parts,
            }
        )
        r = results[-1]
        shown = " ".join(f"{name}={s * 1e3:.0f}" for name, s in parts.items() if abs(s) > 1e-3)
        print(
            f"{r['run_id'][:44]:44s} c{r['compile']} h{r['host_bound']} {measured_s * 1e3:7.0f} ms "
            f"{r['time_error']:+6.1%}   {measured_gib:5.1f} GiB {r['memory_error']:+6.1%}  {shown}",
            flush=True,
        )
    for name, keep in (("all", lambda r: True), ("GPU-bound", lambda r: r["host_bound"] != "1")):
        kept = [r for r in results if keep(r)]
        time_error = statistics.median(abs(r["time_error"]) for r in kept)
        memory_error = statistics.median(abs(r["memory_error"]) for r in kept)
        print(f"{name}: {len(kept)} rows, median |error| step time {time_error:.1%}, memory {memory_error:.1%}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
