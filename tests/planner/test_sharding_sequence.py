"""The stream split along its tokens: what is exchanged, who works on a part, and what makes it impossible."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tpplan.planner.graph import Affine, ModelGraph
from tpplan.planner.sharding import Sharding, analyse, with_sequence_parallel
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace
from tpplan.planner.unit_costs import unit_memory

ROOT = Path(__file__).resolve().parents[2]
OWN = str(ROOT / "tests" / "runtime" / "tp_models.py")
LLAMA = str(ROOT / "examples" / "llama_tiny")
STREAM = Affine(0, 16 * 64 * 4)  # (batch, 16 tokens, 64 features) in float32


@cache
def traced(target: str, *args: tuple[str, str], seq: int = 16) -> tuple[ModelGraph, Sharding]:
    graph = trace(load_target(target, model_args=dict(args)), sequence_length=seq, precision="fp32")
    return graph, analyse(graph)


def test_a_llama_layer_gathers_before_projections_and_scatters_after_them() -> None:
    graph, whole = traced(LLAMA)
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    index = next(u.class_index for u in graph.units if u.fqn == "model.layers.0")
    layer = split.of_class(index)
    found = sorted((c.phase, c.collective, c.module.partition(".")[0], c.bytes) for c in layer.collectives)
    assert found == [
        (phase, collective, module, STREAM)
        for phase in ("backward", "forward")
        for collective in ("all_gather", "reduce_scatter")
        for module in ("mlp", "self_attn")
    ]
    norms = [c for c in layer.gradient_sums if c.bytes == Affine(64 * 4)]
    assert [c.module.rsplit(".", 2)[1] for c in norms] == ["input_layernorm", "post_attention_layernorm"]


def test_the_split_costs_the_bytes_of_the_all_reduces_it_replaces() -> None:
    graph, whole = traced(LLAMA)
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    shares = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # of (tp - 1) / tp of the tensor
    layer = next(u.class_index for u in graph.units if u.fqn == "model.layers.0")
    moved = [sum(shares[c.collective] * c.bytes.at(1) for c in s.of_class(layer).collectives) for s in (whole, split)]
    assert moved[0] == moved[1]


def test_norms_and_sums_run_on_and_keep_a_part_of_the_tokens() -> None:
    graph, whole = traced(LLAMA)
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    index = next(u.class_index for u in graph.units if u.fqn == "model.layers.1")
    cls, before, after = graph.classes[index], whole.of_class(index), split.of_class(index)
    for op in cls.ops:
        stream = op.fqn.endswith("norm") or (op.fqn == "" and op.name.startswith("aten.add"))
        if stream and op.forward.kind != "free":
            assert (before.op_split[op.index], after.op_split[op.index]) == (None, "elements"), op
        elif before.op_split[op.index] is not None:
            assert after.op_split[op.index] == before.op_split[op.index]
    assert after.tensor_split[cls.inputs[0]]
    assert after.tensor_split[cls.outputs[0]]
    # The two norm outputs are gathered, and kept whole for the weight gradients of the projections.
    assert len(after.gathered) == 2
    assert not any(after.tensor_split[t] for t in after.gathered)
    kept = [unit_memory(cls, s, 2, 1, frozenset(), False).none for s in (before, after)]
    assert kept[1] < kept[0]
    assert with_sequence_parallel(graph, whole) == split


def test_borders_of_the_stretch_are_counted_with_the_units_outside() -> None:
    graph, whole = traced(LLAMA)
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    extra = {
        unit.fqn: [
            (c.phase, c.collective) for c in set(split.of_class(i).collectives) - set(whole.of_class(i).collectives)
        ]
        for unit in graph.units
        if not unit.fqn.startswith("model.layers")
        for i in [unit.class_index]
    }
    assert {fqn: found for fqn, found in extra.items() if found} == {
        "model.embed_tokens": [("backward", "all_gather")],
        "model.norm": [("forward", "all_gather")],
    }
    assert split.sequence.ends == ("model.layers.3",)
    layers = [u.position for u in graph.units if u.fqn.startswith("model.layers")]
    assert split.sequence.streams == {(position, 0) for position in layers[:-1]}


def test_tp_must_divide_the_tokens() -> None:
    graph, whole = traced(LLAMA, seq=18)
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    assert whole.degrees_allowed(8) == [1, 2, 4]
    assert split.degrees_allowed(8) == [1, 2]


def test_row_layers_say_that_they_scatter() -> None:
    graph, whole = traced(str(ROOT / "examples" / "bert_tiny"))
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    block = "bert.encoder.layer.1"
    assert {f for f, s in split.styles.items() if s.output == "sequence" and f.startswith(block)} == {
        f"{block}.attention.output.dense",
        f"{block}.output.dense",
    }
    assert split.parameter_split == whole.parameter_split
    assert whole.styles[f"{block}.output.dense"].output == "replicate"


def test_what_cannot_run_on_a_part_of_the_tokens_runs_whole() -> None:
    graph, whole = traced(OWN, ("kind", "adapters"))  # low-rank adapters: whole layers beside the projections
    split = with_sequence_parallel(graph, whole)
    assert split is not None
    assert split.sequence.islands == {"h.0.attn", "h.1.attn"}
    assert (split.styles["h.1.attn"].style, split.styles["h.1.attn"].output) == ("replicate", "sequence")
    assert split.styles["h.1.attn.wo.base"].output == "replicate"
    assert split.styles["h.1.mlp.2"].output == "sequence"
    index = next(u.class_index for u in graph.units if u.fqn == "h.1")
    found = {(c.phase, c.collective, c.module) for c in split.of_class(index).collectives}
    assert {("forward", "all_gather", "attn"), ("backward", "all_gather", "attn")} <= found
    kept = {(c.collective, c.module) for c in whole.of_class(index).collectives if c.module.startswith("attn.")}
    assert kept <= {(collective, module) for _, collective, module in found}


FLATTENED = """
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, x):
        flat = x.reshape(-1, 32)
        return (flat + self.down(F.gelu(self.up(self.norm(flat))))).view(x.shape)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

def build_model():
    return Model()

def example_inputs(batch, seq, model):
    tokens = torch.randint(0, 64, (batch, seq))
    return {"input_ids": tokens, "labels": tokens}
"""


def test_what_makes_it_impossible_is_said(tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(FLATTENED)
    cases = {
        str(tmp_path / "flat.py"): "layers.0: view is not run on a part of the tokens",
        str(ROOT / "examples" / "resnet.py"): "no row layer's sum can be scattered along the tokens",
    }
    for target, reason in cases.items():
        args = (("depth", "18"), ("width", "8")) if "resnet" in target else ()
        graph, whole = traced(target, *args, seq=32)
        assert with_sequence_parallel(graph, whole) is None
        assert whole.sequence.reason.endswith(reason)
