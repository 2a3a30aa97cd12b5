"""What one unit of the chain costs on one tensor-parallel rank at one microbatch size: seconds and bytes.

Times come from `costmodels.compute` and `costmodels.collectives`, operator by operator; a unit is host-bound
when issuing its operators takes longer than running them. Bytes come from the traced saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..costmodels.collectives import collective_s
from ..costmodels.compute import host_floor_s, kernel_s
from ..hardware_profiles.device import DeviceModel, LinkModel
from ..units import DTYPE_BYTES
from .graph import Kernel, UnitClass
from .sharding import ClassSharding
from .unit_launches import Dims, Launches, kept_by_selective


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of one unit and microbatch on one rank, by part.

    forward_s, backward_s : operators (host floor included), without collectives
    again_selective_s, again_full_s : forward operators that run again in backward under recomputation
    weight_s : the part of backward_s that makes gradients of weights
    """

    forward_s: float
    backward_s: float
    again_selective_s: float
    again_full_s: float
    weight_s: float


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of one unit and microbatch on one rank.

    none, selective, full : kept from forward to backward under each recomputation
    workspace : peak above what is kept while the unit runs, without recomputation
    """

    none: int
    selective: int
    full: int
    workspace: int


def split_dims(kernel: Kernel, split: str, tp: int, forward_dims: Dims) -> Dims:
    """The kernel's dimensions on one of `tp` ranks.

    `split` names what tensor parallelism divides in the *forward* operator: "n" (col), "k" (row), "batch",
    "heads". For a gemm out[m, n] = a[m, k] b[k, n], the input gradient is grad[m, n] b^T[n, k] (its n is k and its
    k is n), the weight gradient has m as contraction and n, k outside.
    """
    dims = list(kernel.dims)
    if kernel.kind == "attention":
        dims[1] = dims[1].scaled(1 / tp)
        dims[2] = dims[2].scaled(1 / tp)
        return tuple(dims)
    if kernel.kind != "gemm":
        return kernel.dims
    if split == "batch" or len(forward_dims) < 4:
        dims[0] = dims[0].scaled(1 / tp)
        return tuple(dims)
    index = {"m": 1, "n": 2, "k": 3}.get(split)
    if index is None:
        return kernel.dims
    if kernel.wrt in ("input", "weight"):
        wanted = forward_dims[index]
        places = [i for i in (2, 3, 1) if dims[i] == wanted]
        if kernel.wrt == "weight":
            places = [i for i in (1, 2) if dims[i] == wanted] or places
        index = places[0] if places else index
    dims[index] = dims[index].scaled(1 / tp)
    return tuple(dims)


def local_bytes(kernel: Kernel, dims: Dims, split: bool, tp: int, b: int) -> float:
    """Least traffic of the kernel on one rank; a gemm's from its local dimensions."""
    if not split:
        return kernel.bytes_moved.at(b)
    if kernel.kind == "gemm":
        batch, m, n, k = (d.at(b) for d in dims)
        return batch * (m * k + k * n + m * n) * DTYPE_BYTES[kernel.dtype]
    return kernel.bytes_moved.at(b) / tp


class KernelClock:
    """Seconds of traced kernels on one device, remembered by what they depend on.

    fused : blocks are compiled
    eager_mode : how the host issues operators outside compiled blocks (see `host_floor_s`)
    sustained : matrix products run at the rate that the power limit allows for long
    """

    def __init__(self, device: DeviceModel, fused: bool, eager_mode: str, sustained: bool) -> None:
        self.device = device
        self.fused = fused
        self.eager_mode = eager_mode
        self.sustained = sustained
        self._seen: dict[tuple[object, ...], float] = {}

    def seconds(self, kernel: Kernel, split: str | None, tp: int, b: int, forward_dims: Dims, fused: bool) -> float:
        """Seconds of one kernel at microbatch `b` on one of `tp` ranks."""
        if kernel.kind == "free":
            return 0.0
        divided = split is not None and tp > 1
        dims = split_dims(kernel, split or "", tp, forward_dims) if divided else kernel.dims
        flops = kernel.flops.at(b) / (tp if divided else 1)
        moved = local_bytes(kernel, dims, divided, tp, b)
        sizes = tuple(d.at(b) for d in dims)
        fused = fused and self.fused
        key = (kernel.name, kernel.kind, flops, moved, sizes, kernel.dtype, kernel.wrt, fused)
        if key not in self._seen:
            self._seen[key] = kernel_s(
                kernel.kind,
                flops,
                moved,
                sizes,
                kernel.dtype,
                kernel.wrt,
                self.device,
                fused=fused,
                sustained=self.sustained,
                name=kernel.name,
            )
        return self._seen[key]


