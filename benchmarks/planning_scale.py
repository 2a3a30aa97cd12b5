"""How planning time grows with layers and with GPUs: Llamas of 8B's width, 24 to 128 layers, 8 to 16,384 H100.

    python benchmarks/planning_scale.py             # every point that has no result yet, then the pictures
    python benchmarks/planning_scale.py --draw      # only the pictures, from benchmarks/results/planning_scale.json

Each point is one cold `tpplan suggest` with the default gap. The pictures show processor seconds, all worker
processes counted, which depend less on what else the machine does than the wall clock, which the results hold too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from line_chart import Chart
from planning import load, machine, processor_s, save
from planning_cases.cases import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "planning_scale.json"
PICTURES = ROOT / "docs" / "pictures"
CONFIG = ROOT / "examples" / "llama3_8b" / "config.json"
LAYERS, GPUS = (24, 32, 48, 64, 80, 96, 112, 128), tuple(2**i for i in range(3, 15))
LAYERS_ON, LAYERS_OF = 64, 32
LIMIT_S = 300


def main() -> None:
    """Measure what is missing and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    given = parser.parse_args()
    results = load(given.out)
    points = [(layers, LAYERS_ON) for layers in LAYERS] + [(LAYERS_OF, gpus) for gpus in GPUS]
    coarse_first = points[::3] + points[1::3] + points[2::3]  # stopped half-way, the pictures still span the range
    for layers, gpus in coarse_first if not given.draw else []:
        name = f"{layers} layers, {gpus} GPUs"
        if "error" in results["rows"].get(name, {"error": ""}):
            results["rows"][name] = measure(layers, gpus)
            results["machine"] = machine()
            save(results, given.out)
            print(name, {k: v for k, v in results["rows"][name].items() if k != "seconds"}, flush=True)
    draw(results, given.pictures)


def measure(layers: int, gpus: int) -> dict[str, Any]:
    """One cold process."""
    with tempfile.TemporaryDirectory() as folder:
        model, plan = Path(folder) / "model", Path(folder) / "plan.json"
        model.mkdir()
        config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}
        (model / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "tpplan", "suggest", str(model), "--gpus", str(gpus), "-o", str(plan)]
        command += ["--hardware", "h100-sxm", "--seq-len", "4096", "--global-batch", str(max(256, gpus))]
        before_s, begin = processor_s(), time.perf_counter()
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {LIMIT_S} s"}
        row: dict[str, Any] = {"wall_s": time.perf_counter() - begin, "processor_s": processor_s() - before_s}
        if done.returncode:
            return {**row, "error": done.stderr.strip()[-300:]}
        solver = json.loads(plan.read_text())["solver"]
    return row | {key: solver[key] for key in ("gap", "status", "candidates", "solved", "seconds")}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Both pictures."""

    def series(points: list[tuple[int, str]]) -> dict[str, list[tuple[float, float]]]:
        found = [(float(x), results["rows"].get(name, {"error": ""})) for x, name in points]
        return {"imports, trace and search": [(x, row["processor_s"]) for x, row in found if "error" not in row]}

    charts = {
        "planning_layers": Chart(
            f"Planning time, Llama of 8B's width on {LAYERS_ON} H100",
            "layers",
            "processor seconds",
            series([(layers, f"{layers} layers, {LAYERS_ON} GPUs") for layers in LAYERS]),
        ),
        "planning_gpus": Chart(
            "Planning time, Llama-3 8B, a batch of max(256, GPUs)",
            "GPUs",
            "processor seconds",
            series([(gpus, f"{LAYERS_OF} layers, {gpus} GPUs") for gpus in GPUS]),
            logarithmic=True,
        ),
    }
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart.svg())


if __name__ == "__main__":
    main()
