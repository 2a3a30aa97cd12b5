"""What the ranks of a plan with several stages each are asked to do; workers load this file alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from tpplan.planner.inputs import Inputs
from tpplan.planner.plan import Plan
from tpplan.runtime.api import Parallel, parallelize

SEED, STEPS, LR, LARGEST_NORM = 5, 3, 0.1, 0.2


def start(plan: Plan) -> tuple[Parallel, list[Inputs]]:
    """The plan running in float64, and this replica's samples of the first step."""
    parallel = parallelize(None, plan, device="cpu", seed=SEED, float64=True, lr=LR, clip_grad_norm=LARGEST_NORM)
    mesh, batch = parallel.mesh, plan.batch
    samples = parallel.samples.of_replica(0, mesh.replica, mesh.replicas, batch.microbatches, batch.microbatch_size)
    return parallel, samples


def trained(rank: int, world: int, plan: Plan) -> dict[str, Any]:
    """After some steps: the norms of the gradients, how many parameters are optimized, and the whole value of every
    copy of each parameter by "stage.name"."""
    parallel, samples = start(plan)
    norms = [parallel.train_step(samples).grad_norm for _ in range(STEPS)]
    assert parallel.optimizer is not None
    values = {
        f"{stage.section.index}.{name}": (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for stage in parallel.stages
        for name, p in stage.part.model.named_parameters()
    }
    optimized = sum(len(group["params"]) for group in parallel.optimizer.param_groups)
    return {"norms": torch.stack(norms), "optimized": optimized, "values": values}


def buffers_in_flight(rank: int, world: int, plan: Plan) -> list[int]:
    """How many microbatches' received tensors all stages of this rank hold: at first, at most, at the end."""
    parallel, samples = start(plan)
    pipes: list[Any] = parallel._schedule._stages  # type: ignore[union-attr]
    counts: list[int] = []

    def count(*_: Any) -> None:
        received = [infos for pipe in pipes for infos in (*pipe.args_recv_info.values(), *pipe.grad_recv_info.values())]
        buffers = [[getattr(info, "buffer", None) for info in infos] for infos in received]
        counts.append(sum(any(b is not None and b.numel() and not b.is_meta for b in some) for some in buffers))

    for stage in parallel.stages:
        stage.part.register_forward_pre_hook(count)
    parallel.forward_backward(samples)
    count()
    return [counts[0], max(counts), counts[-1]]


def gathered(rank: int, world: int, plan: Plan, units: list[str]) -> list[list[bool]]:
    """Whether the weights of `units` are whole, before and after each forward and after the step."""
    parallel, samples = start(plan)
    part = parallel.stages[0].part
    biases = [part.model.get_submodule(unit) for unit in units]
    seen: list[list[bool]] = []

    def note(*_: Any) -> None:
        seen.append([not isinstance(unit.bias, DTensor) for unit in biases])

    part.register_forward_pre_hook(note)
    part.register_forward_hook(note)
    parallel.forward_backward(samples)
    note()
    return seen