class LinkClock:
    """Seconds of collectives on one profile's links, remembered by what they depend on (see `collective_s`)."""

    def __init__(self, links: LinkModel) -> None:
        self.links = links
        self._seen: dict[tuple[str, float, int, int], float] = {}

    def seconds(self, op: str, n_bytes: float, size: int, stride: int) -> float:
        """Seconds of one collective over `size` ranks that lie `stride` apart."""
        key = (op, n_bytes, size, stride)
        if key not in self._seen:
            self._seen[key] = collective_s(op, n_bytes, size, stride, self.links)
        return self._seen[key]


def unit_times(launches: Launches, tp: int, b: int, clock: KernelClock, fused: bool) -> UnitTimes:
    """Seconds of one unit on one of `tp` ranks (see `UnitTimes`); `fused` = its element-wise operators are compiled."""
    seconds = [clock.seconds(kernel, split, tp, b, dims, fused) for kernel, split, dims in launches.kernels]
    forward = backward = again_selective = weight = 0.0
    for kernel, times, again in launches.forward:
        one = seconds[kernel] * times
        forward += one
        again_selective += one if again else 0.0
    for kernel, times, of_weight in launches.backward:
        one = seconds[kernel] * times
        backward += one
        weight += one if of_weight else 0.0
    mode = "compiled" if fused and clock.fused else clock.eager_mode

    def busy(gpu_s: float, ops: int) -> float:
        return max(gpu_s, host_floor_s(ops, clock.device, mode))

    return UnitTimes(
        forward_s=busy(forward, launches.forward_ops),
        backward_s=busy(backward, launches.backward_ops),
        again_selective_s=busy(again_selective, launches.again_ops),
        again_full_s=busy(forward, launches.forward_ops),
        weight_s=weight,
    )


def unit_collectives_s(
    sharding: ClassSharding | None, tp: int, stride: int, b: int, links: LinkClock
) -> tuple[float, float]:
    """Seconds of one unit's tensor-parallel collectives, forward and backward (exposed).

    Parameters
    ----------
    stride : int
        Distance in ranks between neighbours of the tp group.
    b : int
        Samples of the microbatch.
    """
    forward = backward = 0.0
    if sharding is not None and tp > 1:
        for item in sharding.collectives:
            seconds = links.seconds(item.collective, item.bytes.at(b), tp, stride) * item.repeat
            if item.phase == "forward":
                forward += seconds
            else:
                backward += seconds
    return forward, backward


def gradient_sums_s(sharding: ClassSharding | None, tp: int, stride: int, links: LinkClock) -> float:
    """Seconds of summing, over tp, the gradients of one unit's whole weights that saw a part of the tokens.

    Paid whenever gradients are reduced over data-parallel ranks.
    """
    if sharding is None or tp == 1:
        return 0.0
    return sum(links.seconds(s.collective, s.bytes.at(1), tp, stride) for s in sharding.gradient_sums)


def tensor_bytes(cls: UnitClass, sharding: ClassSharding | None, tensor: int, tp: int, b: int) -> float:
    """Bytes of the storage behind a tensor on one rank, of all repetitions in a loop over time steps."""
    spec = cls.tensors[cls.tensors[tensor].base]
    elements = 1.0
    for d in spec.shape:
        elements *= d.at(b)
    n_bytes = elements * DTYPE_BYTES[spec.dtype] * spec.repeat
    divided = sharding is not None and tp > 1 and sharding.tensor_split[spec.id]
    return n_bytes / tp if divided else n_bytes


