"""Between full tensors, as the user's model has them, and the shards of tp and FSDP: a rank's part, and back.

A parameter under both is cut by tp first, and each tp part by dp_shard along dimension 0 (FSDP2). Packed
parameters are stored rank-major (packed.py), so that a plain `DTensor.full_tensor()` of them is permuted;
`full_tensor_of` is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import PlanFileError
from ..planner.plan import ModuleStyle, TensorParallelSection
from .packed import packed_part, unpack

TP_AXIS = "tp"


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (in, out): Hugging Face's Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def shard_dim(module: nn.Module, name: str, style: ModuleStyle, where: str) -> int | None:
    """The dimension of parameter `name` of `module` that tp divides, or None if it is replicated.

    Raises
    ------
    PlanFileError
        If the style cannot apply to this parameter.
    """
    if name in style.parameters:
        return style.parameters[name]
    if style.style in ("replicate", "parameters", "region", "heads"):
        return None
    parameter = getattr(module, name)
    if name == "bias" and parameter.ndim == 1 and style.style != "vocab":
        return None if style.style == "row" else 0
    if name == "weight" and style.style == "channel":
        return 0
    convolution = isinstance(module, _ConvNd) and style.style in ("col", "row", "packed")
    if name != "weight" or not (parameter.ndim == 2 or convolution):
        raise PlanFileError(
            f"{where} cannot have the style {style.style}: it is no weight or bias of a linear, embedding or such.",
            "Give its module the style replicate, or plan again with `tpplan suggest`.",
        )
    transposed = isinstance(module, _ConvTransposeNd) or is_transposed(module)
    return int((style.style == "row") != transposed)


def listed_split(fqn: str, section: TensorParallelSection) -> tuple[int, ModuleStyle, str] | None:
    """How a module around parameter `fqn` divides it by name: the dimension, its style, the name within it."""
    parts = fqn.split(".")
    for n in range(len(parts) - 1, -1, -1):
        style, name = section.styles.get(".".join(parts[:n])), ".".join(parts[n:])
        if style is not None and name in style.parameters:
            return style.parameters[name], style, name
    return None


def segments_of(fqn: str, section: TensorParallelSection) -> list[int] | None:
    """Sizes of the segments of parameter `fqn` that are each divided; None if it is divided as a whole."""
    listed = listed_split(fqn, section)
    if listed is not None and listed[2] in listed[1].packed:
        return listed[1].packed[listed[2]]
    style = section.styles.get(fqn.rpartition(".")[0])
    return style.sizes if style is not None and style.style == "packed" else None


def part_of_rank(
    full: torch.Tensor, dim: int | None, segments: Sequence[int] | None, degree: int, rank: int, where: str
) -> torch.Tensor:
    """What tp rank `rank` of `degree` holds of `full` (a view where possible).

    Raises
    ------
    PlanFileError
        If `degree` does not divide the dimension, or the segments do not add up to it.
    """
    if dim is None:
        return full
    sizes = [full.shape[dim]] if segments is None else list(segments)
    if sum(sizes) != full.shape[dim] or any(size % degree for size in sizes):
        raise PlanFileError(
            f"tp={degree} cannot divide dimension {dim} of {where}: parts {list(sizes)}.",
            "Choose a tp that divides them (--fix tp=N), or plan again for this model.",
        )
    return packed_part(full, sizes, degree, rank, dim)


def load_full_tensor(parameter: torch.Tensor, full: torch.Tensor, fqn: str, section: TensorParallelSection) -> None:
    """Copy this rank's part of `full` into `parameter`, without communication.

    Parameters
    ----------
    parameter : Tensor
        Plain, or a DTensor on any of the axes dp_replicate, dp_shard, tp (before or after `fully_shard`).
    full : Tensor
        The whole parameter in the user's own order, on any device.
    fqn : str
        Name of the parameter in the whole model; its module's style says whether it is packed.
    section : TensorParallelSection
        The plan's styles.

    Raises
    ------
    PlanFileError
        If the shapes do not agree.
    """
    if tuple(parameter.shape) != tuple(full.shape):
        raise PlanFileError(
            f"{fqn} has shape {tuple(full.shape)}, the model expects {tuple(parameter.shape)}.",
            "Use weights and a plan of the same model.",
        )
    with torch.no_grad():
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        target.copy_(shard_of(full, parameter, fqn, section))


def shard_of(full: torch.Tensor, like: torch.Tensor, fqn: str, section: TensorParallelSection) -> torch.Tensor:
    """This rank's part of `full`, cut as the DTensor `like` is."""
    if not isinstance(like, DTensor):
        return full
    mesh, names = like.device_mesh, like.device_mesh.mesh_dim_names or ()
    segments = segments_of(fqn, section)
    # FSDP cuts what tp has cut, whatever the order of the axes in the mesh.
    for axis in sorted(range(mesh.ndim), key=lambda axis: not _is_tp(names, axis)):
        placement: Any = like.placements[axis]
        if not hasattr(placement, "dim"):
            continue
        degree, rank = mesh.size(axis), mesh.get_local_rank(axis)
        if _is_tp(names, axis):
            full = part_of_rank(full, placement.dim, segments, degree, rank, fqn)
        else:
            chunks = full.chunk(degree, placement.dim)
            full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


def full_tensor_of(tensor: torch.Tensor, fqn: str, section: TensorParallelSection) -> torch.Tensor:
    """The whole of a parameter, gradient or optimizer state in the user's own order; a collective call.

    `tensor` has the name `fqn`; what is no DTensor is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    names = tensor.device_mesh.mesh_dim_names or ()
    segments = segments_of(fqn, section)
    full = tensor.full_tensor()
    for axis, placement in enumerate(tensor.placements):
        if segments is not None and _is_tp(names, axis) and hasattr(placement, "dim"):
            return unpack(full, segments, tensor.device_mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
    return full


def _is_tp(names: tuple[str, ...], axis: int) -> bool:
    return bool(names) and names[axis] == TP_AXIS
