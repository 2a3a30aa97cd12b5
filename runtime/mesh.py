"""The device mesh of a plan and this rank's place in it.

Axes are torchtitan's and all exist at degree 1 too: pp, dp_replicate, dp_shard, cp, tp. The plan says which of them
consecutive ranks run along: in a mesh with pp 2, tp 2 and the order (tp, ..., pp), ranks 0 and 1 are a pipeline and
0 and 2 share tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import EnvironmentFailure, UsageError
from ..planner.plan import AXES, MeshSection


@dataclass(frozen=True, slots=True)
class RankMesh:
    """A view of the whole mesh from one rank."""

    whole: DeviceMesh

    def degree(self, axis: str) -> int:
        """Ranks along `axis`."""
        return self.whole[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's coordinate along `axis`."""
        return self.whole[axis].get_local_rank()

    @property
    def pp(self) -> DeviceMesh:
        """The pipeline that this rank belongs to."""
        return self.whole["pp"]

    @property
    def tp(self) -> DeviceMesh:
        """The ranks that share this rank's tensors."""
        return self.whole["tp"]

    @property
    def data_parallel(self) -> DeviceMesh:
        """The two-dimensional (dp_replicate, dp_shard) mesh that `fully_shard` is given."""
        return self.whole["dp_replicate", "dp_shard"]

    @property
    def replicas(self) -> int:
        """Replicas that see different samples: dp_replicate x dp_shard."""
        return self.degree("dp_replicate") * self.degree("dp_shard")

    @property
    def replica(self) -> int:
        """Which of the `replicas` this rank belongs to."""
        return self.rank("dp_replicate") * self.degree("dp_shard") + self.rank("dp_shard")


def build_mesh(section: MeshSection, device_type: str) -> RankMesh:
    """The mesh over the ranks of the default process group.

    Raises
    ------
    EnvironmentFailure
        If the number of processes is not the plan's.
    UsageError
        If the plan uses an axis that the runtime does not execute.
    """
    for axis in ("context", "expert"):
        degree = getattr(section, f"{axis}_parallel_degree")
        if degree > 1:
            raise UsageError(
                f"The plan has {axis}_parallel_degree {degree}; this runtime executes only 1.",
                "Plan again without it.",
            )
    world_size = dist.get_world_size()
    if world_size != section.world_size:
        raise EnvironmentFailure(
            f"The plan is for {section.world_size} processes, but {world_size} are running.",
            f"Start {section.world_size}, or plan with --gpus {world_size}.",
        )
    return RankMesh(DeviceMesh(device_type, rank_grid(section), mesh_dim_names=AXES))


def rank_grid(section: MeshSection) -> torch.Tensor:
    """The global rank at each coordinate (pp, dp_replicate, dp_shard, cp, tp).

    >>> rank_grid(
    ...     MeshSection(
    ...         pipeline_parallel_degree=2,
    ...         tensor_parallel_degree=2,
    ...         order=["tp", "dp_replicate", "dp_shard", "cp", "pp"],
    ...     )
    ... ).squeeze()
    tensor([[0, 2],
            [1, 3]])
    """
    laid_out = torch.arange(section.world_size).reshape([section.degrees[axis] for axis in section.order])
    grid = laid_out.permute([section.order.index(axis) for axis in AXES])
    # By way of a flat tensor: torch's meshes look at strides, and axes of degree 1 keep theirs from their old place.
    return grid.flatten().reshape(grid.shape)
