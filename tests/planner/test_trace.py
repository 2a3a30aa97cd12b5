"""What the tracer finds in models: units, classes, cuts, ties, replay, and what it says when it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import tpplan
from tpplan.errors import ModelError
from tpplan.planner.graph import Affine, ModelGraph
from tpplan.planner.graph_view import absolute, layer_table
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

EXAMPLES = Path(tpplan.__file__).parent / "examples"
SMALL = {
    "nanogpt.py": ({"n_layer": "5", "n_head": "4", "n_embd": "32", "vocab_size": "128"}, 16),
    "llama_tiny/config.json": ({}, 32),
    "bert_tiny/config.json": ({}, 32),
    "resnet.py": ({"depth": "50", "width": "8", "num_classes": "10"}, 64),
    "lora.py": ({"vocab_size": "64", "n_layer": "5", "n_head": "4", "n_embd": "32"}, 16),
}


def example(spec: str, precision: str = "bf16", full: bool = False, **args: str) -> ModelGraph:
    defaults, seq = SMALL[spec]
    target = load_target(str(EXAMPLES / spec), model_args={**defaults, **args})
    return trace(target, sequence_length=seq, precision=precision, full=full)


@pytest.fixture(scope="module")
def nanogpt() -> ModelGraph:
    return example("nanogpt.py")


@pytest.fixture(scope="module")
def llama() -> ModelGraph:
    return example("llama_tiny/config.json")


def model(tmp_path: Path, text: str) -> ModelGraph:
    path = tmp_path / "own.py"
    path.write_text("import torch\nfrom torch import nn\n" + text)
    return trace(load_target(str(path)), sequence_length=8, precision="fp32")


@pytest.mark.parametrize("spec", SMALL)
def test_replayed_trace_equals_the_full_one(spec):
    folded, full = example(spec), example(spec, full=True)
    assert any("repeated layers" in note for note in folded.notes)
    assert folded.hash == full.hash
    assert folded.classes == full.classes
    assert folded.summary(7) == full.summary(7)
    folded.verify()


def test_blocks_are_one_class(nanogpt, llama):
    for graph, kind, count in ((nanogpt, "Block", 5), (llama, "LlamaDecoderLayer", 4)):
        rows = {row["module"]: row for row in layer_table(graph, 2)}
        assert rows[kind]["count"] == count
        assert sum(row["module"] == kind for row in layer_table(graph, 2)) == 1


def test_405b_is_five_classes():
    target = load_target(str(EXAMPLES / "llama3_405b" / "config.json"))
    graph = trace(target, sequence_length=4096, precision="bf16").verify()
    assert graph.parameter_count == 405_853_388_800
    assert [row["count"] for row in layer_table(graph, 1)] == [1, 1, 126, 1, 1]


def test_chain_of_a_llama(llama):
    fqns = [unit.fqn for unit in llama.units]
    layers = [f"model.layers.{i}" for i in range(4)]
    assert fqns == ["model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head"]
    assert [unit.fqn for unit in llama.units if unit.replicated] == ["model.rotary_emb"]
    assert [unit.fqn for unit in llama.units if not unit.cut_after] == ["model.rotary_emb", "lm_head"]
    assert llama.units[3].wire == ((3, 0),)  # the residual stream alone; rotary tables are everywhere
    assert llama.units[3].output_leaves == (("model.layers.1", 0, 0),)
    assert "model.layers.2.mlp.up_proj" in llama.units[4].modules  # a replayed layer


def test_rotary_tables_are_counted_once(llama):
    tables = 2 * 32 * 8 * 2  # cos and sin: 32 tokens, 8 numbers, 2 bytes
    assert llama.units[3].shared_saved == ((2, Affine(tables, 0)),)
    apart = sum((llama.classes[u.class_index].saved_bytes.base for u in llama.units), 0)
    assert llama.saved_bytes.base == apart - 3 * tables


def test_attention_is_one_operator(llama):
    block = llama.classes[llama.units[2].class_index]
    (op,) = [op for op in block.ops if op.forward.kind == "attention"]
    batch, heads, kv_heads, q_len, kv_len, head_dim, causal = (d.at(6) for d in op.forward.dims)
    assert (batch, heads, kv_heads, q_len, kv_len, head_dim, causal) == (6, 8, 4, 32, 32, 8, 1)
    assert op.forward.flops.at(6) == 4 * 6 * 8 * 32 * 32 * 8
    (backward,) = [k for k in op.backward if k.kind == "attention"]
    assert backward.flops.at(6) == 2.5 * op.forward.flops.at(6)


def test_linear_backward_kernels_say_what_they_compute(llama):
    block = llama.classes[llama.units[2].class_index]
    for op in block.ops:
        if op.forward.kind == "gemm":
            assert sorted(k.wrt for k in op.backward if k.kind == "gemm") == ["input", "weight"]
            _, m, n, k = (d.at(2) for d in op.forward.dims)
            dims = {b.wrt: tuple(d.at(2) for d in b.dims[1:]) for b in op.backward if b.kind == "gemm"}
            assert dims["input"] == (m, k, n)
            assert sorted(dims["weight"]) == sorted((m, k, n))


def test_tied_parameter_is_one_parameter_of_two_units(nanogpt):
    assert nanogpt.tied == (("transformer.wte.weight", "lm_head.weight"),)
    first, last = nanogpt.units[0], nanogpt.units[-1]
    names = [
        {absolute(p.fqn, unit.fqn) for p in nanogpt.classes[unit.class_index].parameters} for unit in (first, last)
    ]
    assert "transformer.wte.weight" in names[0] & names[1]
    assert nanogpt.unused == ()


def test_masters_keep_their_dtype_and_compute_is_bf16(nanogpt):
    assert {p.dtype for p in nanogpt.parameters.values()} == {"float32"}
    block = nanogpt.classes[nanogpt.units[3].class_index]
    assert {t.dtype for t in block.tensors if t.kind == "parameter"} == {"bfloat16"}


def test_precision_halves_what_is_saved():
    bf16, fp32 = example("nanogpt.py"), example("nanogpt.py", "fp32")
    block = [g.classes[g.units[3].class_index].saved_bytes.at(1) for g in (bf16, fp32)]
    assert block[0] < 0.6 * block[1]
    assert bf16.flops_forward == fp32.flops_forward


def test_batch_norm_is_listed():
    graph = example("resnet.py")
    assert "stem.1" in graph.batch_norm
    assert len(graph.batch_norm) == 53


def test_networkx_view(llama):
    view = llama.graph
    assert nx.is_directed_acyclic_graph(view)
    assert view.number_of_nodes() == sum(len(llama.classes[u.class_index].ops) for u in llama.units)
    flops = sum(data["flops_forward"].at(3) for _, data in view.nodes(data=True))
    assert flops == llama.flops_forward.at(3)
    up = next(n for n, d in view.nodes(data=True) if d["fqn"] == "model.layers.2.mlp.up_proj" and d["kind"] == "gemm")
    norm = {d["fqn"] for n, d in view.nodes(data=True) if n in nx.ancestors(view, up)}
    assert "model.layers.2.post_attention_layernorm" in norm
    assert "model.layers.1.mlp.down_proj" in norm
    assert "model.layers.3.mlp.up_proj" not in norm


def test_verify_finds_damage(nanogpt):
    cls = nanogpt.classes[3]
    swapped = (cls.ops[1], cls.ops[0], *cls.ops[2:])
    classes = (*nanogpt.classes[:3], replace(cls, ops=swapped), *nanogpt.classes[4:])
    with pytest.raises(ValueError, match="before it is made"):
        replace(nanogpt, classes=classes).verify()
    late = replace(nanogpt.units[3], sources=((9, 0),))
    with pytest.raises(ValueError, match="runs later"):
        replace(nanogpt, units=(*nanogpt.units[:3], late, *nanogpt.units[4:])).verify()


def test_hash_follows_the_model(nanogpt):
    assert nanogpt.hash == example("nanogpt.py").hash
    assert nanogpt.hash != example("nanogpt.py", vocab_size="120").hash


SKIP = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        self.side = torch.tanh(self.a(x))
        return x + self.side
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.head = nn.Linear(8, 1)
        self.spare = nn.Linear(8, 8)
    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x{side}).mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""


def test_unused_parameters_are_named(tmp_path):
    graph = model(tmp_path, SKIP.replace("{side}", ""))
    assert graph.unused == ("spare.weight", "spare.bias")
    assert any("never used" in note for note in graph.notes)


def test_a_tensor_that_slips_out_of_a_block_turns_replay_off_and_cuts_illegal(tmp_path):
    graph = model(tmp_path, SKIP.replace("{side}", " + self.blocks[3].side"))
    assert any(note.startswith("every repeated layer was traced") for note in graph.notes)
    assert [u.fqn for u in graph.units if u.cut_after] == ["blocks.0", "blocks.1", "blocks.2"]


PAIRS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        y = self.a(x)
        scores = y @ y.t()
        {more}
        return scores.mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, 8)
"""


