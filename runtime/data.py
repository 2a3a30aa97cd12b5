"""The samples of every step: the same under every plan, as each is made alone from (seed, step, index).

    global batch   = samples 0 .. global_batch - 1 of the step
    microbatch g   = samples g x microbatch_size .. (g + 1) x microbatch_size - 1
    replica r's k-th microbatch is g = k x replicas + r

A single process that runs microbatches 0, 1, 2 ... in order sees exactly what a plan's replicas see together.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..errors import ModelError
from ..planner.inputs import Inputs
from ..planner.target import Target


class Samples:
    """Example inputs of one target, sample by sample.

    Parameters
    ----------
    model : nn.Module
        The target's model (on meta is enough): its config says what it eats.
    sequence_length : int
        Tokens, or the side of images.
    """

    def __init__(self, target: Target, model: nn.Module, sequence_length: int, seed: int) -> None:
        self._target, self._model = target, model
        self._length, self._seed = sequence_length, seed
        with _seeded("shapes"):
            one = target.example_inputs(model, 1, sequence_length)
            two = target.example_inputs(model, 2, sequence_length)
        self._batch_dims = _batch_dims(one, two)

    def sample(self, step: int, index: int) -> Inputs:
        """Sample `index` of step `step`, as a batch of one."""
        with _seeded(f"{self._seed}:{step}:{index}"):
            return self._target.example_inputs(self._model, 1, self._length)

    def microbatch(self, step: int, g: int, size: int) -> Inputs:
        """Global microbatch `g` of step `step`, of `size` samples, on the CPU."""
        return self._join([self.sample(step, i) for i in range(g * size, (g + 1) * size)])

    def of_replica(self, step: int, replica: int, replicas: int, microbatches: int, size: int) -> list[Inputs]:
        """The microbatches of one replica, in order."""
        return [self.microbatch(step, k * replicas + replica, size) for k in range(microbatches)]

    def _join(self, parts: Sequence[Inputs]) -> Inputs:
        streams = [iter(part.tensors().values()) for part in parts]
        dims = iter(self._batch_dims)

        def join(_: torch.Tensor) -> torch.Tensor:
            tensors = [next(stream) for stream in streams]
            dim = next(dims)
            return tensors[0] if dim is None else torch.cat(tensors, dim)

        return parts[0].map(join)


def _batch_dims(one: Inputs, two: Inputs) -> list[int | None]:
    """For each input tensor the dimension that grows with the batch, None if none does."""
    dims: list[int | None] = []
    for name, small in one.tensors().items():
        large = two.tensors()[name]
        grown = [d for d in range(small.ndim) if small.shape[d] != large.shape[d]]
        if len(grown) > 1 or small.ndim != large.ndim:
            raise ModelError(
                f"Input {name} has shape {tuple(small.shape)} for one sample, {tuple(large.shape)} for two.",
                "Inputs must have one batch dimension.",
            )
        dims.append(grown[0] if grown else None)
    return dims


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """The generators of torch, random and numpy seeded from `key`, and put back afterwards."""
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(value)
            random.seed(value)
            np.random.seed(value % 2**32)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
