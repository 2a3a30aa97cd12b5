"""Every layout of a model on a few GPUs as plan files: each mesh and schedule at the planner's best, and variations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planning_cases.cases import ROOT


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained: a target under the repository's root, and its sizes."""

    name: str
    target: str
    seq_len: int
    global_batch: int
    precision: str = "bf16"


WORKLOADS = (
    Workload("llama_1b", "examples/llama_1b", 4096, 16),
    Workload("llama3_8b", "examples/llama3_8b", 4096, 16),
)
DRY = (
    Workload("llama_tiny", "examples/llama_tiny", 64, 8, "fp32"),
    Workload("bert_tiny", "examples/bert_tiny", 32, 8, "fp32"),
)


def factorings(gpus: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `gpus` as an ordered product of `axes` degrees.

    >>> list(factorings(2, 2))
    [(1, 2), (2, 1)]
    """
    if axes == 1:
        yield (gpus,)
        return
    for degree in range(1, gpus + 1):
        if gpus % degree == 0:
            yield from ((degree, *rest) for rest in factorings(gpus // degree, axes - 1))


def pins_of_layouts(gpus: int, deep: bool) -> Iterator[tuple[str, ...]]:
    """The pins of each layout; first none at all: the planner's own choice.

    One for each mesh and, with stages, each schedule that the runtime executes; `deep` adds for each every power of
    two as the microbatch size, and recomputation and ZeRO-3 everywhere.
    """
    yield ()
    for pp, tp, replicate, shard in factorings(gpus, 4):
        mesh = (f"pp={pp}", f"tp={tp}", f"dp_replicate={replicate}", f"dp_shard={shard}")
        for schedule in ("1f1b", "gpipe", "interleaved") if pp > 1 else ("1f1b",):
            pins = (*mesh, f"schedule={schedule}")
            yield pins
            if deep:
                yield from ((*pins, f"microbatch_size={size}") for size in (1, 2, 4, 8, 16))
                yield (*pins, "recompute=full")
                if shard > 1:
                    yield (*pins, "zero_stage=3")


def write_plans(workload: Workload, gpus: int, hardware: str, folder: Path, deep: bool) -> list[dict[str, object]]:
    """Plan every layout into `folder`; what became of each: its file, or why there is none.

    Different pins may lead to the same plan, which is written once.
    """
    import tpplan

    os.chdir(ROOT)  # plans name their target relative to where they were made, and are run from there
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, str] = {}
    listed: list[dict[str, object]] = []
    for pins in pins_of_layouts(gpus, deep):
        row: dict[str, object] = {"model": workload.name, "pins": list(pins)}
        listed.append(row)
        try:
            plan = tpplan.suggest(
                workload.target,
                gpus=gpus,
                hardware=hardware,
                seq_len=workload.seq_len,
                global_batch=workload.global_batch,
                precision=workload.precision,
                fix=pins,
            )
        except tpplan.TpplanError as error:
            row["left_out"] = str(error).splitlines()[0]
            print(f"{workload.name} {' '.join(pins)}: {row['left_out']}", flush=True)
            continue
        parts = ("mesh", "batch", "schedule", "sharding", "stages", "tensor_parallel")
        content = plan.model_dump_json(include=set(parts))
        if content in known:
            row["same_as"] = known[content]
            continue
        known[content] = row["file"] = f"{workload.name}-{len(known):03d}.json"
        row["predicted_s"] = plan.predicted.step_time_s
        plan.save(folder / str(row["file"]))
        print(f"{row['file']} {' '.join(pins) or 'own choice'}: {plan.predicted.step_time_s * 1e3:.1f} ms", flush=True)
    return listed
