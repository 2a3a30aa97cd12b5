"""Which units and classes are found in models of many builds, and that folding and replay change no figure."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from torch import nn
from tpplan.planner.graph import ModelGraph
from tpplan.planner.signature import repeated_lists
from tpplan.planner.target import Target, load_target
from tpplan.planner.trace import trace

TEXT = {"vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **TEXT,
        **{"n_embd": 16, "n_layer": 6, "n_head": 4, "n_positions": 32, "attn_pdrop": 0.0},
    },
    "gemma3": {  # sliding attention, but each third layer full
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **TEXT,
        **SIZES,
        **{"num_hidden_layers": 9, "sliding_window": 4, "sliding_window_pattern": 3},
        "layer_types": [f"{'full' if i % 3 == 2 else 'sliding'}_attention" for i in range(9)],
    },
    "deepseek": {  # two dense layers, then experts
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **TEXT,
        **SIZES,
        **{"num_hidden_layers": 6, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 5, "num_heads": 4},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0},
    },
    "albert": {
        "architectures": ["AlbertForMaskedLM"],
        "model_type": "albert",
        **TEXT,
        **SIZES,
        **{"embedding_size": 8, "num_hidden_layers": 4, "attention_probs_dropout_prob": 0.0},
    },
    "swin": {  # stages of blocks; windows shifted in every second; another rate of stochastic depth in each
        "architectures": ["SwinForImageClassification"],
        "model_type": "swin",
        **{"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 6], "num_heads": [2, 2]},
        **{"window_size": 4, "drop_path_rate": 0.1, "attention_probs_dropout_prob": 0.0},
    },
}

HEAD = "import torch\nfrom torch import nn\n"
BLOCK = """
class Block(nn.Module):
    def __init__(self, dim, rate=0.0):
        super().__init__()
        self.rate = rate
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * dim, dim)
    def forward(self, x):
        return x + nn.functional.dropout(self.down(self.act(self.up(self.norm(x)))), self.rate)
def example_inputs(batch, seq):
    return torch.randn(batch, seq, 8)
"""
ATTRIBUTES = """
class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.h0, self.h1, self.h2 = Block(8), Block(8, 0.1), Block(8, 0.2)
        self.h3, self.h4, self.h5 = Block(8, 0.3), Block(8, 0.4), Block(8, 0.6)
    def forward(self, x):
        for i in range(6):
            x = getattr(self, f"h{i}")(x)
        return x
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = Tower()
        self.head = nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.tower(x)).pow(2).sum()
def build_model():
    return Net()
"""
PAIRED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        pairs = ([Block(8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())] for _ in range(6))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.scale = nn.Parameter(torch.ones(6, 8))
    def forward(self, x):
        seen = (x,)
        for i, (one, two) in enumerate(self.layers):
            x = one(x * self.scale[i])
            x = two(x) + x
            seen += (x,)
        self.seen = seen
        return x.pow(2).sum()
def build_model():
    return Net()
"""
LEVELS = """
class Level(nn.Module):
    def __init__(self, dim, up):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.change = nn.Linear(dim, dim)
        self.up = up
    def forward(self, x, skips):
        for block in self.blocks:
            if self.up:
                x = x + skips.pop()
            x = block(x)
            if not self.up:
                skips.append(x)
        return self.change(x).reshape(x.shape), skips
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.downs = nn.ModuleList(Level(8, False) for _ in range(2))
        self.middle = Block(8)
        self.ups = nn.ModuleList(Level(8, True) for _ in range(2))
    def forward(self, x):
        skips = []
        for down in self.downs:
            x, skips = down(x, skips)
        x = self.middle(x)
        for up in self.ups:
            x, skips = up(x, skips)
        return x.pow(2).sum()
def build_model():
    return Net()
"""
OWN = {"attributes": ATTRIBUTES, "paired": PAIRED, "levels": LEVELS}
FOLDER = Path(mkdtemp())


def target(name: str) -> tuple[Target, int]:
    place = FOLDER / name
    place.mkdir(exist_ok=True)
    if name in CONFIGS:
        (place / "config.json").write_text(json.dumps(CONFIGS[name]))
        return load_target(str(place / "config.json")), 32 if name == "swin" else 8
    (place / "own.py").write_text(HEAD + BLOCK + OWN[name])
    return load_target(str(place / "own.py")), 8


