"""Tensor parallelism equals one process: the styles that the planner finds, on models written in many ways."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from tpplan.errors import PlanFileError
from tpplan.planner.plan import ModuleStyle, TensorParallelSection
from tpplan.planner.sharding import analyse
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace
from tpplan.runtime.packed import pack, packed_part, unpack

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(Path(__file__).resolve().parent))  # the pool's workers load this file by its path
OWN = str(ROOT / "tests" / "runtime" / "tp_models.py")
SEQ = 16
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "manual": (OWN, {"kind": "manual"}),
    "unbound": (OWN, {"kind": "unbound"}),
    "rotary": (OWN, {"kind": "rotary"}),
    "one key": (OWN, {"kind": "one key"}),
    "adapters": (OWN, {"kind": "adapters"}),
    "llama": (str(ROOT / "examples" / "llama_tiny"), {}),
    "bert": (str(ROOT / "examples" / "bert_tiny"), {}),
    "nanogpt": (
        str(ROOT / "examples" / "nanogpt.py"),
        {"n_layer": "2", "n_head": "4", "n_embd": "64", "block_size": "32", "vocab_size": "96"},
    ),
}


@cache
def planned(name: str) -> tuple[TensorParallelSection, float, int, int]:
    """The styles that the planner finds, the share it splits, and its counts of collectives (forward, backward)."""
    target, args = TARGETS[name]
    graph = trace(load_target(target, model_args=args), sequence_length=SEQ, precision="fp32")
    s = analyse(graph)
    styles = {
        f: ModuleStyle.model_validate({"style": x.style, "sizes": x.sizes, "output": x.output})
        for f, x in s.styles.items()
    }
    section = TensorParallelSection(styles=styles, attention=sorted(s.attention), loss_parallel=s.loss_parallel)
    phases = [c.phase for u in graph.units for c in s.of_class(u.class_index).collectives]
    return section, s.sharded_share, phases.count("forward"), phases.count("backward")


class Collectives(TorchDispatchMode):
    """Counts the collectives that run (torch's own counter fails on recomputed and on called-twice modules)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # look at what DTensor makes of it
        name = str(func)
        self.count += name.startswith("_c10d_functional.") and "wait" not in name and "wrap" not in name
        return func(*args, **(kwargs or {}))


def one_step(
    rank: int, world: int, target: str, args: dict[str, str], section: TensorParallelSection, how: str
) -> dict[str, Any]:
    """Gradients of one rank and of one process, and the collectives that ran."""
    from numeric import keep_float64
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint
    from tpplan.runtime.full_tensors import full_tensor_of
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    source = load_target(target, model_args=args)
    torch.manual_seed(3)
    model = source.build("cpu").double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = source.example_inputs(model, 2, SEQ)
    reference = copy.deepcopy(model)
    dp = 2 if how == "fsdp" else 1
    mesh = init_device_mesh("cpu", (1, dp, world // dp), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    apply_tensor_parallel(model, section, mesh["tp"])
    if how == "recompute":
        block = next(m for name, m in model.named_modules() if name.endswith(".1"))
        inner = block.forward
        block.forward = lambda *a, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    if how == "fsdp":
        fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    forward, backward = Collectives(), Collectives()
    with keep_float64():
        expected = source.loss(reference(*inputs.args, **inputs.kwargs), inputs)
        expected.backward()
        with step_context(section):
            with forward:
                loss = source.loss(model(*inputs.args, **inputs.kwargs), inputs)
            with backward:
                loss.backward()
    grads = {n: full_tensor_of(p.grad, n, section) for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return {
        "loss": full_tensor_of(loss.detach(), "", section).item(),
        "expected": expected.item(),
        "grads": grads,
        "wanted": wanted,
        "comm": (forward.count, backward.count),
    }


def check(result: dict[str, Any]) -> None:
    assert abs(result["loss"] - result["expected"]) <= 1e-9 * abs(result["expected"])
    largest = max(g.norm().item() for g in result["wanted"].values())
    assert set(result["grads"]) == set(result["wanted"])
    for name, wanted in result["wanted"].items():
        error = (result["grads"][name] - wanted).norm().item()
        assert error <= 1e-9 * max(wanted.norm().item(), 1e-3 * largest), name


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_and_collectives(pool, name: str) -> None:
    target, args = TARGETS[name]
    section, share, forward, backward = planned(name)
    assert share >= 0.5
    for result in pool.run(one_step, world=2, target=target, args=args, section=section, how="plain"):
        check(result)
        if name != "adapters":  # there whole and partial gradients meet; how often they are summed is torch's choice
            assert result["comm"] == (forward, backward)


@pytest.mark.parametrize(
    ("name", "how"), [("manual", "plain"), ("nanogpt", "recompute"), ("manual", "fsdp"), ("bert", "plain")]
)
def test_four_processes(pool, name: str, how: str) -> None:
    target, args = TARGETS[name]
    for result in pool.run(one_step, world=4, target=target, args=args, section=planned(name)[0], how=how):
        check(result)


def replicated_heads(rank: int, world: int) -> bool:
    """Two key/value heads on four ranks: the keys stay whole, each rank attends with the head its queries need."""
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from tpplan.runtime.attention import attention_on_local_heads

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, 6, 8, dtype=torch.float64, requires_grad=True) for heads in (8, 2, 2)]
    bias = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*whole, attn_mask=bias, enable_gqa=True)
    expected.square().sum().backward()
    placements = (Shard(1), Replicate(), Replicate())
    split = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(whole, placements, strict=True)]
    out = attention_on_local_heads(*split, attn_mask=bias, enable_gqa=True)
    assert isinstance(out, DTensor)
    out.square().sum().backward()
    same = [torch.allclose(out.full_tensor(), expected)]
    same += [torch.allclose(s.grad.full_tensor(), t.grad) for s, t in zip(split, whole, strict=True)]
    return all(same)


