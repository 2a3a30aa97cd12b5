"""Initial weights: exactly what the user's own code makes with a seed, one full copy a host, shards for the ranks.

One process of each host builds the model on the CPU and writes every parameter, buffer and loose tensor to a
file; all ranks of the host map that file and copy only their own part.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import EnvironmentFailure, PlanFileError, UsageError
from ..planner.plan import TensorParallelSection
from ..planner.target import Target
from .failures import as_tpplan_error
from .full_tensors import shard_of

_FILE = "initial.pt"


def build_seeded(target: Target, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
    """The user's own model on the CPU, made with `seed` for torch, random and numpy.

    `dtype` casts all floating-point parameters and buffers afterwards (float64 runs).
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    model = target.build("cpu")
    return model if dtype is None else model.to(dtype)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer (persistent or not) and tensor attribute of `model` by its FQN, ties under each name."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers, **module.__dict__}
        for name, tensor in own.items():
            if isinstance(tensor, torch.Tensor):
                found[f"{prefix}.{name}".lstrip(".")] = tensor.detach()
    return found


@contextmanager
def initial_tensors(
    target: Target, seed: int, init_from: Path | None, dtype: torch.dtype | None
) -> Iterator[Mapping[str, torch.Tensor]]:
    """The full initial tensors by FQN, mapped from the host's file; a collective call of all ranks.

    Parameters
    ----------
    init_from : Path or None
        A folder of safetensors whose values replace those of the user's construction.
    dtype : torch.dtype or None
        Cast of all floating-point tensors (float64 runs).

    Raises
    ------
    UsageError
        If `init_from` lacks a tensor of the model, or has others.
    """
    first_of_host = int(os.environ.get("LOCAL_RANK", "0")) == 0
    folder = tempfile.mkdtemp(prefix="tpplan-init-") if first_of_host else ""
    try:
        failure: Exception | None = None
        if first_of_host:
            try:
                _write(target, seed, init_from, dtype, Path(folder))
            except Exception as error:
                failure = as_tpplan_error(error, dist.get_rank())
        # Two nodes may bear one host name: torchrun's number of the node tells them apart.
        host = f"{socket.gethostname()}:{os.environ.get('GROUP_RANK', '0')}"
        answers: list[tuple[str, str, Exception | None]] = [("", "", None)] * dist.get_world_size()
        dist.all_gather_object(answers, (host, folder, failure))
        for _, _, error in answers:
            if error is not None:
                raise error
        mine = next(path for name, path, _ in answers if path and name == host)
        tensors = torch.load(Path(mine) / _FILE, mmap=True, weights_only=True)
        dist.barrier()
    finally:
        # Mapped by all, the file needs no name: nothing is left behind if a rank is killed later.
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    yield tensors


def _write(target: Target, seed: int, init_from: Path | None, dtype: torch.dtype | None, folder: Path) -> None:
    model = build_seeded(target, seed)
    if init_from is not None:
        load_safetensors(model, init_from)
    if dtype is not None:
        model = model.to(dtype)
    tensors = named_tensors(model)
    needed = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFailure(
            f"The initial weights take {needed / 2**30:.1f} GiB; {folder} has {free / 2**30:.1f} GiB free.",
            "Point TMPDIR at a larger disk.",
        )
    torch.save(tensors, folder / _FILE)


def load_safetensors(model: nn.Module, folder: Path) -> None:
    """Copy the tensors of a Hugging Face checkpoint folder into `model`, every name checked.

    Raises
    ------
    UsageError
        If there is no checkpoint, or names or shapes do not match the model's.
    EnvironmentFailure
        If safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise EnvironmentFailure("--init-from needs safetensors.", "pip install safetensors") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} has no *.safetensors file.", "Give --init-from a folder with model.safetensors.")
    state = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    loaded: set[int] = set()
    unexpected: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as archive, torch.no_grad():
            for name in archive.keys():  # noqa: SIM118  (an archive is no mapping)
                if name not in state:
                    unexpected.append(name)
                    continue
                value = archive.get_tensor(name)
                if value.shape != state[name].shape:
                    raise UsageError(
                        f"{name} has shape {tuple(value.shape)} in {folder}, {tuple(state[name].shape)} in the model.",
                        "Give --init-from weights of the plan's model.",
                    )
                state[name].copy_(value)
                loaded.add(id(state[name]))
    missing = [name for name, tensor in state.items() if id(tensor) not in loaded]
    if missing or unexpected:
        said = [
            f"{len(names)} {kind} (first: {names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise UsageError(
            f"The weights in {folder} are not those of the plan's model: {', '.join(said)}.",
            "Give --init-from a checkpoint saved from this model.",
        )


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}


class Materialiser:
    """Gives modules on meta their initial values, one unit at a time.

    Parameters
    ----------
    tensors : mapping
        The full tensors by FQN.
    section : TensorParallelSection
        How tp cuts them.
    device : torch.device
        Where they go.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], section: TensorParallelSection, device: torch.device
    ) -> None:
        self._tensors, self._section, self._device = tensors, section, device
        self._done: dict[int, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, fqn: str) -> None:
        """Replace every tensor of `module` (the unit `fqn`) that is still on meta by its initial value."""
        for prefix, owner in module.named_modules(prefix=fqn):
            for table in cast("list[dict[str, Any]]", [owner._parameters, owner._buffers, owner.__dict__]):
                for name, tensor in list(table.items()):
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    # Buffers may be real where a constructor fails on meta, with values of another seed.
                    if tensor.device.type == "meta" or table is owner._buffers:
                        table[name] = self._value(tensor, f"{prefix}.{name}".lstrip("."))

    def _value(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if id(tensor) in self._done:
            return self._done[id(tensor)]
        full = self._tensors.get(name)
        if full is None or full.shape != tensor.shape:
            has = "nothing of that name" if full is None else f"shape {tuple(full.shape)}"
            raise PlanFileError(
                f"{name} has shape {tuple(tensor.shape)} on meta; built for real the model has {has}.",
                "The model's constructor must make the same tensors on every device.",
            )
        local = shard_of(full, tensor, name, self._section).to(self._device, copy=True).contiguous()
        value: torch.Tensor = local
        if isinstance(tensor, DTensor):
            value = DTensor.from_local(
                local,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        self._done[id(tensor)] = self._done[id(value)] = value
        self._kept += [tensor, value]  # their ids stay theirs
        return value
