"""Traced against measured peak memory of one GPU, eager and compiled, for fifteen models that are mostly no Llamas.

    python benchmarks/traced_memory.py [MODEL ...] [--write]

Measured: benchmarks/results/models_e2e_memory.csv, plain torch 2.11 on H200 and H100, `fully_shard` (bfloat16 compute,
float32 masters and reduction) on each repeated block and the root, fused AdamW; peak active bytes over the timed steps.
Layouts: one, fsdp2, fsdp4 and hsdp4 (1, 2, 4 and 4 ranks; one host). `--write` renews docs/traced-memory.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent / "zoo"))

from other_members import MEMBERS  # noqa: E402
from tpplan.hardware_profiles.catalog import load_profile  # noqa: E402
from tpplan.planner.choices import CostModel  # noqa: E402
from tpplan.planner.evaluate import evaluate  # noqa: E402
from tpplan.planner.graph import ModelGraph  # noqa: E402
from tpplan.planner.mesh import Mesh  # noqa: E402
from tpplan.planner.problem import Assignment  # noqa: E402
from tpplan.planner.request import Request  # noqa: E402
from tpplan.planner.sharding import Sharding, analyse  # noqa: E402
from tpplan.planner.target import load_target  # noqa: E402
from tpplan.planner.trace import trace  # noqa: E402

MEASURED = ROOT / "benchmarks" / "results" / "models_e2e_memory.csv"
PAGE = ROOT / "docs" / "traced-memory.md"
LAYOUTS = {"one": (1, 1), "fsdp2": (1, 2), "fsdp4": (1, 4), "hsdp4": (4, 1)}  # dp_replicate, dp_shard
INTRODUCTION = """\
Written by `python benchmarks/traced_memory.py --write`. The peak of active bytes on one rank as the trace and the
cost model give it, before any run, beside what torch 2.11 reported on H200 and H100 GPUs (the two agree to three
decimals, so equal rows are listed once). `batch x length` is per rank; a length is tokens, or the side of images or
latents.

No number is fitted to these rows, but three rules came out of earlier versions of the table, so it is no independent
test of them: dropout keeps a mask of one byte an element, attention with a learned mask that is not contiguous runs as
products and a softmax in float32, and compiled blocks keep what matrix products read.

T5 was measured with transformers 5.17, which hands its permuted position bias to attention (the math path); later
versions make it contiguous and get the fused kernel, which is what is traced where those are installed.

What is off: with full recompute, and for models whose parameters outweigh their activations (the small U-Net rows,
DLRM), the peak adds gradients and the largest workspace, which are not there at the same moment. DLRM under fsdp4 is
not explained.""".splitlines()
HARDWARE = {"h100": "h100-sxm", "h200": "h200-sxm"}


@dataclass(frozen=True, slots=True)
class Compared:
    """One measured row beside its traced figure, in GiB."""

    model: str
    batch: int
    seq: int
    layout: str
    recompute: str
    compiled: bool
    measured: float
    traced: float

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.traced / self.measured - 1


def traced_model(name: str, seq: int) -> tuple[ModelGraph, Sharding]:
    """Graph and shardings of a member of the zoo at its real size."""
    member = next(m for m in MEMBERS if m.name == name)
    with tempfile.TemporaryDirectory() as folder:
        spec, arguments = member.target(Path(folder))
        graph = trace(
            load_target(spec, model_args=arguments, inputs=member.inputs), sequence_length=seq, precision="bf16"
        )
    return graph, analyse(graph)


def predicted_gib(graph: ModelGraph, sharding: Sharding, row: dict[str, str]) -> float:
    """Peak active GiB of one rank under a row's layout."""
    replicate, shard = LAYOUTS[row["layout"]]
    profile = load_profile(HARDWARE[row["gpu"]])
    batch = int(row["batch_per_rank"])
    mesh = Mesh(
        pp=1,
        tp=1,
        microbatches=1,
        dp_replicate=replicate,
        dp_shard=shard,
        microbatch_size=batch,
        zero_stage=3,
        gradient_sync="every",
        schedule="1f1b",
    )
    request = Request(
        gpus=mesh.world_size,
        gpus_per_node=8,
        sequence_length=max(1, int(row["seq_or_size"])),
        global_batch=batch * mesh.dp,
        precision="bf16",
        optimizer="adamw",
        memory_limit_bytes=profile.memory_bytes,
    )
    problem = CostModel(graph, sharding, profile, request, compiled=row["compile"] == "1").problem(mesh)
    names = [[choice.name for choice in layer.choices] for layer in problem.layers]
    mode = row["recompute"]
    choices = tuple(options.index(mode) if mode in options else 0 for options in names)
    return max(evaluate(problem, Assignment((len(problem.layers),), choices)).stage_bytes) / 2**30


def compare(models: Sequence[str]) -> list[Compared]:
    """Every measured row of `models` (of all, if none is named), in the order of the file."""
    graphs: dict[tuple[str, int], tuple[ModelGraph, Sharding]] = {}
    found = []
    for row in csv.DictReader(MEASURED.open()):
        if models and row["model"] not in models:
            continue
        key = row["model"], int(row["seq_or_size"])
        if key not in graphs:
            graphs[key] = traced_model(key[0], max(1, key[1]))
        one = Compared(
            model=row["model"],
            batch=int(row["batch_per_rank"]),
            seq=int(row["seq_or_size"]),
            layout=row["layout"],
            recompute=row["recompute"],
            compiled=row["compile"] == "1",
            measured=float(row["peak_active_gib"]),
            traced=predicted_gib(*graphs[key], row),
        )
        found.append(one)
        print(line(one), flush=True)
    return found


def line(one: Compared) -> str:
    """A row of the table."""
    mode = "compiled" if one.compiled else "eager"
    cells = (one.model, f"{one.batch} x {one.seq}", one.layout, one.recompute, mode)
    return f"| {' | '.join(cells)} | {one.measured:.2f} | {one.traced:.2f} | {one.error:+.1%} |"


def summary(rows: Sequence[Compared]) -> list[str]:
    """Median and largest errors, by how the model ran."""
    lines = []
    groups = {
        "eager": [r for r in rows if not r.compiled and r.recompute == "none"],
        "eager, full recompute": [r for r in rows if not r.compiled and r.recompute == "full"],
        "compiled": [r for r in rows if r.compiled],
    }
    for name, chosen in groups.items():
        if chosen:
            errors = [abs(r.error) for r in chosen]
            within = sum(e <= 0.05 for e in errors)
            worst = max(chosen, key=lambda r: abs(r.error))
            lines.append(
                f"- {name}: {len(chosen)} rows, median |error| {statistics.median(errors):.1%}, {within} within 5 %, "
                f"largest {worst.error:+.1%} ({worst.model}, {worst.layout}, batch {worst.batch})"
            )
    return lines


def page(rows: Sequence[Compared]) -> str:
    """docs/traced-memory.md."""
    head = "| model | batch x length | layout | recompute | mode | measured GiB | traced GiB | error |"
    return "\n".join(
        [
            "# Traced memory beside measured memory",
            "",
            *INTRODUCTION,
            "",
            *summary(rows),
            "",
            head,
            "|---|---|---|---|---|---:|---:|---:|",
            *(line(row) for row in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/traced-memory.md")
    args = parser.parse_args()
    rows = compare(args.models)
    print("\n".join(summary(rows)))
    if args.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
