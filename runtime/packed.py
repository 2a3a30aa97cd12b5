"""Packed projections: one linear whose output is several segments (fused qkv, gate-up), split by tp.

A rank must hold its part of *every* segment, so rows are stored rank-major while tp is on:

    full      [ q0 q1 | k0 k1 | v0 v1 ]        sizes (q, k, v), tp = 2
    rank 0    [ q0 k0 v0 ]     rank 1    [ q1 k1 v1 ]

The module's output is then no ordinary tensor, because its features are out of order. It is handed to the
model as a `PackedOutput`, which takes only the calls that cut it into its segments and raises on every other
use: a wrong number can never slip through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..errors import PlanFileError

_NAME = "_tpplan_fqn"
_FUNCTIONS = ("split", "chunk", "unflatten", "reshape", "transpose", "permute", "unsqueeze", "squeeze")


def pack(full: torch.Tensor, sizes: Sequence[int], degree: int, dim: int) -> torch.Tensor:
    """Reorder `full` along `dim` from segment-major to rank-major.

    >>> pack(torch.arange(6), (4, 2), 2, 0).tolist()
    [0, 1, 4, 2, 3, 5]
    """
    return torch.cat([packed_part(full, sizes, degree, rank, dim) for rank in range(degree)], dim)


def unpack(packed: torch.Tensor, sizes: Sequence[int], degree: int, dim: int) -> torch.Tensor:
    """The inverse of `pack`.

    >>> unpack(torch.tensor([0, 1, 4, 2, 3, 5]), (4, 2), 2, 0).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    parts = [part.split([size // degree for size in sizes], dim) for part in packed.chunk(degree, dim)]
    return torch.cat([part[segment] for segment in range(len(sizes)) for part in parts], dim)


def packed_part(full: torch.Tensor, sizes: Sequence[int], degree: int, rank: int, dim: int) -> torch.Tensor:
    """What `rank` holds of `full`: its share of each segment along `dim`."""
    shares = [segment.chunk(degree, dim)[rank] for segment in full.split(list(sizes), dim)]
    return torch.cat(shares, dim)


def name_in_messages(module: nn.Module, fqn: str) -> None:
    """Note the name of a packed module; compiled code that carried it could not serve equal blocks."""
    setattr(module, _NAME, fqn)


class PackedOutput:
    """The output of a packed linear: this rank's features of every segment, waiting to be cut.

    Accepts split, chunk and slicing along the packed dimension at the segments' borders, and views that set
    the segments apart (then unbind, permute and so on act on an ordinary DTensor).

    Parameters
    ----------
    local : Tensor
        This rank's features, segments in order along `dim`, shape (..., sum(sizes) / tp, ...).
    mesh : DeviceMesh
        The one-dimensional tp mesh.
    dim : int
        The packed dimension.
    sizes : tuple of int
        Full sizes of the segments along `dim`, each divisible by tp.
    owner : nn.Module or str
        The module, or what to call it in messages.
    """

    def __init__(
        self, local: torch.Tensor, mesh: DeviceMesh, dim: int, sizes: tuple[int, ...], owner: nn.Module | str
    ) -> None:
        self._local, self._mesh, self._dim, self._sizes, self._owner = local, mesh, dim, sizes, owner

    @property
    def shape(self) -> torch.Size:
        """The full shape, as the model knows it."""
        full = list(self._local.shape)
        full[self._dim] = sum(self._sizes)
        return torch.Size(full)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._local.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._local.dtype

    @property
    def device(self) -> torch.device:
        """Device of this rank's part."""
        return self._local.device

    def dim(self) -> int:
        """Number of dimensions."""
        return self._local.ndim

    def size(self, dim: int | None = None) -> Any:
        """The full shape, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[DTensor, ...]:
        """The segments, if that is what is asked for."""
        total = sum(self._sizes)
        if isinstance(split_size, int):
            asked = [split_size] * (total // split_size) + ([total % split_size] if total % split_size else [])
        else:
            asked = list(split_size)
        if dim % self.ndim != self._dim or asked != list(self._sizes):
            self._refuse(f"split({split_size}, dim={dim})")
        local = self._local.split([size // self._mesh.size() for size in self._sizes], self._dim)
        return tuple(self._whole(part, self._dim) for part in local)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[DTensor, ...]:
        """The segments, if `chunks` is their number and they are equal."""
        if chunks != len(self._sizes) or len(set(self._sizes)) != 1:
            self._refuse(f"chunk({chunks}, dim={dim})")
        return self.split(list(self._sizes), dim)

    def view(self, *shape: Any) -> Any:
        """A view that keeps the leading dimensions and sets the segments apart, or keeps them whole."""
        wanted = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        lead = list(self.shape[: self._dim])
        tail = list(self.shape[self._dim :])
        if not all(isinstance(n, int) for n in wanted):
            self._refuse(f"view({shape})")
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted[wanted.index(-1)] = math.prod(self.shape) // max(known, 1)
        rest = wanted[len(lead) :]
        if wanted[: len(lead)] != lead or math.prod(rest) != math.prod(tail) or len(rest) < 2 or len(tail) != 1:
            self._refuse(f"view{tuple(wanted)}")
        degree, inner = self._mesh.size(), math.prod(rest[1:])
        if all(size == inner for size in self._sizes) and rest[1] % degree == 0:
            rest[1] //= degree  # (segments, features of one segment...): an ordinary DTensor, sharded inside
            return self._whole(self._local.reshape([*self._local.shape[: self._dim], *rest]), self._dim + 1)
        if any(size % (inner * degree) for size in self._sizes):
            self._refuse(f"view{tuple(wanted)}")
        local = self._local.reshape([*self._local.shape[: self._dim], rest[0] // degree, *rest[1:]])
        sizes = tuple(size // inner for size in self._sizes)
        return PackedOutput(local, self._mesh, self._dim, sizes, self._owner)

    reshape = view

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Any:
        """`view` of the packed dimension, which must be the last."""
        if dim % self.ndim != self._dim or self._dim != self.ndim - 1:
            self._refuse(f"unflatten({dim}, {tuple(sizes)})")
        return self.view(*self.shape[: self._dim], *sizes)

    def transpose(self, dim0: int, dim1: int) -> PackedOutput:
        """Two dimensions exchanged; the packed one may be among them."""
        places = list(range(self.ndim))
        places[dim0 % self.ndim], places[dim1 % self.ndim] = dim1 % self.ndim, dim0 % self.ndim
        return self._moved(self._local.permute(places), places.index(self._dim))

    def permute(self, *dims: Any) -> PackedOutput:
        """The dimensions in another order."""
        order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        places = [dim % self.ndim for dim in order]
        return self._moved(self._local.permute(places), places.index(self._dim))

    def unsqueeze(self, dim: int) -> PackedOutput:
        """A dimension of one more."""
        place = dim % (self.ndim + 1)
        return self._moved(self._local.unsqueeze(place), self._dim + (place <= self._dim))

    def squeeze(self, dim: int) -> PackedOutput:
        """A dimension of one less."""
        place = dim % self.ndim
        if place == self._dim:
            self._refuse(f"squeeze({dim})")
        fewer = self._local.shape[place] == 1
        return self._moved(self._local.squeeze(place), self._dim - (fewer and place < self._dim))

    @property
    def mT(self) -> PackedOutput:
        """The last two dimensions exchanged."""
        return self.transpose(-2, -1)

    def _moved(self, local: torch.Tensor, dim: int) -> PackedOutput:
        return PackedOutput(local, self._mesh, dim, self._sizes, self._owner)

    def contiguous(self) -> PackedOutput:
        """Itself: each segment is made contiguous where that is needed."""
        return self

    def __getitem__(self, index: Any) -> DTensor:
        """One segment, by a slice along the packed dimension at its borders."""
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items = items[:at] + (slice(None),) * (self.ndim - len(items) + 1) + items[at + 1 :]
        items = items + (slice(None),) * (self.ndim - len(items))
        others = [item for dim, item in enumerate(items) if dim != self._dim]
        cut = items[self._dim]
        if len(items) != self.ndim or not isinstance(cut, slice) or any(item != slice(None) for item in others):
            self._refuse(f"[{index}]")
        start, stop, step = cut.indices(sum(self._sizes))
        borders = [sum(self._sizes[:i]) for i in range(len(self._sizes) + 1)]
        if step != 1 or start not in borders[:-1] or stop != borders[borders.index(start) + 1]:
            self._refuse(f"[{index}]")
        return self.split(list(self._sizes), self._dim)[borders.index(start)]

    def _whole(self, local: torch.Tensor, dim: int) -> DTensor:
        return DTensor.from_local(local, self._mesh, [Shard(dim)], run_check=False)

    def _refuse(self, call: str) -> NoReturn:
        owner = self._owner if isinstance(self._owner, str) else getattr(self._owner, _NAME)
        raise PlanFileError(
            f"{owner} is packed {list(self._sizes)} in this plan, but the model calls {call} on it.",
            "Plan again with `tpplan suggest`, or give that module the style replicate.",
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        first = args[0] if args else None
        if isinstance(first, PackedOutput) and name in _FUNCTIONS:
            return getattr(first, name)(*args[1:], **(kwargs or {}))
        owner = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, PackedOutput))
        owner._refuse(name)
