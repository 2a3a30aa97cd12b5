"""The pool itself: results in rank order, collectives, and survival of a task that fails on one rank."""

from __future__ import annotations

import pytest
from worker_pool import WorkerError


def _sum_of_ranks(rank: int, world: int, offset: int) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(rank + offset))
    dist.all_reduce(value)
    return value.item()


def _fails_on_one(rank: int, world: int) -> None:
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def test_runs_on_every_rank_of_a_subworld(pool) -> None:
    assert pool.run(_sum_of_ranks, world=2, offset=1) == [3.0, 3.0]
    assert pool.run(_sum_of_ranks, world=4, offset=0) == [6.0] * 4


def test_a_failure_names_the_rank_and_the_pool_lives_on(pool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1(.|\n)*only here"):
        pool.run(_fails_on_one, world=2)
    assert pool.run(_sum_of_ranks, world=2, offset=0) == [1.0, 1.0]
