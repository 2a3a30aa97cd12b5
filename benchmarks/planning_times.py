"""Cold, whole-process time of `tpplan suggest` on the example configs: `python benchmarks/planning_times.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = [("nanogpt.py", 16), ("bert_base", 8), ("llama3_8b", 16), ("llama3_70b", 64), ("llama3_405b", 512)]


def main() -> None:
    examples = Path(__file__).resolve().parents[1] / "examples"
    print("| model | GPUs | wall | step time | gap |\n|---|---|---|---|---|")
    for name, gpus in CASES:
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder) / "plan.json"
            command = [sys.executable, "-m", "tpplan", "suggest", str(examples / name), "--gpus", str(gpus)]
            begin = time.perf_counter()
            done = subprocess.run([*command, "-o", str(plan)], capture_output=True, text=True, check=False, cwd=folder)
            wall = time.perf_counter() - begin
            if done.returncode:
                print(f"| {name} | {gpus} | {wall:.1f} s | exit {done.returncode} | {done.stderr.strip()[-80:]} |")
                continue
            found = json.loads(plan.read_text())
            step, gap = found["predicted"]["step_time_s"], found["solver"]["gap"]
            print(f"| {name} | {gpus} | {wall:.1f} s | {step:.3g} s | {gap:.2%} |", flush=True)


if __name__ == "__main__":
    main()
