"""The splits that the rules claim legal, against DTensor: the same placement, and no communication on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore
from tpplan.planner.sharding_states import Split, State

from .sharding_cases import TP, claim, split
from .test_sharding_rules import ALONG_CALLS, POINTWISE_CALLS, POOLS, numbers

aten = torch.ops.aten

# What DTensor cannot carry although each rank can do it alone (test_sharding_rules.py); the runtime runs it locally.
NEVER = {
    "copy": "only the operator in place has a strategy",
    "reflection_pad1d": "padding by other elements than zeros has none",
    "reflection_pad2d": "the same",
    "replication_pad2d": "the same",
    "tril": "gathered, though its last two dimensions alone are touched",
    "triu": "the same",
    "unfold": "has none",
}
FROM_2_13 = {
    **dict.fromkeys(("ne", "threshold"), "not listed as element-wise by 2.11"),
    **dict.fromkeys(("cumprod", "flip", "roll", "constant_pad_nd"), "no strategy in 2.11"),
    **dict.fromkeys(POOLS.keys() - NEVER.keys(), "2.11 has none for pooling and resampling"),
}
NEW = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
LACKING = NEVER.keys() | (set() if NEW else FROM_2_13.keys())


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    if dist.is_initialized():
        pytest.skip("a process group is open")
    dist.init_process_group("fake", rank=0, world_size=TP, store=FakeStore())
    yield init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def placement(state: State) -> Placement:
    return Shard(state.dim) if isinstance(state, Split) else Replicate()


def propagated(mesh: DeviceMesh, call: Any, args: Sequence[Any], states: Sequence[State], **kwargs: Any) -> Any:
    """Run `call` on DTensors placed as the states say; the placements of its outputs, and its communication."""
    tensors = iter(states)

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            where = placement(next(tensors))
            local = value.chunk(TP, where.dim)[0] if isinstance(where, Shard) else value
            return DTensor.from_local(local.contiguous(), mesh, [where], run_check=False)
        if isinstance(value, (list, tuple)):
            return type(value)(place(v) for v in value)
        return value

    with CommDebugMode() as counted:
        result = call(*(place(a) for a in args), **kwargs)
    outputs = [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    return [o.placements[0] for o in outputs if isinstance(o, DTensor)], counted.get_total_counts()


def agrees(mesh: DeviceMesh, call: Any, args: Sequence[Any], splits: dict[int, Split], **kwargs: Any) -> bool:
    """Whether DTensor places the outputs as claimed without communication; False where it has no strategy."""
    found = claim(call, args, splits, **kwargs)
    try:
        placed, sent = propagated(mesh, call, args, found.states, **kwargs)
    except (NotImplementedError, RuntimeError):
        return False
    return placed == [placement(s) for s in found.results][: len(placed)] and sent == 0


@pytest.mark.parametrize("name", sorted(POINTWISE_CALLS.keys() - LACKING))
@pytest.mark.parametrize("dim", [0, 1])
def test_element_wise(mesh: DeviceMesh, name: str, dim: int) -> None:
    call, arguments = POINTWISE_CALLS[name]
    x, y = numbers((4, 6)), numbers((4, 6)) + 0.1
    args = arguments(x, y)
    count = sum(isinstance(a, torch.Tensor) for a in args)
    assert agrees(mesh, call, args, {i: split(dim) for i in range(count)})


@pytest.mark.parametrize("name", sorted(ALONG_CALLS.keys() - LACKING - {"_log_softmax"}))
def test_along_another_dimension(mesh: DeviceMesh, name: str) -> None:
    call, arguments = ALONG_CALLS[name]
    assert agrees(mesh, call, (numbers((4, 6)), *arguments(1)), {0: split(0)})


@pytest.mark.parametrize("name", sorted(POOLS.keys() - LACKING))
def test_pooling_and_resampling(mesh: DeviceMesh, name: str) -> None:
    call, rest, spatial = POOLS[name]
    assert agrees(mesh, call, (numbers((2, 6, *(4,) * spatial)), *rest), {0: split(1)})


@pytest.mark.parametrize(
    ("call", "rest", "dim"),
    [
        (aten.view.default, [(2, 2, 6)], 0),
        (aten.view.default, [(4, 2, 3)], 1),
        (aten.view.default, [(24,)], 0),
        (aten.transpose.int, [0, 1], 0),
        (aten.permute.default, [(1, 0)], 1),
        (aten.t.default, [], 0),
        (aten.unsqueeze.default, [1], 1),
        (aten.expand.default, [(3, 4, 6)], 0),
        (aten.split.Tensor, [3, 1], 0),
        (aten.slice.Tensor, [1, 1, 4], 0),
        (aten.select.int, [1, 3], 0),
        (aten.unbind.int, [1], 0),
        (aten.mean.dim, [(1,)], 0),
        (aten.sum.dim_IntList, [(0,)], 1),
        (aten.amax.default, [(1,)], 0),
        (aten.repeat.default, [(1, 2)], 0),
        (aten.index_select.default, [1, torch.tensor([3, 0])], 0),
        (aten.native_layer_norm.default, [(6,), None, None, 1e-5], 0),
    ],
)
def test_views_cuts_and_reductions(mesh: DeviceMesh, call: Any, rest: list[Any], dim: int) -> None:
    assert agrees(mesh, call, (numbers((4, 6)), *rest), {0: split(dim)})


def test_joins_and_products(mesh: DeviceMesh) -> None:
    a, b = numbers((4, 6)), numbers((4, 6))
    assert agrees(mesh, aten.cat.default, ([a, b], 1), {0: split(0), 1: split(0)})
    assert agrees(mesh, aten.stack.default, ([a, b], 0), {0: split(1), 1: split(1)})
    c, d = numbers((4, 2, 3)), numbers((4, 3, 5))
    assert agrees(mesh, aten.bmm.default, (c, d), {0: split(0), 1: split(0)})
    assert agrees(mesh, aten.bmm.default, (c, d[:, :, :4].contiguous()), {1: split(2)})


def test_col_and_row_products(mesh: DeviceMesh) -> None:
    x, w = numbers((4, 6)), numbers((6, 8))
    placed, sent = propagated(mesh, aten.mm.default, (x, w), [claim_whole(), split(1)])
    assert (placed, sent) == ([Shard(1)], 0)
    placed, sent = propagated(mesh, aten.mm.default, (x, w), [split(1), split(0)])
    assert placed[0].is_partial()
    assert sent == 0


def claim_whole() -> State:
    return claim(aten.relu.default, (numbers((4, 6)),), {}).results[0]


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_dtensor_lacks(mesh: DeviceMesh, name: str) -> None:
    """The rules carry these, checked by the ranks' own arithmetic; once DTensor does too, they leave the list."""
    image = numbers((4, 6, 2))
    if name in POOLS:
        call, rest, spatial = POOLS[name]
        args: tuple[Any, ...] = (numbers((2, 6, *(4,) * spatial)), *rest)
        dim = 1
    elif name == "copy":
        call, args, dim = aten.copy.default, (image, image + 1), 0
    elif name == "unfold":
        call, args, dim = aten.unfold.default, (image, 1, 3, 1), 0
    else:
        call, args, dim = getattr(aten, name).default, (image,), 0
    splits = {i: split(dim) for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    assert isinstance(claim(call, args, splits).results[0], Split)
    assert not agrees(mesh, call, args, splits)