def test_samples_compared_in_pairs_have_quadratic_figures(tmp_path):
    graph = model(tmp_path, PAIRS.replace("{more}", "")).verify()
    (cls,) = graph.classes
    (scores,) = [op for op in cls.ops if op.name == "aten.mm.default"]
    assert cls.tensors[scores.outputs[0]].shape == (Affine(0, 1), Affine(0, 1))
    assert scores.forward.flops == Affine(0, 0, 2 * 8)
    assert cls.flops_forward == Affine(0, 2 * 8 * 8, 2 * 8)
    assert graph.traced_batches == (2, 3, 5, 7)
    assert any("compared in pairs" in note for note in graph.notes)


def test_operator_that_grows_with_the_cube_of_the_batch_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"aten\.mm\.default .* grows neither linearly nor with the square"):
        model(tmp_path, PAIRS.replace("{more}", "scores = scores @ scores"))


def test_failing_forward_names_the_line(tmp_path):
    text = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return self.a(x[..., :5]).mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, 8)
"""
    with pytest.raises(ModelError, match=r"own\.py, line 9: RuntimeError"):
        model(tmp_path, text)


def test_a_branch_that_data_chooses_is_traced_and_noted(tmp_path):
    text = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        y = self.a(x)
        if y.abs().sum().item() >= 0:
            y = y * 2
        return y.mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, 8)
"""
    graph = model(tmp_path, text)
    (note,) = graph.notes
    assert note.startswith("own.py, line 10 (own): a number computed from data steers the code")
    assert graph.captured
    assert graph.flops_forward.at(3) == 2 * 3 * 8 * 8


