"""Samples: the same for every split of the global batch, and drawn without touching the caller's generators."""

from __future__ import annotations

import random

import torch
from plans import EXAMPLES
from tpplan.planner.target import load_target
from tpplan.runtime.data import Samples

ARGS = {"n_layer": "2", "n_head": "2", "n_embd": "16", "block_size": "16", "vocab_size": "50"}


def _samples(seed: int = 3) -> Samples:
    target = load_target(str(EXAMPLES / "nanogpt.py"), model_args=ARGS)
    return Samples(target, target.build("meta"), 8, seed)


def test_microbatches_of_any_size_hold_the_same_samples() -> None:
    samples = _samples()
    whole = samples.microbatch(1, 0, 8).kwargs["idx"]
    assert whole.shape == (8, 8)
    for size in (1, 2, 4):
        parts = [samples.microbatch(1, g, size).kwargs["idx"] for g in range(8 // size)]
        assert torch.equal(torch.cat(parts), whole)


def test_replicas_share_out_the_global_batch_round_robin() -> None:
    samples = _samples()
    second = samples.of_replica(0, replica=1, replicas=2, microbatches=2, size=2)
    for k, batch in enumerate(second):
        assert torch.equal(batch.kwargs["idx"], samples.microbatch(0, 2 * k + 1, 2).kwargs["idx"])


def test_steps_and_seeds_differ_and_the_callers_generators_do_not_move() -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    draws = [_samples(seed).microbatch(step, 0, 4).kwargs["idx"] for seed, step in ((3, 0), (3, 1), (4, 0))]
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
