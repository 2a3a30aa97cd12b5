"""Plan and run several layouts of one model on this machine's GPUs; predicted against measured, side by side.

    python benchmarks/run_layouts.py examples/llama_1b --gpus 2 --seq-len 4096 --global-batch 16 \
        --layout "" --layout tp=2 --layout pp=2 --out benchmarks/results/llama_1b.json

An empty layout is the planner's own choice; others are comma-separated pins. Results are written after each run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def machine() -> dict[str, object]:
    """Device, driver and library versions."""
    import torch

    info: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        info |= {
            "gpu": torch.cuda.get_device_name(0),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return info


def call(command: list[str], limit_s: float) -> tuple[int, str]:
    """Exit code and output of a command (124 when it ran past its limit)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        return 124, str(error.stdout or "")[-4000:]
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--global-batch", type=int, required=True)
    parser.add_argument("--layout", action="append", default=[])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--hardware")
    parser.add_argument("--device")
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--run-arg", action="append", default=[], help="passed on to `tpplan run`")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=4, help="steps left out of the median")
    parser.add_argument("--limit-s", type=float, default=240)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, object] = {"machine": machine(), "arguments": sys.argv[1:], "runs": []}
    runs: list[dict[str, object]] = results["runs"]  # type: ignore[assignment]
    for layout in args.layout or [""]:
        with tempfile.TemporaryDirectory() as folder:
            plan_path, metrics = Path(folder) / "plan.json", Path(folder) / "metrics.jsonl"
            command = [sys.executable, "-m", "tpplan", "suggest", args.target, "--gpus", str(args.gpus)]
            command += ["--seq-len", str(args.seq_len), "--global-batch", str(args.global_batch)]
            command += ["--precision", args.precision, "-o", str(plan_path)]
            command += [part for pin in layout.split(",") if pin for part in ("--fix", pin)]
            command += [part for item in args.model_arg for part in ("--model-arg", item)]
            if args.hardware:
                command += ["--hardware", args.hardware]
            begin = time.perf_counter()
            code, text = call(command, args.limit_s)
            row: dict[str, object] = {"layout": layout or "planner's choice", "suggest_s": time.perf_counter() - begin}
            runs.append(row)
            if code:
                row |= {"suggest_exit": code, "output": text[-3000:]}
                print(f"{layout or 'own choice'}: suggest exited {code}\n{text[-1500:]}", flush=True)
            else:
                plan = json.loads(plan_path.read_text())
                row |= {key: plan[key] for key in ("mesh", "batch", "schedule", "sharding", "predicted")}
                row["recompute"] = [stage["recompute"] for stage in plan["stages"]]
                command = [sys.executable, "-m", "tpplan", "run", str(plan_path), "--steps", str(args.steps)]
                command += ["--metrics", str(metrics), *args.run_arg]
                if args.device:
                    command += ["--device", args.device]
                begin = time.perf_counter()
                code, text = call(command, args.limit_s)
                row |= {"run_exit": code, "run_s": time.perf_counter() - begin, "output": text[-3000:]}
                steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
                row["steps"] = steps
                report(layout, plan, steps[args.skip :], code, text)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


def report(layout: str, plan: dict, steps: list[dict], code: int, text: str) -> None:
    """One line: predicted against measured."""
    mesh = {k.split("_degree")[0]: v for k, v in plan["mesh"].items() if v > 1}
    head = f"{layout or 'own choice':24s} {mesh} mb{plan['batch']['microbatch_size']} x {plan['batch']['microbatches']}"
    if not steps:
        print(f"{head}: run exited {code}\n{text[-2500:]}", flush=True)
        return
    measured = statistics.median(s["step_time_s"] for s in steps)
    memory = max(s["peak_memory_bytes"] for s in steps) / 2**30
    predicted, expected = plan["predicted"]["step_time_s"], max(plan["predicted"]["peak_memory_bytes"]) / 2**30
    print(
        f"{head}: step {predicted * 1e3:.0f} ms predicted, {measured * 1e3:.0f} measured "
        f"({predicted / measured - 1:+.1%}); "
        f"peak {expected:.1f} GiB predicted, {memory:.1f} measured ({expected / memory - 1:+.1%}); "
        f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}; exit {code}",
        flush=True,
    )


if __name__ == "__main__":
    main()
