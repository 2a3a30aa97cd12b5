"""What fake tensors would hold, computed only where the model's own code looks.

Every operator is noted with the numbers of its arguments. Where the code reads a value (`.item()`, `if x.any():`)
or makes a tensor whose size depends on values (`nonzero`, `x[mask]`), the operators that led there run on real
tensors. The way back ends at what is known (model inputs, constants) and at the results of products, convolutions
and attention, which are drawn from a normal distribution: no weight matrix is ever needed. All samples of a
microbatch get the same draw, so that sizes that depend on it are proportional to the microbatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from zlib import crc32

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from .chance import Chance
from .graph import Ref
from .kernels import OpInfo
from .recording import Recording

LARGEST = 2**28  # elements of a tensor whose values may be computed
_DRAWN_FROM = 2**26  # float tensors above this are drawn, not computed
_KEPT_INTEGERS, _KEPT_FLOATS = 2**22, 2**12  # elements of values that are kept for later reads
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "linear", "convolution", "_convolution",
    "_fft_r2c", "_fft_c2c", "_fft_c2r", "lstm", "gru", "mkldnn_rnn_layer",
}  # fmt: skip
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Origin(IntEnum):
    """What a value depends on: inputs and constants; random draws of the model; weights and activations."""

    EXACT = 0
    CHANCE = 1
    DRAWN = 2


@dataclass(slots=True)
class _Made:
    """How tensors came about: an operator call. `outputs`: number -> result leaf, or -1 - p for argument p."""

    func: Any
    info: OpInfo
    args: Any
    kwargs: Any
    needs: tuple[int, ...]
    cut: bool
    outputs: dict[int, int] = field(default_factory=dict)
    where: str = ""


@dataclass(slots=True)
class _Aliased:
    """An alias of a tensor written in place: what it held before, with the part that was written."""

    needs: tuple[int, int]
    views: tuple[tuple[Any, Any, int], tuple[Any, Any, int]]
    elements: int


def frozen(value: Any, numbers: Iterator[int]) -> Any:
    """An argument with tensors replaced by `Ref`s, in the order of `numbers`."""
    if isinstance(value, torch.Tensor):
        return Ref(next(numbers))
    if isinstance(value, (list, tuple)):
        return [frozen(v, numbers) for v in value]
    if isinstance(value, dict):
        return {k: frozen(v, numbers) for k, v in value.items()}
    return None if isinstance(value, torch.Generator) else value


def _thawed(value: Any, known: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, Ref):
        return known[value.tensor]
    if isinstance(value, list):
        return [_thawed(v, known) for v in value]
    if isinstance(value, dict):
        return {k: _thawed(v, known) for k, v in value.items()}
    return value


class BufferRead(BaseException):
    """The model looks at the values of buffer `fqn`, which is on meta.

    No `Exception`, so that the model's own code lets it pass.
    """

    def __init__(self, fqn: str) -> None:
        super().__init__(fqn)
        self.fqn = fqn


class Values:
    """Computes values of recorded tensors.

    Parameters
    ----------
    recording : Recording
        Shapes and dtypes of the tensors.
    batch : int
        Microbatch size of the run.
    chance : Chance
        Says what draws of a single number give.
    """

    def __init__(self, recording: Recording, batch: int, chance: Chance) -> None:
        self.recording = recording
        self.batch = batch
        self.chance = chance
        self._made: dict[int, _Made | _Aliased] = {}
        self._strides: dict[int, tuple[int, ...]] = {}
        self._kept: dict[int, torch.Tensor] = {}
        self._origin: dict[int, Origin] = {}

    def origin(self, number: int) -> Origin:
        """What the value depends on."""
        return self._origin.get(number, Origin.DRAWN)

    def has(self, number: int) -> bool:
        """Whether the value is known, or how to compute it."""
        return number in self._origin

    def tell(self, number: int, value: torch.Tensor, origin: Origin = Origin.EXACT) -> None:
        """Give the value of a tensor; a buffer on meta has none, which `BufferRead` says when it is looked at."""
        if value.is_meta:
            if not value.dtype.is_floating_point:
                self._origin[number] = Origin.EXACT
            return
        with real_tensors():
            self._kept[number] = value.detach()
        self._origin[number] = origin

    def note(
        self, func: Any, info: OpInfo, args: Any, kwargs: Any, needs: Sequence[int], outputs: dict[int, int], where: str
    ) -> None:
        """An operator ran: `args` and `kwargs` are `frozen`, `outputs` as in `_Made`."""
        origin = max((self.origin(n) for n in needs), default=Origin.EXACT)
        if self.chance.draws(info):
            origin = max(origin, Origin.CHANCE)
        cut = origin == Origin.DRAWN and (
            info.base in _PRODUCTS or "attention" in info.base or info.namespace != "aten"
        )
        made = _Made(func, info, args, kwargs, tuple(needs), cut, outputs, where)
        for number in outputs:
            self._made[number] = made
            self._origin[number] = origin

    def note_layout(self, number: int, tensor: torch.Tensor) -> None:
        """The strides of a tensor that is not contiguous, in case it must be drawn."""
        self._strides[number] = tensor.stride()

    def note_alias(self, alias: torch.Tensor, target: torch.Tensor, before: int, written: int, after: int) -> None:
        """`target` became number `written`, so its alias, number `before` so far, became number `after`."""
        self._origin[after] = max(self.origin(before), self.origin(written))
        if alias.dtype == target.dtype:
            views = tuple((tuple(t.shape), t.stride(), t.storage_offset()) for t in (alias, target))
            elements = target.untyped_storage().nbytes() // target.dtype.itemsize
            self._made[after] = _Aliased((before, written), views, elements)  # type: ignore[arg-type]

    # reading

    def read(self, number: int, scalar: bool = False) -> torch.Tensor:
        """The value of a tensor.

        `scalar`: it is read to steer Python code; vectors drawn by chance then hold one number too (see `Chance`).

        Raises
        ------
        ModelError
            If the values of too large a tensor would be needed.
        """
        with real_tensors():
            return self._read(number, scalar)

    def _read(self, wanted: int, scalar: bool) -> torch.Tensor:
        known: dict[int, torch.Tensor] = {}
        stack = [wanted]
        while stack:
            number = stack[-1]
            if number in known:
                stack.pop()
                continue
            made = self._made.get(number)
            if number in self._kept:
                known[number] = self._kept[number]
            elif made is None or self._is_drawn(made, number):
                known[number] = self._draw(number)
            elif missing := [n for n in made.needs if n not in known]:
                stack += missing
            else:
                known.update(self._computed(made, number, known, scalar))
        for number, value in known.items():
            self._keep(number, value, scalar)
        return known[wanted]

    def _keep(self, number: int, value: torch.Tensor, scalar: bool) -> None:
        limit = _KEPT_FLOATS if value.dtype.is_floating_point else _KEPT_INTEGERS
        if value.numel() <= limit and not (scalar and self.origin(number) == Origin.CHANCE):
            self._kept[number] = value

    def _is_drawn(self, made: _Made | _Aliased, number: int) -> bool:
        tensor = self.recording.tensors[number]
        elements = made.elements if isinstance(made, _Aliased) else _numel(tensor.shape)
        if elements > LARGEST:
            raise ModelError(
                f"The model reads values computed from a tensor of {elements:,} elements; {LARGEST:,} are possible.",
                "Trace with a smaller --seq, or compute the decision from a smaller tensor.",
            )
        if isinstance(made, _Aliased):
            return False
        return made.cut or (elements > _DRAWN_FROM and self.origin(number) == Origin.DRAWN and _floating(tensor.dtype))

    def _computed(
        self, made: _Made | _Aliased, number: int, known: dict[int, torch.Tensor], scalar: bool
    ) -> dict[int, torch.Tensor]:
        try:
            if isinstance(made, _Aliased):
                return {number: _written_through(made, known)}
            return self._run(made, known, scalar)
        except (RuntimeError, IndexError, NotImplementedError):
            # a draw that its consumers cannot take; the values only steer the run
            return {number: self._draw(number)}

    def _run(self, made: _Made, known: dict[int, torch.Tensor], scalar: bool) -> dict[int, torch.Tensor]:
        args, kwargs = _thawed(made.args, known), _thawed(made.kwargs, known)
        for position in made.info.written:
            if position < len(args) and isinstance(args[position], torch.Tensor):
                args[position] = args[position].clone()
        random = self.chance.draws(made.info)
        seed = min(made.outputs)
        if random:
            torch.manual_seed(seed)
        leaves = [t for t in tree_leaves(made.func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        found = {n: leaves[k] if k >= 0 else args[-1 - k] for n, k in made.outputs.items()}
        if made.info.base in _EMPTY:
            return {n: torch.zeros_like(t) for n, t in found.items()}
        if random:
            return {
                n: self.chance.outcome(made.info, made.where, self._tiled(t), args, scalar) for n, t in found.items()
            }
        return found

    def _tiled(self, value: torch.Tensor) -> torch.Tensor:
        """The same draw for every sample, if the first dimension is a multiple of the batch."""
        if value.dim() == 0 or value.shape[0] % self.batch or value.shape[0] == 0:
            return value
        rows = value.shape[0] // self.batch
        return value[:rows].repeat(self.batch, *(1 for _ in value.shape[1:]))

    def _draw(self, number: int) -> torch.Tensor:
        tensor = self.recording.tensors[number]
        dtype = getattr(torch, tensor.dtype)
        if tensor.kind == "buffer":
            raise BufferRead(tensor.fqn)
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(tensor.shape, dtype=dtype)
        if tensor.kind == "parameter" and len(tensor.shape) < 2:
            scale = tensor.fqn.endswith("weight") or not tensor.shape
            return torch.full(tensor.shape, float(scale), dtype=dtype)
        seed = crc32(tensor.fqn.encode()) if tensor.fqn else number
        wide = dtype if dtype.is_complex else torch.float32
        value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(dtype)
        value = value if tensor.kind == "parameter" else self._tiled(value)
        if number in self._strides:
            strided = torch.empty_strided(tensor.shape, self._strides[number], dtype=dtype)
            return strided.copy_(value)
        return value


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Run operators plainly: unseen by modes and autograd, the random state kept."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


def _written_through(made: _Aliased, known: dict[int, torch.Tensor]) -> torch.Tensor:
    (alias, target), (before, written) = made.views, (known[n] for n in made.needs)
    flat = torch.zeros(made.elements, dtype=before.dtype)
    for view, value in ((alias, before), (target, written)):
        flat.as_strided(*view).copy_(value)
    return flat.as_strided(*alias)


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _floating(dtype: str) -> bool:
    return getattr(torch, dtype).is_floating_point
