"""`tpplan.parallelize`: apply a plan inside a user's own training loop.

plan = tpplan.Plan.load("plan.json")
parallel = tpplan.parallelize("model.py", plan, device="cuda")     # under torchrun, on every rank
for batch in loader:                                               # this replica's samples
    result = parallel.train_step(batch)
    print(result.loss.item(), result.grad_norm.item())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import EnvironmentFailure, UsageError
from ..planner.inputs import Inputs, take
from ..planner.plan import Plan
from ..planner.sources import Source
from ..planner.target import Target, load_target
from .data import Samples
from .data_parallel import GradientSync, kept_gathered, sum_scalar_gradients
from .gradients import clip, squared_norm
from .mesh import RankMesh, build_mesh
from .part import Shell
from .pipeline import LeanStage, PipelineSchedule, make_schedule, run_schedule
from .stage import BuildOptions, RankStages, Stage, build_stages
from .tensor_parallel import step_context

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class StepResult:
    """0-dim tensors on the device: the loss of the global batch, and the norm of all gradients before clipping.

    Reading them waits for the step.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor


class Parallel:
    """A model running under a plan: this rank's stages, their optimizer and the training step.

    Attributes
    ----------
    plan : Plan
    mesh : RankMesh
        All axes; ``mesh.replica`` of ``mesh.replicas`` says which samples this rank is to be given.
    stages : tuple of Stage
        One, or the chunks of an interleaved schedule; each has in ``part.model`` a copy of the user's module, with
        the parameters of that stage as DTensors by the user's own names.
    optimizer : torch.optim.Optimizer or None
        None on a rank without trainable parameters.
    samples : Samples
        The target's own example data, the same under every plan.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        options: BuildOptions,
        make_optimizer: OptimizerFactory,
        clip_grad_norm: float | None = None,
    ) -> None:
        self.plan, self.target, self.device = plan, target, options.device
        self.mesh: RankMesh = build_mesh(plan.mesh, options.device.type)
        self.samples = Samples(target, target.build("meta"), plan.batch.sequence_length, options.seed)
        example = self.samples.microbatch(0, 0, plan.batch.microbatch_size)
        self._built: RankStages = build_stages(target, plan, self.mesh, example, options)
        self._shared = self._built.shared
        self._clip = clip_grad_norm
        self._syncs = [self._sync_of(stage) for stage in self.stages]
        self._schedule = self._make_schedule() if len(plan.stages) > 1 else None
        self._parameters = list(self.named_parameters().values())
        trainable = [p for p in self._parameters if p.requires_grad]
        self.optimizer = make_optimizer(trainable) if trainable else None
        # Ranks that share tensors must draw the same dropout.
        torch.manual_seed(options.seed + 7919 * (1 + self.mesh.replica) + 104729 * self.mesh.rank("pp"))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """This rank's stages, in the order of the pipeline."""
        return self._built.stages

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all this rank's stages by the user's FQNs; one that several of them hold once."""
        return self._built.named_parameters()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.mesh.rank("pp") == self.mesh.degree("pp") - 1

    def train_step(self, batch: Inputs | Sequence[Inputs]) -> StepResult:
        """Forward, backward, reduction and optimizer step over one global batch; a collective call.

        Parameters
        ----------
        batch : Inputs or sequence of Inputs
            This replica's microbatches, or all its samples in one batch. Every rank of a replica (its pp and
            tp ranks) must be given the same.

        Raises
        ------
        UsageError
            If the number of samples or microbatches is not the plan's.
        """
        self.forward_backward(batch)
        result = self._totals()
        if self._clip is not None:
            clip(self._parameters, result.grad_norm, self._clip)
        if self.optimizer is not None:
            self.optimizer.step()
        self._shared.spread()
        return result

    def forward_backward(self, batch: Inputs | Sequence[Inputs]) -> None:
        """The step up to the gradients: summed over microbatches, replicas and tied stages, in ``.grad``."""
        microbatches = self._microbatches(batch)
        tokens = self.target.loss_weighting == "tokens"
        num_items = self._global_targets(microbatches) if tokens else None
        scale = 1.0 if tokens else 1.0 / (len(microbatches) * self.mesh.replicas)
        on_device = [mb.map(lambda t: t.to(self.device, non_blocking=True)) for mb in microbatches]
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        for stage in self.stages:
            stage.part.load(on_device, num_items, scale)
        with step_context(self.plan.tensor_parallel) if self.mesh.degree("tp") > 1 else nullcontext():
            losses = self._run_microbatches(len(microbatches))
        for stage in self.stages:
            sum_scalar_gradients(stage.part, self.mesh)
        self._shared.sum_gradients()
        self._loss = torch.stack([loss.detach().double().sum() for loss in losses]).sum() if losses else None
        for stage in self.stages:
            stage.part.load((), None, 1.0)

    def _run_microbatches(self, count: int) -> list[torch.Tensor]:
        if self._schedule is not None:
            return run_schedule(self._schedule, self.is_last_stage, count)
        losses = []
        for k in range(count):
            loss = self.stages[0].part(placeholder=True)
            self._syncs[0].before_backward(k == count - 1)
            loss.sum().backward()
            losses.append(loss.detach())
        return losses

    def _totals(self) -> StepResult:
        """Loss and gradient norm in one all-reduce over all ranks."""
        squares = squared_norm(self._parameters, self._shared.copies).to(self.device)
        counts = self._loss is not None and self.mesh.rank("tp") == 0
        loss = self._loss if counts and self._loss is not None else torch.zeros_like(squares)
        both = torch.stack([loss, squares])
        dist.all_reduce(both)
        return StepResult(loss=both[0], grad_norm=both[1].sqrt())

    def _global_targets(self, microbatches: Sequence[Inputs]) -> torch.Tensor:
        """Targets of the global batch that count in the loss."""
        mine = sum(self.target.count_targets(microbatch) for microbatch in microbatches)
        count = torch.tensor(mine, dtype=torch.int64, device=self.device)
        for axis in ("dp_replicate", "dp_shard"):
            if self.mesh.degree(axis) > 1:
                dist.all_reduce(count, group=self.mesh.whole[axis].get_group())
        return count.clamp(min=1)

    def _microbatches(self, batch: Inputs | Sequence[Inputs]) -> list[Inputs]:
        size, count = self.plan.batch.microbatch_size, self.plan.batch.microbatches
        if isinstance(batch, Inputs):
            samples = next(iter(batch.tensors().values())).shape[0]
            if samples != size * count:
                raise UsageError(
                    f"train_step was given {samples} samples; the plan has {size * count} a replica and step.",
                    "Give each replica microbatch_size x microbatches samples.",
                )
            return [take(batch, k * size, (k + 1) * size) for k in range(count)]
        if len(batch) != count:
            raise UsageError(f"train_step was given {len(batch)} microbatches; the plan has {count}.")
        return list(batch)

    def _sync_of(self, stage: Stage) -> GradientSync:
        kept = kept_gathered(self.plan, stage.section)
        return GradientSync(cast(FSDPModule, stage.part), stage.part.model, kept, self.plan)

    def _make_schedule(self) -> PipelineSchedule:
        pipes = [
            LeanStage(
                Shell(stage.part),
                stage.section.index,
                len(self.plan.stages),
                self.device,
                self.mesh.pp.get_group(),
                receives=stage.border.receives,
                sends=stage.border.sends,
                before_backward=sync.before_backward,
                loss_dtype=stage.part.loss_dtype,
            )
            for stage, sync in zip(self.stages, self._syncs, strict=True)
        ]
        return make_schedule(self.plan, pipes)


def parallelize(
    model: str | Target | Callable[[], nn.Module] | None,
    plan: Plan,
    *,
    optimizer: OptimizerFactory | None = None,
    lr: float = 1e-3,
    device: str | torch.device | None = None,
    seed: int = 0,
    init_from: str | os.PathLike[str] | None = None,
    clip_grad_norm: float | None = None,
    compiled: bool | None = None,
    float64: bool = False,
) -> Parallel:
    """Apply `plan` to a model on the running processes; a collective call of all ranks.

    Parameters
    ----------
    model : str, Target, callable or None
        As on the command line, or a function that builds the module; None takes the plan's own target.
    optimizer : callable, optional
        Makes the optimizer from this rank's parameters (DTensors); AdamW with `lr` if not given.
    device : optional
        "cpu" or "cuda"; CUDA where there is one. A process group is started if none is.
    seed : int
        Of the initial weights, which equal those of the user's own construction with this seed.
    init_from : path, optional
        A folder of safetensors to start from instead.
    clip_grad_norm : float, optional
        Largest norm of all gradients together; no clipping if not given.
    compiled : bool, optional
        Run repeated blocks under torch.compile; by default on CUDA only.
    float64 : bool
        Everything in float64, for numeric checks.

    Raises
    ------
    PlanFileError
        If the plan is for another model.
    EnvironmentFailure
        If the number of processes differs from the plan's, or there is no such device.
    """
    where = start_process_group(device)
    target = model if isinstance(model, Target) else _target(model, plan)
    options = BuildOptions(
        device=where,
        seed=seed,
        init_from=Path(init_from) if init_from is not None else None,
        float64=float64,
        compiled=where.type == "cuda" if compiled is None else compiled,
    )
    fused = where.type == "cuda"
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=fused))
    return Parallel(target, plan, options, make, clip_grad_norm)


def start_process_group(device: str | torch.device | None) -> torch.device:
    """This rank's device; starts NCCL (with gloo beside it) or gloo if no process group runs yet."""
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise EnvironmentFailure("CUDA was asked for, but torch sees no GPU.", "Use --device cpu.")
        if local >= torch.cuda.device_count():
            raise EnvironmentFailure(
                f"Local rank {local} has no GPU: torch sees {torch.cuda.device_count()}.",
                "Start one process a GPU, or use --device cpu.",
            )
        torch.cuda.set_device(local)
        where = torch.device("cuda", local)
    else:
        where = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return where


def _target(model: str | Callable[[], nn.Module] | None, plan: Plan) -> Target:
    if callable(model):
        build = model

        def construct(device: str) -> nn.Module:
            if device == "cpu":
                return build()
            from ..planner.construct import build_on_meta

            return build_on_meta(build)[0]

        name = getattr(build, "__name__", type(build).__name__)
        source = Source(kind="module", name=name, content_hash="", construct=construct)
        return Target(name, {}, tuple(plan.model.input_spec), plan.precision.name, source)
    return load_target(
        model or plan.model.target,
        model_args=plan.model.model_args,
        inputs=plan.model.input_spec,
        precision=plan.precision.name,
    )
