"""What one unit launches: its distinct kernels, and in which order they run.

Layers launch few different kernels many times; each is priced once for a microbatch size, and the sums run over all
launches in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Affine, Kernel, Op, UnitClass
from .sharding import ClassSharding

Dims = tuple[Affine, ...]
Divided = tuple[Kernel, str | None, Dims]  # a kernel, how tp splits it, and the dims of its forward operator


@dataclass(frozen=True, slots=True)
class Launches:
    """The launches of one unit's forward and backward, cut by tensor parallelism or whole.

    kernels : the distinct ones that take time
    forward : (index of the kernel, times in a row, whether selective recomputation runs it again)
    backward : (index of the kernel, times in a row, whether it makes the gradient of a weight)
    forward_ops, again_ops, backward_ops : launches that the host issues
    """

    kernels: tuple[Divided, ...]
    forward: tuple[tuple[int, int, bool], ...]
    backward: tuple[tuple[int, int, bool], ...]
    forward_ops: int
    again_ops: int
    backward_ops: int


def unit_launches(cls: UnitClass, sharding: ClassSharding | None) -> Launches:
    """The launches of a unit of class `cls`; `sharding` None: whole."""
    known: dict[Divided, int] = {}
    forward: list[tuple[int, int, bool]] = []
    backward: list[tuple[int, int, bool]] = []
    kept = kept_by_selective(cls.ops)
    for i, op in enumerate(cls.ops):
        split = sharding.op_split[i] if sharding is not None else None
        dims = op.forward.dims if split is not None else ()
        if op.forward.kind != "free":
            forward.append((known.setdefault((op.forward, split, dims), len(known)), op.repeat, i not in kept))
        for kernel in op.backward:
            if kernel.kind != "free":
                index = known.setdefault((kernel, split, dims), len(known))
                backward.append((index, op.repeat, kernel.wrt == "weight"))
    return Launches(
        tuple(known),
        tuple(forward),
        tuple(backward),
        forward_ops=sum(times for _, times, _ in forward),
        again_ops=sum(times for _, times, again in forward if again),
        backward_ops=sum(times for _, times, _ in backward),
    )


def is_matmul(op: Op) -> bool:
    """Whether the operator is a linear layer's matrix product (what selective recomputation counts)."""
    return op.forward.kind == "gemm" and "bmm" not in op.name and "baddbmm" not in op.name


def kept_by_selective(ops: Sequence[Op]) -> set[int]:
    """Indices of the operators whose outputs selective recomputation keeps: attention and every second matmul.

    The first, third, ... matmul of the unit is kept, the second, fourth, ... runs again.
    """
    kept, matmuls = set(), 0
    for i, op in enumerate(ops):
        if op.forward.kind == "attention":
            kept.add(i)
        elif is_matmul(op):
            if matmuls % 2 == 0:
                kept.add(i)
            matmuls += 1
    return kept
