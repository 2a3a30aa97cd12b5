"""Takes chance out of a traced run: draws that decide whether a layer runs decide that it does.

Layer-drop and stochastic depth compare one random number with a rate. Which side keeps the layer is the model's
own affair: numbers are large at first, and where parameters stay unused the tracer tries small ones (`low`).
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .kernels import OpInfo

PYTHON = "Python's or numpy's random numbers"
_UNIFORM = {"rand", "rand_like", "uniform", "uniform_"}
_BERNOULLI = {"bernoulli", "bernoulli_", "native_dropout"}
_OTHERS = {
    "randn", "randn_like", "normal", "normal_", "randint", "randint_like", "random", "random_",
    "randperm", "multinomial", "exponential", "exponential_", "cauchy_", "log_normal_", "geometric_",
    "poisson", "binomial", "normal_functional",
}  # fmt: skip
_WORDS = 624  # of the Mersenne twister
_SAME = 128  # words that are made equal; the others let the generator go on


class Chance:
    """What random draws give in one run.

    Parameters
    ----------
    low : collection of str
        Places ("file.py, line N", or `PYTHON`) whose single draws are small, and not large.
    """

    def __init__(self, low: frozenset[str] = frozenset()) -> None:
        self.low = low
        self.places: dict[str, None] = {}
        word = 0 if PYTHON in low else _untempered(0xFFFFFFFF)
        rest = random.Random(0)
        self._state = (*([word] * _SAME), *(rest.getrandbits(32) | 1 for _ in range(_WORDS - _SAME)))

    def draws(self, info: OpInfo) -> bool:
        """Whether an operator draws random numbers."""
        return info.base in _UNIFORM or info.base in _BERNOULLI or info.base in _OTHERS

    def decides(self, info: OpInfo, result: Any) -> bool:
        """Whether the draw may decide about layers: uniform or yes-no, of one number or a vector."""
        if info.base not in _UNIFORM and info.base not in _BERNOULLI:
            return False
        return isinstance(result, torch.Tensor) and result.dim() <= 1

    def outcome(self, info: OpInfo, where: str, drawn: torch.Tensor, args: Sequence[Any], scalar: bool) -> torch.Tensor:
        """What a draw gives: a single number (a vector too if `scalar`) is extreme, else what was `drawn`."""
        if not (drawn.numel() == 1 or (scalar and drawn.dim() == 1)):
            return drawn
        self.places[where] = None
        if info.base in _BERNOULLI:  # it mostly says whether to keep
            return torch.full_like(drawn, float(where not in self.low))
        if info.base not in _UNIFORM:
            return drawn
        share = 0.0 if where in self.low else 0.995
        bounds = [float(a) for a in args if isinstance(a, (int, float))] if info.base.startswith("uniform") else []
        low, high = bounds[0] if bounds else 0.0, bounds[1] if len(bounds) > 1 else 1.0
        return torch.full_like(drawn, low + share * (high - low))

    def reset(self) -> None:
        """Make the next draws of `random` and of numpy's global generator extreme; called at each module call."""
        numpy = sys.modules.get("numpy")
        used = random.getstate()[1][-1], numpy.random.get_state(legacy=False)["state"]["pos"] if numpy else 0
        if any(words not in (0, _WORDS) for words in used):
            self.places[PYTHON] = None
        if used != (0, 0):
            self._restart()

    def _restart(self) -> None:
        """Both generators at the extreme words."""
        random.setstate((3, (*self._state, 0), None))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.set_state(("MT19937", list(self._state), 0, 0, 0.0))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Python's and numpy's draws are extreme inside, their states untouched after."""
        numpy = sys.modules.get("numpy")
        before = random.getstate(), numpy.random.get_state() if numpy is not None else None
        self._restart()
        try:
            yield
        finally:
            random.setstate(before[0])
            if numpy is not None:
                numpy.random.set_state(before[1])


def _untempered(word: int) -> int:
    """The word of the Mersenne twister's state whose output is `word`."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    found = word
    for _ in range(5):
        found = word ^ ((found << 7) & 0x9D2C5680)
    word = found & 0xFFFFFFFF
    found = word
    for _ in range(3):
        found = word ^ (found >> 11)
    return found & 0xFFFFFFFF
