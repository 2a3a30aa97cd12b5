"""After backward: gradients of parameters that several stages hold, the global norm, clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .mesh import RankMesh


@dataclass(frozen=True, slots=True)
class _Shared:
    """One parameter that several stages hold: this rank's copies, the first of which is trained."""

    leader: nn.Parameter
    followers: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None


class SharedParameters:
    """Parameters that more than one pipeline stage holds (tied weights): their gradients are summed.

    Where several stages of one rank (chunks of an interleaved schedule) hold a parameter, the first copy gets the sum
    and is the one to optimize; `spread` gives its values to the others.

    Parameters
    ----------
    holders : mapping
        Canonical FQN to the sorted stages that hold it; the same on every rank.
    mine : sequence of mappings
        For each stage of this rank, in order: canonical FQN to parameter, for those it holds.
    pipeline_ranks : sequence of int
        The pipeline rank of each stage.
    """

    def __init__(
        self,
        holders: Mapping[str, tuple[int, ...]],
        mine: Sequence[Mapping[str, nn.Parameter]],
        pipeline_ranks: Sequence[int],
        mesh: RankMesh,
    ) -> None:
        ranks_of = {name: tuple(sorted({pipeline_ranks[s] for s in stages})) for name, stages in holders.items()}
        groups = _groups_within_pipelines({ranks for ranks in ranks_of.values() if len(ranks) > 1}, mesh)
        copies: dict[str, list[nn.Parameter]] = defaultdict(list)
        for chunk in mine:
            for name, parameter in chunk.items():
                copies[name].append(parameter)
        # In order of names, so that all ranks reduce in the same order.
        self._shared = [
            _Shared(leader, tuple(followers), groups.get(ranks_of[name]))
            for name, (leader, *followers) in sorted(copies.items())
            if followers or ranks_of[name] in groups
        ]
        self.followers = {id(parameter) for shared in self._shared for parameter in shared.followers}
        self.copies: dict[int, int] = {}
        for name, (leader, *_) in copies.items():
            # FSDP leaves scalars whole on every replica.
            count = len(ranks_of[name]) * (mesh.replicas if leader.ndim == 0 else 1)
            if count > 1:
                self.copies[id(leader)] = count

    def sum_gradients(self) -> None:
        """Replace each gradient by its sum over the stages that hold the parameter, on its first copy only."""
        for shared in self._shared:
            leader = shared.leader
            if not leader.requires_grad:
                continue
            if leader.grad is None:
                leader.grad = torch.zeros_like(leader)
            for follower in shared.followers:
                if follower.grad is not None:
                    _local(leader.grad).add_(_local(follower.grad))
                    follower.grad = None
            if shared.group is not None:
                dist.all_reduce(_local(leader.grad), group=shared.group)

    @torch.no_grad()
    def spread(self) -> None:
        """Give this rank's other copies the values of the first, after the optimizer's step."""
        for shared in self._shared:
            for follower in shared.followers:
                _local(follower).copy_(_local(shared.leader))


def _groups_within_pipelines(
    rank_sets: Iterable[tuple[int, ...]], mesh: RankMesh
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """The group of each set of pipeline ranks within this rank's pipeline, where it is a member."""
    # Every rank must make every group, in one order: pipelines x distinct sets of holders.
    pipelines = mesh.whole.mesh.flatten(1).T.tolist()
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in sorted(rank_sets):
        for pipeline in pipelines:
            members = [pipeline[rank] for rank in ranks]
            group = dist.new_group(members)
            if isinstance(group, dist.ProcessGroup) and dist.get_rank() in members:
                groups[ranks] = group
    return groups


def squared_norm(parameters: Iterable[nn.Parameter], copies: Mapping[int, int]) -> torch.Tensor:
    """This rank's part of the squared norm of all gradients: summed over all ranks it is the whole.

    A value that n ranks hold counts 1/n on each.

    Parameters
    ----------
    copies : mapping
        id of a parameter to how many pipeline ranks (of a scalar: and replicas) hold it, where that is more than one.
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
