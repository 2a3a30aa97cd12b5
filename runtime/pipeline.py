"""Pipeline parallelism on torch.distributed.pipelining: what its stages send, receive and hold.

Wires: torch's stages want every tensor that crosses a border to be floating point and to get a gradient (2.11
raises otherwise). So integers travel as float64, exact below 2**53, and what takes no part in backward gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from ..errors import UsageError
from ..planner.plan import Plan
from .stubs import Wire

ONE_STAGE_A_RANK: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}

PipelineSchedule = PipelineScheduleSingle | PipelineScheduleMulti


def travel_dtype(wire: Wire) -> torch.dtype:
    """The dtype in which a wire's tensor is sent."""
    return wire.meta.dtype if wire.meta.dtype.is_floating_point else torch.float64


def pack(tensors: Sequence[torch.Tensor], wires: Sequence[Wire]) -> tuple[torch.Tensor, ...]:
    """What a stage sends for `tensors`: contiguous, floating point, requiring gradients."""
    packed = []
    for tensor, wire in zip(tensors, wires, strict=True):
        sent = tensor.to(travel_dtype(wire)).contiguous()
        packed.append(sent if sent.requires_grad else sent.detach().requires_grad_())
    return tuple(packed)


def unpack(tensors: Sequence[torch.Tensor], wires: Sequence[Wire]) -> tuple[torch.Tensor, ...]:
    """The tensors that `pack` was given on the other side; each received one gets a gradient."""
    carrier = next((i for i, wire in enumerate(wires) if wire.meta.requires_grad), 0)
    touched = [t for i, t in enumerate(tensors) if i != carrier and not wires[i].meta.requires_grad]
    result = []
    for i, (tensor, wire) in enumerate(zip(tensors, wires, strict=True)):
        if i == carrier:
            result.append(_Touch.apply(tensor, *touched))
        else:
            result.append(tensor if wire.meta.requires_grad else tensor.detach().to(wire.meta.dtype))
    return tuple(result)


class _Touch(torch.autograd.Function):
    """The first tensor unchanged; backward gives all others a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(*others)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return (gradient, *(torch.zeros_like(other) for other in ctx.saved_tensors))


class LeanStage(PipelineStage):
    """A `PipelineStage` that holds receive buffers only while their microbatch is in flight.

    torch allocates buffers for all microbatches of a step at once.

    Parameters
    ----------
    module : nn.Module
        Takes the received tensors, returns those to send; the last stage returns its loss, of shape (1,).
    index, stages : int
        Position in the pipeline, number of stages.
    receives, sends : sequence of Wire
        What crosses the two borders.
    before_backward : callable
        Called with whether it is the step's last microbatch, before each backward.
    loss_dtype : torch.dtype
        Of what the last stage returns (torch 2.11 compares it).
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        *,
        receives: Sequence[Wire],
        sends: Sequence[Wire],
        before_backward: Callable[[bool], None],
        loss_dtype: torch.dtype,
    ) -> None:
        last = (torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True),)
        super().__init__(
            module,
            index,
            stages,
            device,
            input_args=_examples(receives),
            output_args=_examples(sends) if index + 1 < stages else last,
            group=group,
        )
        self._receives, self._sends = receives, sends
        self._before_backward = before_backward

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, where it allocates what is received in all microbatches; here that takes no memory."""
        with self._on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, where it allocates the gradients received in all microbatches; here that takes no memory."""
        with self._on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As in torch, with the buffers allocated now."""
        self._fill(self.args_recv_info[fwd_chunk_id], self._receives, requires_grad=True)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As in torch, with the buffers allocated now."""
        if not self.is_last:
            self._fill(self.grad_recv_info[bwd_chunk_id], self._sends, requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As in torch; then the microbatch's buffers are freed."""
        self._before_backward(bool(kwargs.get("last_backward", False)))
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _empty(self.args_recv_info[bwd_chunk_id])
        if not self.is_last:
            _empty(self.grad_recv_info[bwd_chunk_id])

    def _fill(self, infos: Any, wires: Sequence[Wire], *, requires_grad: bool) -> None:
        for info, wire in zip(infos, wires, strict=True):
            buffer = torch.empty(wire.meta.shape, dtype=travel_dtype(wire), device=self.device)
            info.buffer = buffer.requires_grad_(requires_grad)


def make_schedule(plan: Plan, stages: Sequence[PipelineStage]) -> PipelineSchedule:
    """The plan's schedule over this rank's stages; gradients are not rescaled by it.

    Interleaved 1F1B goes through the chunks in rounds of M / max(1, M // pp) microbatches each.

    Raises
    ------
    UsageError
        If the runtime does not execute this schedule, or not with so many microbatches.
    """
    name, chunks = plan.schedule.name, plan.schedule.virtual_stages
    microbatches, ranks = plan.batch.microbatches, plan.mesh.pipeline_parallel_degree
    if name == "interleaved":
        rounds = max(1, microbatches // ranks)
        if microbatches % rounds:
            raise UsageError(
                f"Interleaved 1F1B goes in {rounds} rounds over {ranks} pipeline ranks, which does not divide "
                f"{microbatches} microbatches.",
                "Plan again with a --global-batch of other divisors, or --fix schedule=1f1b.",
            )
        return ScheduleInterleaved1F1B(list(stages), microbatches, loss_fn=_given_loss, scale_grads=False)
    if name not in ONE_STAGE_A_RANK or chunks != 1:
        raise UsageError(
            f"This runtime does not execute the schedule {name} with {chunks} chunks a rank.",
            "Plan again with --fix schedule=1f1b.",
        )
    if name == "1f1b" and microbatches < ranks:
        raise UsageError(
            f"1F1B needs a microbatch for each stage: {microbatches} microbatches, {ranks} stages.",
            "Plan again with a larger --global-batch, or --fix schedule=gpipe.",
        )
    return ONE_STAGE_A_RANK[name](stages[0], microbatches, loss_fn=_given_loss, scale_grads=False)


def run_schedule(schedule: PipelineSchedule, is_last: bool, microbatches: int) -> list[torch.Tensor]:
    """One step; the microbatches' losses on the last stage, nothing elsewhere."""
    losses: list[torch.Tensor] = []
    # The target only numbers the microbatches: the module has computed the loss.
    target = torch.arange(microbatches) if is_last else None
    schedule.step(target=target, losses=losses if is_last else None, return_outputs=False)
    return losses


def _given_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).sum()


def _examples(wires: Sequence[Wire]) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty(wire.meta.shape, dtype=travel_dtype(wire), device="meta", requires_grad=True) for wire in wires
    )


def _empty(infos: Any) -> None:
    for info in infos:
        if getattr(info, "buffer", None) is not None:
            info.buffer = info.buffer.new_empty(0)