def saved_storages(cls: UnitClass) -> set[int]:
    """Ids of the storages that autograd keeps for backward, parameters and buffers excluded."""
    bases = {cls.tensors[t].base for op in cls.ops for t in op.saved} | {cls.tensors[t].base for t in cls.saved}
    return {t for t in bases if cls.tensors[t].kind not in ("parameter", "buffer")}


EXPENSIVE = frozenset({"gemm", "attention", "conv", "embedding"})


def saved_when_compiled(cls: UnitClass) -> set[int]:
    """Ids of the storages kept when the unit is compiled.

    torch.compile keeps what is dear to recompute and runs element-wise operators again inside the backward kernels
    that need them: each saved storage is traced back, through cheap operators, to outputs of matrix products,
    attention and convolutions, and to the unit's inputs. What one of these reads is kept as it is, because it would
    have to be written out again (ban_recompute_materialized_backward of torch's partitioner; measured: GELU's output
    stays, which made compiled BERT and ViT need as much as eager ones). The min-cut keeps at most the eager bytes.
    """
    producer = {cls.tensors[t].base: op for op in reversed(cls.ops) for t in op.outputs}
    saved = saved_storages(cls)
    read = {cls.tensors[t].base for op in cls.ops if op.forward.kind in EXPENSIVE for t in op.inputs}
    keep = saved & read
    seen: set[int] = set()
    todo = sorted(saved - keep)
    while todo:
        storage = todo.pop()
        if storage in seen:
            continue
        seen.add(storage)
        op = producer.get(storage)
        if op is None or op.forward.kind in EXPENSIVE:
            keep.add(storage)
        elif storage not in keep:
            todo += [cls.tensors[t].base for t in op.inputs]
    return {t for t in keep if cls.tensors[t].kind not in ("parameter", "buffer", "constant")}


def unit_memory(
    cls: UnitClass, sharding: ClassSharding | None, tp: int, b: int, elsewhere: frozenset[int], compiled: bool
) -> UnitMemory:
    """Bytes kept by one unit; `elsewhere` are storages already counted by another unit."""
    saved = saved_storages(cls)

    def total(tensors: set[int]) -> float:
        return sum(tensor_bytes(cls, sharding, t, tp, b) for t in sorted(tensors - elsewhere))

    inputs = {cls.tensors[t].base for t in cls.inputs}
    kept = kept_by_selective(cls.ops)
    outputs_kept = {cls.tensors[t].base for i in kept for t in cls.ops[i].outputs}
    if sharding is not None and tp > 1:
        outputs_kept |= sharding.gathered  # what collectives gave is kept
    none, full = total(saved), total(inputs)
    if compiled:
        none = min(none, total(saved_when_compiled(cls)))
    whole = sum(tensor_bytes(cls, None, t, 1, b) for t in saved)
    local = sum(tensor_bytes(cls, sharding, t, tp, b) for t in saved)
    share = local / whole if whole else 1.0
    workspace = max(cls.workspace_forward.at(b), cls.workspace_backward.at(b))
    return UnitMemory(
        none=round(none),
        selective=round(min(none, total(inputs | outputs_kept))),
        full=round(min(none, full)),
        workspace=round(workspace * share + loss_parallel_bytes(cls, sharding, tp, b)),
    )


def loss_parallel_bytes(cls: UnitClass, sharding: ClassSharding | None, tp: int, b: int) -> float:
    """What torch's loss_parallel needs above the plain loss in backward: one more copy of the local logits.

    Its gradient is (one_hot + exp(x)) * g, out of place: three copies live at once instead of two (torch,
    distributed/tensor/parallel/loss.py, _nll_loss_and_log_softmax_backward).
    """
    if sharding is None or tp == 1:
        return 0.0
    logits = [op.outputs[0] for i, op in enumerate(cls.ops) if "_log_softmax" in op.name and sharding.op_split[i]]
    return sum(tensor_bytes(cls, sharding, t, tp, b) for t in logits)
