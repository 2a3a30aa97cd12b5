"""Run members of the zoo at their measured sizes on this machine's GPUs, under the planner's choice, tp and pp.

    python benchmarks/zoo/on_gpus.py --gpus 2 --out benchmarks/results/zoo_2xh200

That the first loss is the same under every layout is the check; predicted and measured step and memory stand beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from members import by_name

RUN_LAYOUTS = Path(__file__).resolve().parents[1] / "run_layouts.py"
# member: (tokens or image side, global batch)
MEMBERS = {
    "resnet50": (224, 128),
    "t5_large": (512, 16),
    "mixtral_small": (2048, 8),
    "unet_sd15": (64, 8),
    "whisper_medium": (448, 8),
    "vit_large": (224, 64),
}


def main() -> None:
    """Run what is named, or all; a member that does not fit into the time is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MEMBERS))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layout", action="append", default=[])
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no member after so many seconds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    given = parser.parse_args()
    started = time.monotonic()
    for name in given.names:
        if time.monotonic() - started > given.limit_s:
            break
        seq, batch = MEMBERS[name]
        with tempfile.TemporaryDirectory() as folder:
            spec, arguments = by_name(name).target(Path(folder))
            command = [sys.executable, str(RUN_LAYOUTS), spec, "--gpus", str(given.gpus), "--seq-len", str(seq)]
            command += ["--global-batch", str(batch), "--steps", "8", "--skip", "3", "--limit-s", "120"]
            command += ["--out", str(given.out / f"{name}.json")]
            for layout in given.layout or ["", "tp=2", "pp=2"]:
                command += ["--layout", layout]
            for key, value in arguments.items():
                command += ["--model-arg", f"{key}={value}"]
            print(name, flush=True)
            subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
