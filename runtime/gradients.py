"""After backward: gradients of parameters that several stages hold, the global norm, clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .mesh import RankMesh


class SharedParameters:
    """Parameters that more than one pipeline stage holds (tied weights): their gradients are summed.

    Parameters
    ----------
    holders : mapping
        Canonical FQN to the sorted stages that hold it; the same on every rank.
    mine : mapping
        Canonical FQN to this rank's parameter, for those it holds.
    """

    def __init__(
        self, holders: Mapping[str, tuple[int, ...]], mine: Mapping[str, nn.Parameter], mesh: RankMesh
    ) -> None:
        self._shared: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        self.copies: dict[int, int] = {}
        # Every rank must make every group, in one order: pipelines x distinct sets of holders.
        pipelines = mesh.whole.mesh.flatten(1).T.tolist()
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for stages in sorted({s for s in holders.values() if len(s) > 1}):
            for pipeline in pipelines:
                members = [pipeline[stage] for stage in stages]
                group = dist.new_group(members)
                if isinstance(group, dist.ProcessGroup) and dist.get_rank() in members:
                    groups[stages] = group
        # In order of names, so that all stages reduce in the same order.
        for name, parameter in sorted(mine.items()):
            stages = holders.get(name, ())
            if len(stages) > 1:
                self._shared.append((parameter, groups[stages]))
                self.copies[id(parameter)] = len(stages)
        for parameter in mine.values():
            if parameter.ndim == 0:  # FSDP leaves scalars whole on every replica
                self.copies[id(parameter)] = self.copies.get(id(parameter), 1) * mesh.replicas

    def sum_gradients(self) -> None:
        """Replace each gradient by its sum over the stages that hold the parameter."""
        for parameter, group in self._shared:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(_local(parameter.grad), group=group)


def squared_norm(parameters: Iterable[nn.Parameter], copies: Mapping[int, int]) -> torch.Tensor:
    """This rank's part of the squared norm of all gradients: summed over all ranks it is the whole.

    A value that n ranks hold counts 1/n on each.

    Parameters
    ----------
    copies : mapping
        id of a parameter to how many stages (of a scalar: and replicas) hold it, where that is more than one.
    """
    by_weight: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            weight = copies.get(id(parameter), 1) * _replication(parameter.grad)
            by_weight[weight].append(_local(parameter.grad))
    parts = [torch.nn.utils.get_total_norm(grads).double().square() / n for n, grads in by_weight.items()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def clip(parameters: Iterable[nn.Parameter], norm: torch.Tensor, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; no host synchronisation."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = _local(parameter.grad)
            local.mul_(factor.to(local))


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _replication(gradient: torch.Tensor) -> int:
    """How many ranks of one stage hold the same values."""
    if not isinstance(gradient, DTensor):
        return 1
    count = 1
    for axis, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            count *= gradient.device_mesh.size(axis)
    return count
