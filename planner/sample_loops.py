"""Units whose number of operators follows the microbatch size (loops over samples): their figures as sums.

Such a unit has no list of operators that holds for every size. It is priced as one operator of each kind of kernel,
with the sums of FLOPs and bytes as functions of the size; its inputs, outputs and parameters stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .graph import Affine, Kernel, Op, Ref, Tensor, UnitClass

_NAME = "tpplan.sum_of_operators"
Fit = Callable[[Sequence[float]], Affine]
Group = tuple[str, str, str]  # kind, dtype, wrt


def summed(classes: Sequence[UnitClass], fit: Fit) -> UnitClass:
    """One class from its copies at several microbatch sizes.

    Parameters
    ----------
    classes : sequence of UnitClass
        The unit at each size; operators may differ, what it reads and writes may not.
    fit : callable
        Makes a function of the size from one number a size; raises where there is none.
    """
    tensors = _border(classes, fit)
    inputs = tuple(range(len(classes[0].inputs)))
    outputs = tuple(range(len(inputs), len(inputs) + len(classes[0].outputs)))
    kept = [
        place
        for place, same in enumerate(zip(*(c.inputs + c.outputs for c in classes), strict=True))
        if all(_is_saved(c, t) for c, t in zip(classes, same, strict=True))
    ]
    rest = fit([c.saved_bytes.base - sum(_bytes(c, (c.inputs + c.outputs)[p]) for p in kept) for c in classes])
    blob = len(tensors)
    tensors.append(Tensor(blob, (rest,), "uint8", "activation", blob, storage_bytes=rest))
    read = tuple(t.id for t in tensors if t.kind in ("parameter", "buffer"))
    ops = _operators(classes, fit, inputs + read, (*outputs, blob), (*kept, blob))
    return replace(
        classes[0],
        ops=ops,
        tensors=tuple(tensors),
        inputs=inputs,
        outputs=outputs,
        saved=(*kept, blob),
        saved_bytes=fit([c.saved_bytes.base for c in classes]),
        flops_forward=_total(op.forward_flops for op in ops),
        flops_backward=_total(op.backward_flops for op in ops),
    )


def _total(figures: Any) -> Affine:
    total = Affine()
    for figure in figures:
        total += figure
    return total


def _is_saved(cls: UnitClass, tensor: int) -> bool:
    base = cls.tensors[tensor].base
    return any(cls.tensors[t].base == base for t in cls.saved)


def _bytes(cls: UnitClass, tensor: int) -> float:
    return cls.tensors[cls.tensors[tensor].base].storage_bytes.base


def _border(classes: Sequence[UnitClass], fit: Fit) -> list[Tensor]:
    """Inputs, outputs, then parameters and buffers, each with a storage of its own."""
    places = [
        [*c.inputs, *c.outputs, *sorted(_weights(c), key=lambda t, c=c: c.tensors[t].fqn)] for c in classes
    ]  # fmt: skip
    found: list[Tensor] = []
    for same in zip(*places, strict=True):
        copies = [c.tensors[t] for c, t in zip(classes, same, strict=True)]
        shape = tuple(fit([d.base for d in sizes]) for sizes in zip(*(t.shape for t in copies), strict=True))
        new = len(found)
        nbytes = fit([_bytes(c, t) for c, t in zip(classes, same, strict=True)])
        found.append(replace(copies[0], id=new, base=new, shape=shape, storage_bytes=nbytes))
    return found


def _weights(cls: UnitClass) -> list[int]:
    """One tensor for each parameter or buffer that is read."""
    first: dict[str, int] = {}
    for t in cls.tensors:
        if t.kind in ("parameter", "buffer"):
            first.setdefault(t.fqn, t.id)
    return list(first.values())


def _operators(
    classes: Sequence[UnitClass], fit: Fit, read: tuple[int, ...], made: tuple[int, ...], saved: tuple[int, ...]
) -> tuple[Op, ...]:
    forward = _kernels([[(op.forward, op.repeat) for op in c.ops] for c in classes], fit)
    backward = _kernels([[(k, op.repeat) for op in c.ops for k in op.backward] for c in classes], fit)
    arguments = tuple(Ref(t) for t in read)
    first = Op(0, _NAME, "", 0, classes[0].module_type, arguments, read, made, forward[0], tuple(backward), saved)
    others = [
        Op(i, _NAME, "", 0, classes[0].module_type, arguments, read, (), kernel)
        for i, kernel in enumerate(forward[1:], 1)
    ]
    return (first, *others)


def _kernels(lists: Sequence[Sequence[tuple[Kernel, int]]], fit: Fit) -> list[Kernel]:
    """One kernel for each kind, dtype and gradient, with the sums over a unit; at least one."""
    groups: dict[Group, list[list[tuple[Kernel, int]]]] = {}
    for which, kernels in enumerate(lists):
        for kernel, repeat in kernels:
            if kernel.kind != "free":
                key = (kernel.kind, kernel.dtype, kernel.wrt)
                groups.setdefault(key, [[] for _ in lists])[which].append((kernel, repeat))
    found = []
    for (kind, dtype, wrt), members in groups.items():
        flops = fit([sum(k.flops.base * n for k, n in m) for m in members])
        moved = fit([sum(k.bytes_moved.base * n for k, n in m) for m in members])
        largest = max(members[0] or members[-1], key=lambda pair: pair[0].flops.base)[0]
        found.append(Kernel(_NAME, kind, flops, moved, _dims(largest, flops), dtype, wrt))
    return found or [Kernel(_NAME, "free", Affine(), Affine())]


def _dims(kernel: Kernel, flops: Affine) -> tuple[Affine, ...]:
    """The sizes of the largest kernel, as many times as make the FLOPs of all."""
    if kernel.kind not in ("gemm", "attention", "conv") or not kernel.dims or not kernel.flops.base:
        return ()
    return (flops.scaled(kernel.dims[0].base / kernel.flops.base), *kernel.dims[1:])
