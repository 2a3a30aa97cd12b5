"""Embedding with the rows of its table divided over tp: look up what is here, sum over tp.

DTensor's own rule is not used: it compares `padding_idx` with local row numbers, so that rank r > 0 would drop
the gradient of a real token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..errors import PlanFileError

torch_embedding = F.embedding


def embedding_on_local_rows(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.embedding`; a weight that is `Shard(0)` gives a replicated result.

    Raises
    ------
    PlanFileError
        If a sharded weight meets an option that needs the whole table.
    """
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return torch_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise PlanFileError(
            "An embedding with max_norm, scale_grad_by_freq or sparse gradients has the style vocab.",
            "Give its module the style replicate, or plan again with `tpplan suggest`.",
        )
    if isinstance(input, DTensor):
        input = input.redistribute(placements=[Replicate()]).to_local()
    mesh, local = weight.device_mesh, weight.to_local()
    first = mesh.get_local_rank() * local.shape[0]
    mine = (input >= first) & (input < first + local.shape[0])
    rows = torch_embedding((input - first) * mine, local)
    learns = mine
    if padding_idx is not None:  # read forward, but without a gradient
        learns = mine & (input != padding_idx % weight.shape[0])
    here = torch.where(learns.unsqueeze(-1), rows, rows.detach() * mine.unsqueeze(-1))
    summed = DTensor.from_local(here, mesh, [Partial()], run_check=False)
    return summed.redistribute(placements=[Replicate()])
