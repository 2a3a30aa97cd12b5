"""The styles found from traced operators are those that people write by hand, and what they cost is counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tpplan.planner.graph import Affine, Kernel, ModelGraph, Op, Parameter, Ref, Tensor, Unit, UnitClass
from tpplan.planner.sharding import Sharding, analyse
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

ROOT = Path(__file__).resolve().parents[2]
GPT = (("n_layer", "3"), ("n_head", "6"), ("n_embd", "48"), ("block_size", "32"), ("vocab_size", "96"))
OWN = str(ROOT / "tests" / "runtime" / "tp_models.py")


@cache
def found(target: str, *args: tuple[str, str], seq: int = 16) -> Sharding:
    return analyse(trace(load_target(target, model_args=args), sequence_length=seq, precision="fp32"))


def styles(sharding: Sharding, prefix: str) -> dict[str, str]:
    return {f[len(prefix) :].strip("."): s.style for f, s in sharding.styles.items() if f.startswith(prefix)}


def test_nanogpt_is_packed_and_tied() -> None:
    s = found(str(ROOT / "examples" / "nanogpt.py"), *GPT)
    assert styles(s, "transformer.h.2") == {
        "attn.c_attn": "packed",
        "attn.c_proj": "row",
        "mlp.c_fc": "col",
        "mlp.c_proj": "row",
    }
    assert s.styles["transformer.h.0.attn.c_attn"].sizes == (48, 48, 48)
    assert s.styles["transformer.wte"].style == "vocab"
    assert (s.styles["lm_head"].style, s.styles["lm_head"].output) == ("col", "shard")
    assert s.loss_parallel
    assert s.attention == {f"transformer.h.{i}.attn" for i in range(3)}
    split = s.parameter_split
    assert split["transformer.wte.weight"] == split["lm_head.weight"] == 0
    assert split["transformer.h.1.attn.c_attn.bias"] == 0
    assert split["transformer.h.1.attn.c_proj.weight"] == 1
    assert "transformer.h.1.attn.c_proj.bias" not in split
    assert "transformer.wpe.weight" not in split or s.styles["transformer.wpe"].style == "vocab"
    assert s.degrees_allowed(8) == [1, 2, 3, 6]
    assert any("6 heads" in reason for reason in s.reasons)


def test_llama_splits_heads_and_mlp() -> None:
    s = found(str(ROOT / "examples" / "llama_tiny"))
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert styles(s, "model.layers.3") == {
        **dict.fromkeys(columns, "col"),
        "self_attn.o_proj": "row",
        "mlp.down_proj": "row",
    }
    assert s.sharded_share > 0.9
    assert s.degrees_allowed(64) == [1, 2, 4]  # 8 heads, 4 key/value heads
    assert s.degrees_allowed(2) == [1, 2]


def test_costs_of_a_llama_layer() -> None:
    graph = trace(load_target(str(ROOT / "examples" / "llama_tiny")), sequence_length=16, precision="fp32")
    s = analyse(graph)
    index = next(u.class_index for u in graph.units if u.fqn == "model.layers.0")
    cls, layer = graph.classes[index], s.of_class(index)
    # Two sums forward (after attention and MLP), two backward (their inputs), each of one hidden state.
    assert [(c.phase, c.collective) for c in layer.collectives] == [("forward", "all_reduce")] * 2 + [
        ("backward", "all_reduce")
    ] * 2
    assert {c.bytes for c in layer.collectives} == {Affine(0, 16 * 64 * 4)}
    gemms = [layer.op_split[op.index] for op in cls.ops if op.forward.kind == "gemm"]
    assert gemms == ["n", "n", "n", "k", "n", "n", "k"]
    assert [layer.op_split[op.index] for op in cls.ops if op.forward.kind == "attention"] == ["heads"]
    norms = [op for op in cls.ops if op.fqn == "input_layernorm"]
    assert all(layer.op_split[op.index] is None for op in norms)
    assert not any(layer.tensor_split[t] for t in (*cls.inputs, *cls.outputs))
    gate = next(op for op in cls.ops if op.name.startswith("aten.silu"))
    assert layer.tensor_split[gate.outputs[0]]


def test_bert_splits_its_tied_decoder() -> None:
    s = found(str(ROOT / "examples" / "bert_tiny"))
    assert s.styles["bert.embeddings.word_embeddings"].style == "vocab"
    assert s.styles["cls.predictions.decoder"].style == "col"
    assert s.parameter_split["cls.predictions.decoder.bias"] == s.parameter_split["cls.predictions.bias"] == 0
    assert "cls.predictions.transform.dense" not in s.styles  # a norm follows
    assert styles(s, "bert.encoder.layer.0")["attention.output.dense"] == "row"


def test_an_odd_vocabulary_stays_whole_rather_than_limit_tp() -> None:
    s = found(str(ROOT / "examples" / "nanogpt.py"), *GPT[:-1], ("vocab_size", "97"))
    assert "transformer.wte" not in s.styles
    assert "lm_head" not in s.styles
    assert not s.loss_parallel
    assert s.degrees_allowed(8) == [1, 2, 3, 6]
    assert any("97" in reason for reason in s.reasons)


def test_a_vocabulary_larger_than_the_body_does_not_cost_the_heads() -> None:
    s = found(str(ROOT / "examples" / "nanogpt.py"), ("n_layer", "2"), ("n_head", "4"), ("n_embd", "32"))
    assert s.styles["transformer.h.0.attn.c_attn"].style == "packed"
    assert s.styles["transformer.wte"].style == "vocab"
    assert s.degrees_allowed(8) == [1, 2, 4]


def test_convolutions_split_their_channels() -> None:
    s = found(str(ROOT / "examples" / "resnet.py"), ("depth", "18"), ("width", "8"), ("num_classes", "10"), seq=32)
    block = styles(s, "groups.1.1.branch")
    assert block == {"0": "col", "1": "channel", "3": "row"}  # convolution, batch norm, (relu,) convolution
    assert s.parameter_split["groups.1.1.branch.0.weight"] == s.parameter_split["groups.1.1.branch.1.bias"] == 0
    assert s.parameter_split["groups.1.1.branch.3.weight"] == 1
    assert s.degrees_allowed(8) == [1, 2, 4, 8]
    assert not s.sequence_parallel


def test_the_stream_of_a_llama_can_be_split_along_its_tokens() -> None:
    s = found(str(ROOT / "examples" / "llama_tiny"))
    assert s.sequence_parallel
    assert s.sequence.tokens == 16
    norms = {m for m in s.sequence.modules if m.startswith("model.layers.2") and m.endswith("norm")}
    assert norms == {"model.layers.2.input_layernorm", "model.layers.2.post_attention_layernorm"}
    assert not any("_proj" in module for module in s.sequence.modules)


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        ("manual", {"qkv": "packed", "out": "row"}, {"both": "packed", "down": "row"}),
        ("unbound", {"qkv": "packed", "proj": "row"}, {"both": "packed", "down": "row"}),
        ("rotary", {"wq": "col", "wk": "col", "wv": "col", "wo": "row"}, {"0": "col", "2": "row"}),
        ("one key", {"wq": "col", "wo": "row"}, {"0": "col", "2": "row"}),
        (
            "adapters",
            {"wq.base": "col", "wq.b": "col", "wk": "col", "wv.base": "col", "wv.b": "col"}
            | {"wo.base": "row", "wo.a": "row"},
            {"0": "col", "2": "row"},
        ),
    ],
)
def test_the_ways_people_write_blocks(kind: str, attention: dict[str, str], mlp: dict[str, str]) -> None:
    s = found(OWN, ("kind", kind))
    assert styles(s, "h.1.attn") == attention
    assert styles(s, "h.1.mlp") == mlp
    assert s.styles["wte"].style == "vocab"
    assert 2 in s.degrees_allowed(8)


# A graph by hand: x -> up -> (something) -> down, to see what stops a split.


def hand_graph(between: str, between_args: tuple[object, ...] = (), width: int = 12) -> ModelGraph:
    def tensor(i: int, shape: tuple[int, ...], kind: str = "activation", fqn: str = "") -> Tensor:
        return Tensor(i, tuple(Affine(n) for n in shape), "float32", kind, i, kind != "buffer", fqn)

    def op(i: int, name: str, fqn: str, args: tuple[object, ...], out: int, kind: str = "memory") -> Op:
        inputs = tuple(a.tensor for a in args if isinstance(a, Ref))
        kernel = Kernel(name, kind, Affine(), Affine())
        return Op(i, name, fqn, 0, "Linear" if fqn else "Block", args, inputs, (out,), kernel)

    tensors = (
        tensor(0, (5, 8), "input"),
        tensor(1, (width, 8), "parameter", "up.weight"),
        tensor(2, (8, width)),
        tensor(3, (5, width)),
        tensor(4, (5, width)),
        tensor(5, (8, width), "parameter", "down.weight"),
        tensor(6, (width, 8)),
        tensor(7, (5, 8)),
    )
    ops = (
        op(0, "aten.t.default", "up", (Ref(1),), 2, "free"),
        op(1, "aten.mm.default", "up", (Ref(0), Ref(2)), 3, "gemm"),
        op(2, between, "", (Ref(3), *between_args), 4),
        op(3, "aten.t.default", "down", (Ref(5),), 6, "free"),
        op(4, "aten.mm.default", "down", (Ref(4), Ref(6)), 7, "gemm"),
    )
    own = [Parameter(t.fqn, tuple(int(d.base) for d in t.shape), "float32", True, "Linear") for t in tensors if t.fqn]
    zero = Affine()
    cls = UnitClass(0, "Block", ops, tensors, tuple(own), (0,), (7,), zero, zero, zero, zero, zero)
    units = tuple(Unit(i, f"h.{i}", 0, 0, ((i - 1, 0),)) for i in range(2))
    parameters = {f"h.{i}.{p.fqn}": p for i in range(2) for p in own}
    return ModelGraph("hand", "fp32", 0, (cls,), units, (), parameters)


@pytest.mark.parametrize(
    ("between", "args"),
    [("aten.gelu.default", ()), ("aten.mul.Tensor", (2.0,)), ("aten._softmax.default", (0, False))],
)
def test_a_split_passes(between: str, args: tuple[object, ...]) -> None:
    s = analyse(hand_graph(between, args))
    assert {f: x.style for f, x in s.styles.items()} == {
        f"h.{i}.{n}": x for i in range(2) for n, x in (("up", "col"), ("down", "row"))
    }
    assert s.parameter_split == {f"h.{i}.{n}.weight": d for i in range(2) for n, d in (("up", 0), ("down", 1))}
    assert s.degrees_allowed(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("between", "args"),
    [
        ("aten._softmax.default", (-1, False)),
        ("aten.cumsum.default", (1,)),
        ("aten.native_layer_norm.default", ((12,), None, None, 1e-5)),
        ("aten.unheard_of.default", ()),
    ],
)
def test_a_split_is_stopped_and_the_reason_said(between: str, args: tuple[object, ...]) -> None:
    s = analyse(hand_graph(between, args))
    assert {(x.style, x.output) for x in s.styles.values()} == {("col", "replicate")}
    assert any("h.0.up has its output gathered" in reason for reason in s.reasons)
    assert [c.collective for c in s.of_class(0).collectives if c.phase == "forward"] == ["all_gather"] * 2


def test_an_indivisible_width_leaves_tp_1() -> None:
    assert analyse(hand_graph("aten.gelu.default", width=13)).degrees_allowed(8) == [1]
    assert analyse(hand_graph("aten.gelu.default", width=13)).degrees_allowed(13) == [1, 13]


def test_an_opaque_part_stays_whole() -> None:
    graph = replace(hand_graph("aten.gelu.default"), opaque=(("h.1.down", "model.py, line 3: data decides", 0.1),))
    s = analyse(graph)
    assert not any("down" in name for name in (*s.styles, *s.parameter_split))
    assert s.whole["h.1.down"] == "it is an opaque part"


def test_collectives_of_a_loop_over_time_steps_are_counted_once_a_step() -> None:
    graph = hand_graph("aten.gelu.default")
    cls = graph.classes[0]
    looped = replace(cls, ops=tuple(replace(op, repeat=5) for op in cls.ops))
    s = analyse(replace(graph, classes=(looped,)))
    assert [c.repeat for c in s.of_class(0).collectives if c.phase == "forward"] == [5]