def test_detached_loss_is_refused(tmp_path):
    text = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return self.a(x).mean().detach()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, 8)
"""
    with pytest.raises(ModelError, match="no trainable parameter"):
        model(tmp_path, text)


LEARNED_MASK = """
import torch.nn.functional as F
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mask = nn.Parameter(torch.zeros(8, 8, 4))
    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 8, 3, 4, 4).permute(2, 0, 3, 1, 4)
        mask = self.mask.permute(2, 0, 1).unsqueeze(0)MAYBE
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1).square().mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 16)
"""


def test_attention_with_a_contiguous_learned_mask_stays_whole(tmp_path):
    (cls,) = model(tmp_path, LEARNED_MASK.replace("MAYBE", ".contiguous()")).classes
    (op,) = [op for op in cls.ops if op.forward.kind == "attention"]
    assert op.forward.flops.at(3) == 4 * 3 * 4 * 8 * 8 * 4
    assert [kernel.kind for kernel in op.backward].count("attention") == 1


def test_attention_with_a_permuted_learned_mask_is_products_and_a_softmax_in_float32(tmp_path):
    (cls,) = model(tmp_path, LEARNED_MASK.replace("MAYBE", "")).classes
    names = [op.name.split(".")[1] for op in cls.ops]
    assert [n for n in names if n in ("bmm", "_safe_softmax", "native_dropout")] == [
        "bmm",
        "_safe_softmax",
        "native_dropout",
        "bmm",
    ]
    scores = next(op for op in cls.ops if "_safe_softmax" in op.name)
    assert cls.tensors[scores.outputs[0]].dtype == "float32"
    (mask,) = [t for op in cls.ops if "native_dropout" in op.name for t in op.saved]
    assert cls.tensors[mask].dtype == "bool"


def test_attention_with_narrow_values_stays_whole(tmp_path):
    text = """
import torch.nn.functional as F
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(16, 2 * 4 * 6)
        self.v = nn.Linear(16, 16)
        self.register_buffer("mask", torch.zeros(1, 4, 8, 8))
    def forward(self, x):
        q, k = self.qk(x).view(len(x), 8, 8, 6).transpose(1, 2).chunk(2, dim=1)
        v = self.v(x).view(len(x), 8, 4, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=0.1)
        return x + y.transpose(1, 2).reshape(x.shape)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 16)
"""
    graph = model(tmp_path, text)
    block = graph.classes[graph.units[1].class_index]
    (op,) = [op for op in block.ops if op.forward.kind == "attention"]
    assert op.forward.flops.at(2) == 2 * 2 * 4 * 8 * 8 * (6 + 4)
    assert [k.flops.at(2) for k in op.backward if k.kind == "attention"] == [2 * 2 * 4 * 8 * 8 * (3 * 6 + 2 * 4)]
    assert not any(t.shape[-2:] == (Affine(8), Affine(8)) and t.kind == "activation" for t in block.tensors)
    assert graph.notes[0].startswith("2 repeated layers")
    assert any("dropout" in note for note in graph.notes)


def test_routing_by_data_is_traced_and_listed_as_opaque(tmp_path):
    text = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    def forward(self, x):
        rows = x.reshape(-1, 8)
        weight, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero().squeeze(-1)
            out = out.index_add(0, mine, expert(rows[mine]) * weight[mine, None])
        return x + out.view_as(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()
def build_model():
    return Net()
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""
    graph = model(tmp_path, text).verify()
    assert [fqn for fqn, _, _ in graph.opaque] == ["blocks.0", "blocks.1", "blocks.2"]
    assert sum(share for _, _, share in graph.opaque) == pytest.approx(1)
    assert not graph.captured
    assert graph.opaque[0][1].startswith("own.py, line 14: nonzero makes sizes of data")
    tokens = 4 * 8
    assert graph.flops_forward.at(4) == pytest.approx(3 * 2 * tokens * (8 * 8 + 8 * 4), rel=0.15)
    assert graph.hash == model(tmp_path, text).hash
