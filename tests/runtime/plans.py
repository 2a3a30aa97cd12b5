"""Hand-written plans of small models, for any mesh: stages of listed units, without a planner."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpplan.planner.plan import (
    AXES,
    BatchSection,
    HardwareSection,
    MeshSection,
    ModelSection,
    ModuleStyle,
    Plan,
    PrecisionSection,
    PredictedSection,
    ScheduleSection,
    ShardingSection,
    SolverSection,
    StageSection,
    TensorParallelSection,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def split(units: Sequence[str], cuts: Sequence[int]) -> list[list[str]]:
    """The units between successive cuts."""
    bounds = [0, *cuts, len(units)]
    return [list(units[a:b]) for a, b in itertools.pairwise(bounds)]


def write_plan(
    target: str,
    stages: Sequence[Sequence[str]],
    *,
    wires: Sequence[Sequence[str]] = (),
    model_args: Mapping[str, Any] | None = None,
    replicated: Sequence[str] = (),
    tp: int = 1,
    dp_replicate: int = 1,
    dp_shard: int = 1,
    microbatches: int = 2,
    microbatch_size: int = 1,
    sequence_length: int = 16,
    schedule: str = "1f1b",
    gradient_sync: str = "last",
    recompute: str = "none",
    reshard: bool = True,
    precision: str = "fp32",
    styles: Mapping[str, ModuleStyle] | None = None,
    loss_parallel: bool = False,
    input_spec: Sequence[str] = (),
    chunks: int = 1,
    order: Sequence[str] = AXES,
    kept: Sequence[str] = (),
) -> Plan:
    """A plan; `wires[i]` are the tensors that stage i sends to stage i + 1, `chunks` the stages a pipeline rank."""
    dp, pp = dp_replicate * dp_shard, len(stages) // chunks
    borders = [[], *map(list, wires), []]
    sections = [
        StageSection(
            index=i,
            pipeline_rank=i % pp,
            modules=list(units),
            replicated_modules=list(replicated),
            recompute={u: recompute for u in units if u.rpartition(".")[2].isdigit() and recompute != "none"},
            fsdp_units=list(units),
            kept_gathered=[unit for unit in units if unit in kept],
            receives=borders[i],
            sends=borders[i + 1],
        )
        for i, units in enumerate(stages)
    ]
    return Plan.model_validate(
        {
            "model": ModelSection(
                target=target,
                model_args=dict(model_args or {}),
                input_spec=list(input_spec),
                name="test",
                hash="",
                parameters=0,
                trainable_parameters=0,
                layers=1,
                classes=1,
                flops_per_sample=1.0,
            ),
            "hardware": HardwareSection(
                name="cpu-gloo",
                hash="",
                gpus=tp * dp * pp,
                gpus_per_node=8,
                memory_limit_bytes=2**30,
                peak_flops=1e9,
                peak_name="test",
            ),
            "mesh": MeshSection(
                pipeline_parallel_degree=pp,
                data_parallel_replicate_degree=dp_replicate,
                data_parallel_shard_degree=dp_shard,
                tensor_parallel_degree=tp,
                order=[*order],  # type: ignore[arg-type]
            ),
            "batch": BatchSection(
                global_batch=dp * microbatches * microbatch_size,
                microbatch_size=microbatch_size,
                microbatches=microbatches,
                sequence_length=sequence_length,
            ),
            "schedule": ScheduleSection.model_validate(
                {"name": schedule, "gradient_sync": gradient_sync, "virtual_stages": chunks}
            ),
            "precision": PrecisionSection.model_validate(
                {"name": precision, "compute_dtype": "bfloat16" if precision == "bf16" else "float32"}
            ),
            "sharding": ShardingSection(zero_stage=3 if reshard else 2, reshard_after_forward=reshard),
            "stages": sections,
            "tensor_parallel": TensorParallelSection(styles=dict(styles or {}), loss_parallel=loss_parallel),
            "predicted": PredictedSection(
                step_time_s=1.0,
                tokens_per_s_per_gpu=1.0,
                samples_per_s=1.0,
                mfu=0.1,
                peak_memory_bytes=[2**28] * pp,
                device_bytes=[2**29] * pp,
            ),
            "solver": SolverSection(status="optimal", objective_s=1.0, lower_bound_s=1.0, gap=0.0, wall_s=0.0),
        }
    )
