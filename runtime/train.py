"""Training for some steps under a plan, on the target's own example data: what every worker of `tpplan run` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UsageError
from ..planner.inputs import Inputs
from ..planner.plan import Plan
from .api import Parallel, parallelize
from .metrics import (
    MetricsFile,
    StepRecord,
    closing_table,
    memory_kind,
    peak_memory_bytes,
    progress_line,
)
from .options import RunOptions


def train(options: RunOptions) -> None:
    """Run the plan on this rank; rank 0 prints and writes the metrics. A collective call of all ranks.

    Raises
    ------
    TpplanError
        For whatever a user can mend.
    """
    plan = Plan.load(options.plan)
    check_runnable(plan)
    parallel = parallelize(
        locate_target(plan, Path(options.plan)),
        plan,
        optimizer=optimizer_factory(plan, options.lr, options.device),
        device=options.device,
        seed=options.seed,
        init_from=options.init_from,
        clip_grad_norm=options.clip_grad_norm,
        compiled=options.compiled,
    )
    leads = dist.get_rank() == 0
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if leads else (lambda text: None)
    metrics = MetricsFile(options.metrics if leads else None)
    say(introduction(parallel, options))
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parallel.device)
    times: list[float] = []
    peaks: list[int] = []
    for step in range(options.steps):
        record, peaks = run_step(parallel, step)
        times.append(record.step_time_s)
        metrics.write(record)
        say(progress_line(record, options.steps))
    say("\n" + closing_table(plan, times, peaks, memory_kind(parallel.device)))
    dist.barrier()


def run_step(parallel: Parallel, step: int) -> tuple[StepRecord, list[int]]:
    """One timed step: its record, and the peak memory of each pipeline rank so far."""
    plan, mesh = parallel.plan, parallel.mesh
    batch = parallel.samples.of_replica(
        step, mesh.replica, mesh.replicas, plan.batch.microbatches, plan.batch.microbatch_size
    )
    dist.barrier()
    begin = time.perf_counter()
    result = parallel.train_step(batch)
    # Reading the loss waits for the device.
    loss, norm = torch.stack([result.loss, result.grad_norm]).tolist()
    elapsed = time.perf_counter() - begin
    peaks = stage_peaks(parallel)
    tokens = plan.batch.global_batch * tokens_per_sample(batch[0], plan.batch.sequence_length)
    record = StepRecord(
        step=step,
        loss=loss,
        grad_norm=norm,
        step_time_s=elapsed,
        tokens_per_s_per_gpu=tokens / elapsed / plan.mesh.world_size,
        peak_memory_bytes=max(peaks),
        memory_kind=memory_kind(parallel.device),
    )
    return record, peaks


def stage_peaks(parallel: Parallel) -> list[int]:
    """Largest peak memory of the ranks at each place of the pipeline."""
    peaks = torch.zeros(parallel.mesh.degree("pp"), dtype=torch.int64, device=parallel.device)
    peaks[parallel.mesh.rank("pp")] = peak_memory_bytes(parallel.device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return peaks.tolist()


def tokens_per_sample(inputs: Inputs, sequence_length: int) -> int:
    """The sequence length for models that read token ids; for others a sample counts as one."""
    for tensor in inputs.tensors().values():
        if not tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] == sequence_length:
            return sequence_length
    return 1


def check_runnable(plan: Plan) -> None:
    """Raise UsageError if the plan is one for estimates and exports only."""
    sharded = plan.mesh.data_parallel_shard_degree > 1
    if not plan.schedule.runnable or (sharded and plan.sharding.zero_stage < 2):
        what = f"schedule {plan.schedule.name}, ZeRO {plan.sharding.zero_stage}"
        raise UsageError(
            f"This plan ({what}) can be estimated and exported, but not run.",
            "Plan again with `tpplan suggest`; `run` takes 1F1B, GPipe and interleaved 1F1B, ZeRO 2 and 3.",
        )


def locate_target(plan: Plan, path: Path) -> str:
    """The plan's target, which may lie beside the plan instead of under the working directory."""
    target = plan.model.target
    name = target if Path(target).exists() else target.partition(":")[0]
    beside = path.resolve().parent / target
    found_beside = not Path(name).exists() and (path.resolve().parent / name).exists()
    return str(beside) if found_beside else target


def optimizer_factory(
    plan: Plan, lr: float, device: str | None
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """The plan's optimizer, fused on CUDA."""
    if plan.precision.optimizer == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=lr)
    fused = device != "cpu" and torch.cuda.is_available()
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=fused)


def introduction(parallel: Parallel, options: RunOptions) -> str:
    """What is about to run, in a few lines."""
    plan, mesh = parallel.plan, parallel.mesh
    degrees = [f"{axis} {mesh.degree(axis)}" for axis in ("pp", "dp_replicate", "dp_shard", "tp")]
    weighting = {
        "tokens": "a sum over the targets of the global batch, divided by their number",
        "equal": "the model's own mean, with the same weight for every microbatch",
    }[parallel.target.loss_weighting]
    clipping = f"clipped at {options.clip_grad_norm:g}" if options.clip_grad_norm is not None else "not clipped"
    return (
        f"{parallel.target.name} on {plan.mesh.world_size} x {parallel.device.type}: {', '.join(degrees)}; "
        f"torch {torch.__version__}, Python {sys.version.split()[0]}\n"
        + "".join(f"{line}\n" for line in pipeline_lines(plan))
        + f"Global batch {plan.batch.global_batch} = {plan.batch.microbatches} microbatches of "
        f"{plan.batch.microbatch_size} x {mesh.replicas} replicas; {plan.precision.name}; "
        f"{plan.precision.optimizer}, lr {options.lr:g}, gradients {clipping}; seed {options.seed}\n"
        f"Loss: {weighting}."
    )


def pipeline_lines(plan: Plan) -> list[str]:
    """The schedule of a pipeline, and which ranks are neighbours where there is a choice."""
    lines, mesh = [], plan.mesh
    if mesh.pipeline_parallel_degree > 1:
        chunks = plan.schedule.virtual_stages
        lines.append(f"Schedule {plan.schedule.name}{f' with {chunks} stages a rank' if chunks > 1 else ''}.")
    degrees = mesh.degrees
    inside_out = [axis for axis in reversed(mesh.order) if degrees[axis] > 1]
    if len(inside_out) > 1:
        lines.append(f"Consecutive ranks run along {inside_out[0]}, then {', '.join(inside_out[1:])}.")
    return lines
