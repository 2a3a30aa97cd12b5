"""Models in the ways people write them: traced figures against a real step, and layers that chance would drop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tpplan.planner.graph import ModelGraph
from tpplan.planner.target import Target, load_target
from tpplan.planner.trace import trace

from .styles import DROPS, HEAD, STYLES, drop, style

BATCH, SEQ = 4, 8
KEPT_UNSEEN = ("custom_function_keeps_attributes", "checkpoint", "checkpoint_reentrant")  # autograd's hooks miss it


def traced(tmp_path: Path, text: str) -> tuple[Target, ModelGraph]:
    (tmp_path / "own.py").write_text(text)
    target = load_target(str(tmp_path / "own.py"))
    return target, trace(target, sequence_length=SEQ, precision="fp32").verify()


def counter() -> FlopCounterMode:
    """torch's counter, told that the CPU's fused attention is the attention it knows under other names."""
    aten = torch.ops.aten

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, query, key, value)

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class Alive(TorchDispatchMode):
    """Which storages that operators made still live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def storages(self) -> dict[int, int]:
        return {cdata: nbytes for cdata, (ref, nbytes) in self.made.items() if not ref.expired()}


def real_step(target: Target, all_that_lives: bool) -> tuple[torch.nn.Module, int, int, int]:
    """The model, FLOPs forward and backward, and bytes kept for backward, of a step on real tensors."""
    torch.manual_seed(0)
    model = target.build("cpu").train()
    inputs = target.example_inputs(model, BATCH, SEQ)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = [t.untyped_storage() for t in model.parameters()]  # an address may be used anew when nothing holds it

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with (
        torch.compiler.set_stance("force_eager"),
        counter() as forward,
        Alive() as living,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        loss = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
    if all_that_lives:
        own.add(loss.untyped_storage()._cdata)
        kept |= {c: n for c, n in living.storages().items() if c not in own}
    with torch.compiler.set_stance("force_eager"), counter() as backward:
        loss.backward()
    return model, forward.get_total_flops(), backward.get_total_flops(), sum(kept.values())


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # torch's counter hangs hooks on all modules
@pytest.mark.parametrize("name", STYLES)
def test_figures_equal_a_real_step(name, tmp_path):
    target, graph = traced(tmp_path, style(name))
    model, forward, backward, saved = real_step(target, name in KEPT_UNSEEN)
    assert graph.parameter_count == sum(p.numel() for p in model.parameters())
    assert graph.buffer_count == sum(b.numel() for b in model.buffers())
    assert graph.flops_forward.at(BATCH) == forward
    assert graph.flops_backward.at(BATCH) == backward
    assert graph.saved_bytes.at(BATCH) == pytest.approx(saved, rel=0.01)
    without_gradient = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert set(graph.unused) <= without_gradient
    assert graph.captured
    assert any("again in backward" in note for note in graph.notes) == name.startswith("checkpoint")


FLEX = (
    HEAD
    + """
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
class Model(Net):
    def inside(self):
        self.qkv, self.out = nn.Linear(8, 96), nn.Linear(32, 4)
    def body(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, x.shape[1], x.shape[1], device="cpu")
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
"""
)


def test_flex_attention_is_one_operator(tmp_path):
    """torch has no backward of it on the CPU, so there is no real step to compare with."""
    _, graph = traced(tmp_path, FLEX)
    ops = [op for cls in graph.classes for op in cls.ops if op.forward.kind == "attention"]
    assert [op.forward_flops.at(BATCH) for op in ops] == [4 * BATCH * 2 * SEQ * SEQ * 16]
    assert [k.flops.at(BATCH) for k in ops[0].backward if k.kind == "attention"] == [10 * BATCH * 2 * SEQ * SEQ * 16]


@pytest.mark.parametrize("name", DROPS)
def test_chance_drops_no_layer(name, tmp_path):
    _, graph = traced(tmp_path, drop(name))
    assert graph.unused == ()
    assert graph.flops_forward.at(BATCH) == 2 * BATCH * SEQ * (5 * 8 * 8 + 8 * 4)
    assert any("drop nothing" in note for note in graph.notes)