@cache
def folded(name: str) -> ModelGraph:
    found, seq = target(name)
    return trace(found, sequence_length=seq).verify()


def chain(graph: ModelGraph, inside: str) -> str:
    """Letters for classes in order of appearance, of the units whose FQN holds `inside`."""
    letters: dict[int, str] = {}
    units = [u for u in graph.units if inside in f".{u.fqn}."]
    return "".join(letters.setdefault(u.class_index, chr(ord("a") + len(letters))) for u in units)


@pytest.mark.parametrize(
    ("name", "inside", "classes"),
    [
        ("gpt2", ".h.", "aaaaaa"),
        ("gemma3", ".layers.", "aabaabaab"),
        ("deepseek", ".layers.", "aabbbb"),
        ("t5", ".encoder.block.", "abbbc"),  # the first computes the bias of all, the last adds no gradient of it
        ("t5", ".decoder.block.", "abbbc"),  # backward, the last adds no gradient of the encoder's result
        ("albert", ".albert_layer_groups.", "aaab"),  # backward, the last adds no gradients of the parameters
        ("swin", ".layers.1.blocks.", "ababab"),  # windows shifted in every second; rates of drop-path differ
        ("attributes", ".tower.", "abbbbb"),  # the first drops nothing
        ("paired", ".layers.", "abcbcbcbcbde"),  # the first has no gradient to pass on, the last is first in backward
        ("levels", ".downs.", "abcdbc"),  # no gradient of the input; the second level reshapes before
        ("levels", ".ups.", "aabcde"),
    ],
)
def test_equal_layers_are_one_class(name, inside, classes):
    assert chain(folded(name), inside) == classes


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "deepseek", "t5", "attributes", "paired"])
def test_layers_are_replayed(name):
    notes = folded(name).notes
    assert any("have the figures of an equal layer" in note for note in notes), notes


@pytest.mark.parametrize("name", [*CONFIGS, *OWN])
def test_folding_and_replay_change_no_figure(name):
    graph, (found, seq) = folded(name), target(name)
    full = trace(found, sequence_length=seq, full=True).verify()
    assert not any("have the figures" in note for note in full.notes)
    for one, other in zip(graph.units, full.units, strict=True):
        ours, theirs = graph.classes[one.class_index], full.classes[other.class_index]
        assert replace(one, class_index=0) == replace(other, class_index=0)
        assert replace(ours, index=0) == replace(theirs, index=0), one.fqn
    assert graph.summary(7) == full.summary(7)
    assert graph.hash == full.hash


def test_a_stage_is_cut_inside_and_between_levels():
    graph = folded("levels")
    ends = {unit.fqn: len(unit.wire) for unit in graph.units if unit.cut_after}
    assert ends["downs.0.change"] == 3  # the stream and two skips
    assert ends["downs.1.blocks.1"] == 4
    assert ends["middle"] == 5
    assert ends["ups.0.change"] == 3


def test_shared_layers_are_counted_once_and_named_by_all_users():
    graph = folded("albert")
    shared = [u for u in graph.units if "albert_layer_groups" in u.fqn]
    assert [u.call for u in shared] == [0, 1, 2, 3]
    for unit in shared:
        names = {p.fqn for p in graph.classes[unit.class_index].parameters}
        assert "albert_layers.0.ffn.weight" in names
    once = sum(p.numel for name, p in graph.parameters.items() if "albert_layer_groups" in name)
    assert once == sum(p.numel for p in graph.classes[shared[0].class_index].parameters)


class _Convolution(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU())


class _Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(_Convolution(width) for _ in range(3)))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.router = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)) for _ in range(8))


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)) for _ in range(3))


def test_stages_are_looked_into_but_blocks_are_not():
    model = nn.Module()
    model.stages = nn.Sequential(*(nn.Sequential(*(_Bottleneck(w) for _ in range(3))) for w in (2, 4)))
    model.blocks = nn.ModuleList(_Experts() for _ in range(4))
    model.mixtures = nn.ModuleList(_Mixture() for _ in range(2))
    found = {name: [len(g) for g in groups] for name, groups in repeated_lists(model).items()}
    assert found == {"stages.0": [3], "stages.1": [3], "blocks": [4], "mixtures": [2]}
