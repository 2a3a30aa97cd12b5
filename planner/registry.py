"""Which tensor objects of a run are known under which number, and which of them share a storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .recording import RawStorage, Recording


class Registry:
    """Numbers tensors as they appear; a tensor written in place gets a new number, and so do its aliases.

    Nothing traced is kept alive by it: the ticks at which storages die are part of the recording.

    Parameters
    ----------
    recording : Recording
        Takes the tensors and storages.
    empty : callable
        ``empty(shape, stride, dtype)`` makes a tensor with nothing in it, for twins.
    """

    def __init__(self, recording: Recording, empty: Callable[..., torch.Tensor]) -> None:
        self.recording = recording
        self.empty = empty
        self._ids: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[torch.Tensor]] = {}
        self._twins: dict[int, torch.Tensor] = {}
        self._storages: dict[int, int] = {}
        self._cdatas: dict[int, set[int]] = {}
        self._kept: dict[int, list[Any]] = {}
        self._on_storage: dict[int, dict[int, None]] = {}

    def id_of(self, tensor: torch.Tensor) -> int | None:
        """The number of `tensor`, None if it was never seen."""
        return self._ids.get(id(tensor))

    def known(self, tensor: torch.Tensor) -> int:
        """The number of `tensor`, registering a tensor never seen before as a constant."""
        found = self._ids.get(id(tensor))
        if found is None:
            return self.register(tensor, "constant")
        if tensor.requires_grad:  # autograd says so only after the operator that made the tensor is recorded
            self.recording.tensors[found].requires_grad = True
        return found

    def register(self, tensor: torch.Tensor, kind: str, fqn: str = "") -> int:
        """Give `tensor` a new number (again, if it was written in place)."""
        rec = self.recording
        storage = self._storage(tensor, kind)
        new = rec.add_tensor(tensor, storage, kind, fqn)
        key = id(tensor)
        if key not in self._refs:
            rec.storages[storage].live += 1
            self._on_storage.setdefault(storage, {})[key] = None
            self._refs[key] = weakref.ref(tensor, lambda _: self._released(key, storage))
        self._ids[key] = new
        return new

    def _storage(self, tensor: torch.Tensor, kind: str) -> int:
        cdata, nbytes = _memory(tensor)
        storage = self._storages.get(cdata)
        if storage is None:
            storage = len(self.recording.storages)
            self.recording.storages.append(RawStorage(nbytes, kind, self.recording.clock))
            self._storages[cdata] = storage
            self._cdatas[storage] = {cdata}
        return storage

    def _released(self, key: int, storage: int) -> None:
        self._ids.pop(key, None)
        self._refs.pop(key, None)
        self._twins.pop(key, None)
        self._on_storage[storage].pop(key, None)
        entry = self.recording.storages[storage]
        entry.live -= 1
        if entry.live == 0:
            entry.died = self.recording.clock
            for cdata in self._cdatas.pop(storage, ()):
                self._storages.pop(cdata, None)
            self._kept.pop(storage, None)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor that stands for a real one in every operator; its views count on the real one's storage."""
        found = self._twins.get(id(tensor))
        if found is None:
            number = self.known(tensor)
            storage = self.recording.tensors[number].storage
            found = self._twins[id(tensor)] = self.empty(tensor.shape, tensor.stride(), tensor.dtype)
            cdata = found.untyped_storage()._cdata
            self._storages[cdata] = storage
            self._cdatas[storage].add(cdata)
            # an address may be used anew only when no tensor can name it any more
            self._kept.setdefault(storage, []).append((tensor.untyped_storage(), found.untyped_storage()))
        return found

    def forget_twin(self, tensor: torch.Tensor) -> None:
        """Make a new twin at the next use: the real tensor changed its shape in place."""
        self._twins.pop(id(tensor), None)

    def aliases(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The other living tensors on the storage of `tensor`."""
        storage = self.recording.tensors[self.known(tensor)].storage
        found = (self._refs[key]() for key in tuple(self._on_storage[storage]))
        return [alias for alias in found if alias is not None and alias is not tensor]

    def storage_number(self, tensor: torch.Tensor) -> int | None:
        """The number of the storage of `tensor`, None if it was never seen."""
        return self._storages.get(_memory(tensor)[0])


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others while it lives, and its bytes (none of its own if it is sparse)."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    return -id(tensor), 0
