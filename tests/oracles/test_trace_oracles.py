"""The traced figures against torch itself: its FLOP counter, its autograd, real tensors on the CPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import tpplan
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tpplan.planner.graph import ModelGraph
from tpplan.planner.target import Target, load_target
from tpplan.planner.trace import trace

EXAMPLES = Path(tpplan.__file__).parent / "examples"
SMALL = {
    "nanogpt": ("nanogpt.py", {"n_layer": "5", "n_head": "4", "n_embd": "32", "vocab_size": "128"}, 16),
    "llama": ("llama_tiny/config.json", {}, 32),
    "bert": ("bert_tiny/config.json", {}, 32),
    "resnet": ("resnet.py", {"depth": "50", "width": "8", "num_classes": "10"}, 64),
    "lora": ("lora.py", {"vocab_size": "64", "n_layer": "5", "n_head": "4", "n_embd": "32"}, 16),
}
BATCH = 4
aten = torch.ops.aten


@cache
def small(name: str) -> tuple[Target, ModelGraph, int]:
    spec, args, seq = SMALL[name]
    target = load_target(str(EXAMPLES / spec), model_args=args)
    return target, trace(target, sequence_length=seq, precision="fp32"), seq


def _counter() -> FlopCounterMode:
    """torch's counter, told that the CPU's fused attention is the attention it knows under other names."""

    def heads(query, *others):
        return [(t[0], query[1], *t[2:]) for t in others]

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, *heads(query, key, value))

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, query, *heads(query, key, value))

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def _real(name: str):
    target, graph, seq = small(name)
    torch.manual_seed(0)
    model = target.build("cpu").train()
    return target, graph, model, target.example_inputs(model, BATCH, seq)


@pytest.mark.parametrize("name", SMALL)
def test_flops_equal_torchs_counter(name):
    target, graph, model, inputs = _real(name)
    with _counter() as forward:
        loss = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
    with _counter() as backward:
        loss.backward()
    assert forward.get_total_flops() > 0
    assert graph.flops_forward.at(BATCH) == forward.get_total_flops()
    assert graph.flops_backward.at(BATCH) == backward.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_parameters_equal_numel(name):
    _, graph, model, _ = _real(name)
    assert graph.parameter_count == sum(p.numel() for p in model.parameters())
    assert graph.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert graph.buffer_count == sum(b.numel() for b in model.buffers())


@pytest.mark.parametrize("name", SMALL)
def test_saved_bytes_equal_a_real_step(name):
    target, graph, model, inputs = _real(name)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address may be used anew only when nothing holds it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        target.loss(model(*inputs.args, **inputs.kwargs), inputs)
    assert graph.saved_bytes.at(BATCH) == pytest.approx(sum(kept.values()), rel=0.01)


def test_frozen_weights_have_no_weight_gradient():
    _, graph, _ = small("lora")
    frozen = {f for f, p in graph.parameters.items() if not p.requires_grad and not p.is_buffer}
    assert frozen
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        for op in cls.ops:
            bases = {cls.tensors[cls.tensors[t].base] for t in op.inputs}
            weights = {t for t in bases if t.kind == "parameter"}
            if op.forward.kind == "gemm" and weights and not any(t.requires_grad for t in weights):
                assert all(k.wrt != "weight" for k in op.backward if k.kind == "gemm"), op


GROUPED = """
import torch
from torch import nn
def build_model():
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.Conv2d(8, 8, 3, groups=4, padding=1))
def example_inputs(batch, seq):
    return torch.randn(batch, 8, seq, seq)
def loss_fn(output, inputs):
    return output.float().square().mean()
"""


def test_grouped_convolution_backward_is_twice_forward(tmp_path):
    """torch's counter multiplies the backward of grouped convolutions by their groups."""
    (tmp_path / "grouped.py").write_text(GROUPED)
    graph = trace(load_target(str(tmp_path / "grouped.py")), sequence_length=8, precision="fp32")
    one = 2 * 8 * (8 // 4) * 9 * 8 * 8
    assert graph.flops_forward.at(1) == 2 * one
    assert graph.flops_backward.at(1) == 2 * one + one  # the first has no gradient of its input


def test_experts_of_a_mixtral_count_the_tokens_routed_to_them(tmp_path):
    """torch's counter has no formula for grouped products, so by hand: three products a token and expert."""
    pytest.importorskip("transformers")
    h, ffn, experts, top_k, layers, seq, b = 64, 96, 4, 2, 4, 16, 2
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "hidden_size": h,
        "intermediate_size": ffn,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "vocab_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph = trace(load_target(str(tmp_path)), sequence_length=seq, precision="bf16").verify()
    grouped = [op for unit in graph.units for op in graph.classes[unit.class_index].ops if "grouped_mm" in op.name]
    assert sum(op.forward.flops.at(b) for op in grouped) == layers * 3 * 2 * b * seq * top_k * h * ffn
    backward = [k for op in grouped for k in op.backward if k.kind == "gemm"]
    assert sum(k.flops.at(b) for k in backward) == 2 * sum(op.forward.flops.at(b) for op in grouped)
    assert {k.wrt for k in backward} == {"input", "weight"}
    assert graph.opaque == ()
