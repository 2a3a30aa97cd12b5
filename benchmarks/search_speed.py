"""Time and gap of the search on synthetic spaces of Llama 8B and 70B: python benchmarks/search_speed.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "planner"))

from instances import LLAMA_8B, LLAMA_70B, transformer_space
from tpplan.planner.search import search

CASES = (
    ("8B, 16 GPUs, 79 GiB", LLAMA_8B, 16, 256, 79),
    ("8B, 16 GPUs, 30 GiB", LLAMA_8B, 16, 256, 30),
    ("8B, 16 GPUs, 10 GiB", LLAMA_8B, 16, 256, 10),
    ("70B, 64 GPUs, 79 GiB", LLAMA_70B, 64, 256, 79),
    ("70B, 64 GPUs, 40 GiB", LLAMA_70B, 64, 256, 40),
    ("70B, 1024 GPUs, 79 GiB", LLAMA_70B, 1024, 1024, 79),
)


def main() -> None:
    """One row a case and gap: candidates, status, gap, bounds' shares, exact solves, processor seconds."""
    print(f"{'case':24}{'gap':>8}{'candidates':>12}{'status':>12}{'proven':>10}{'solved':>8}{'cpu s':>8}  pruned")
    for gap in (5e-3, 1e-4):
        for name, model, gpus, batch, memory_gib in CASES:
            candidates = transformer_space(model, gpus, global_batch=batch, memory_bytes=memory_gib * 2**30)
            start = time.process_time()
            result = search(candidates, gap=gap)
            seconds = time.process_time() - start
            print(
                f"{name:24}{gap:>8}{result.candidates:>12}{result.status:>12}{result.gap:>10.5f}{result.solved:>8}"
                f"{seconds:>8.2f}  {result.pruned}, {result.infeasible} infeasible"
            )


if __name__ == "__main__":
    main()