def test_fewer_key_value_heads_than_ranks(pool) -> None:
    assert all(pool.run(replicated_heads, world=4))


def products_of_heads(rank: int, world: int) -> bool:
    """Every way to write scores and their product with the values, split by heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    section = TensorParallelSection()
    apply_tensor_parallel(torch.nn.Linear(2, 2), section, mesh)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    shared, ways = torch.randn(8, 3), []
    ways.append(lambda a, b: a @ b.transpose(-2, -1))
    ways.append(lambda a, b: a.matmul(b.transpose(-2, -1)))
    ways.append(lambda a, b: torch.matmul(a, b.mT))
    ways.append(lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b))
    ways.append(lambda a, b: a @ shared + b @ shared)
    same = []
    for way in ways:
        whole = [t.clone().requires_grad_() for t in (q, k)]
        split = [distribute_tensor(t, mesh, [Shard(1)]).requires_grad_() for t in (q, k)]
        expected = way(*whole)
        expected.square().sum().backward()
        with step_context(section):
            out = way(*split)
            out.square().sum().backward()
        assert out.placements == (Shard(1),)
        same.append(torch.allclose(out.full_tensor(), expected, atol=1e-5))
        same += [torch.allclose(s.grad.full_tensor(), t.grad, atol=1e-4) for s, t in zip(split, whole, strict=True)]
    return all(same) and "__matmul__" not in vars(DTensor)


def test_batched_products_stay_on_their_rank(pool) -> None:
    assert all(pool.run(products_of_heads, world=2))


def convolution_stays_local(rank: int, world: int) -> bool:
    """A patch convolution and batch norm beside a split MLP."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from tpplan.runtime.full_tensors import full_tensor_of
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)
    ).double()
    reference, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    reference(x).square().sum().backward()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    styles = {"3": ModuleStyle(style="col", output="shard"), "5": ModuleStyle(style="row")}
    section = TensorParallelSection(styles=styles)
    apply_tensor_parallel(model, section, mesh)
    with step_context(section):
        model(x).square().sum().backward()
    wanted = dict(reference.named_parameters())
    same = [torch.allclose(full_tensor_of(p.grad, n, section), wanted[n].grad) for n, p in model.named_parameters()]
    buffers = dict(reference.named_buffers())
    return all(same) and all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_convolutions_and_batch_norm_run_on_whole_tensors(pool) -> None:
    assert all(pool.run(convolution_stays_local, world=2))


def misused(rank: int, world: int, case: str) -> str:
    """The message of a plan that does not fit the model."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    packed = ModuleStyle(style="packed", sizes=[4, 4, 4], output="shard")
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU())
    styles = {"0": packed}
    if case == "degree":
        styles = {"0": ModuleStyle(style="packed", sizes=[3, 3, 6])}
    if case == "style":
        model, styles = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), {"0": ModuleStyle(style="col")}
    if case == "ties":
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        styles = {"0": ModuleStyle(style="col"), "1": ModuleStyle(style="row")}
    section = TensorParallelSection(styles=styles)
    try:
        apply_tensor_parallel(model, section, mesh)
        with step_context(section):
            if case == "cut":
                model[0](torch.randn(2, 8)).split(6, dim=-1)
            model(torch.randn(2, 8))
    except PlanFileError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("used whole", "gelu"),
        ("cut", "split(6, dim=-1)"),
        ("degree", "tp=2 cannot divide"),
        ("style", "0.weight cannot have the style col"),
        ("ties", "are one tensor"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(pool, case: str, says: str) -> None:
    for message in pool.run(misused, world=2, case=case):
        assert says in message


def test_packing_is_undone_by_unpacking() -> None:
    full = torch.arange(24).view(12, 2)
    packed = pack(full, (6, 4, 2), 2, 0)
    assert packed[:6].tolist() == packed_part(full, (6, 4, 2), 2, 0, 0).tolist()
    assert not torch.equal(packed, full)
    assert torch.equal(unpack(packed, (6, 4, 2), 2, 0), full)


def test_torch_is_left_as_it_was(pool) -> None:
    assert all(pool.run(names_are_restored, world=1))


def names_are_restored(rank: int, world: int) -> bool:
    import torch.nn.functional as F
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from tpplan.runtime.attention import torch_attention
    from tpplan.runtime.tensor_parallel import apply_tensor_parallel, step_context

    section = TensorParallelSection()
    apply_tensor_parallel(nn.Linear(4, 4), section, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    with step_context(section):
        inside = F.scaled_dot_product_attention is not torch_attention
    return inside and F.scaled_dot_product_attention is torch_attention
