"""The model target: which model a spec names, how it is built, fed, and where its loss is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
import torch
from torch import nn
from tpplan.planner.construct import build_on_meta
from tpplan.planner.inputs import Inputs, draw, take
from tpplan.planner.losses import find_loss
from tpplan.planner.target import Target, load_target

HEAD = "import torch\nfrom torch import nn\n"
LINEAR_HOOKS = """
def example_inputs(batch, seq):
    return torch.randn(batch, 4)
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write a model file and return its path as a user would type it."""

    def _write(text: str, name: str = "model.py") -> str:
        path = tmp_path / name
        path.write_text(HEAD + dedent(text))
        return str(path)

    return _write


def step(target: Target, batch: int = 2, seq: int = 8) -> torch.Tensor:
    """The loss of one forward of the real model, after a backward that must work."""
    torch.manual_seed(0)
    model = target.build("cpu")
    inputs = target.example_inputs(model, batch, seq)
    loss = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
    assert loss.ndim == 0
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    return loss.detach()


@pytest.mark.parametrize(
    ("text", "attribute", "expected"),
    [
        ("def build_model():\n    return nn.Linear(4, 2)\nmodel = nn.Linear(4, 3)", "", "Linear"),
        ("def get_model(width=2):\n    return nn.Linear(4, width)\nclass Net(nn.Module): pass", "", "Linear"),
        ("model = nn.Sequential(nn.Linear(4, 2))", "", "Sequential"),
        ("criterion = nn.CrossEntropyLoss()\nnet = nn.Linear(4, 2)", "", "Linear"),
        ("part = nn.Linear(4, 2)\nwhole = nn.Sequential(part)", "", "Sequential"),
        ("class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 2)", "", "Net"),
        ("a = nn.Linear(4, 2)\nb = nn.Sequential(nn.Linear(4, 2))", "b", "Sequential"),
        ("class ns:\n    net = nn.Linear(4, 2)", "ns.net", "Linear"),
    ],
)
def test_which_model_a_file_means(write, text: str, attribute: str, expected: str) -> None:
    spec = write(text)
    target = load_target(f"{spec}:{attribute}" if attribute else spec)
    assert type(target.build("meta")).__name__ == expected
    assert target.name == (f"model:{attribute}" if attribute else "model")
    assert target.kind == "file"


def test_the_root_class_is_the_one_no_other_builds_or_inherits(write) -> None:
    spec = write(
        """
        class Base(nn.Module):
            pass
        class Leaf(Base):
            def __init__(self):
                super().__init__()
                self.w = nn.Linear(4, 4)
        def make_leaves(n):
            return [Leaf() for _ in range(n)]
        class Net(Base):
            def __init__(self, n=3):
                super().__init__()
                self.leaves = nn.ModuleList(make_leaves(n))
        """
    )
    model = load_target(spec, model_args={"n": "5"}).build("meta")
    assert type(model).__name__ == "Net"
    assert len(model.leaves) == 5


def test_model_args_are_literals_or_strings(write) -> None:
    spec = write(
        """
        def build_model(width, names=(), kind="x"):
            model = nn.Linear(4, width)
            model.seen = (width, names, kind)
            return model
        """
    )
    target = load_target(spec, model_args={"width": "3", "names": "['a', 1]", "kind": "gelu_new"})
    assert target.build("meta").seen == (3, ["a", 1], "gelu_new")
    assert target.model_args == {"width": "3", "names": "['a', 1]", "kind": "gelu_new"}


def test_a_module_on_the_path_and_its_attribute() -> None:
    target = load_target("torch.nn:Linear", model_args={"in_features": 4, "out_features": 2})
    assert target.kind == "module"
    assert sum(p.numel() for p in target.build("meta").parameters()) == 10


def test_neighbouring_files_can_be_imported(write, capfd) -> None:
    write("WIDTH = 7", "sizes_of_neighbour.py")
    spec = write(
        """
        print("loading")
        from sizes_of_neighbour import WIDTH
        def build_model():
            print("building")
            return nn.Linear(4, WIDTH)
        """
    )
    path_before = list(sys.path)
    assert load_target(spec).build("meta").out_features == 7
    assert sys.path == path_before
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "loading" in captured.err
    assert "building" in captured.err


def test_meta_costs_no_memory_and_keeps_ties_and_buffers(write) -> None:
    spec = write(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4, bias=False)
                self.b = nn.Linear(4, 4, bias=False)
                self.b.weight = self.a.weight
                self.register_buffer("table", torch.arange(4.0), persistent=False)
        """
    )
    target = load_target(spec)
    model = target.build("meta")
    assert model.a.weight is model.b.weight
    assert model.a.weight.is_meta
    assert model.table.is_meta
    assert target.notes == ()
    assert not target.build("cpu").a.weight.is_meta


REFUSES_META = """
class Net(nn.Module):
    def __init__(self, n=4, width=4):
        super().__init__()
        rates = [r.item() for r in torch.linspace(0, 1, n)]
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in rates)
        self.layers[1].weight = self.layers[0].weight
        self.frozen = nn.Parameter(torch.ones(width, width), requires_grad=False)
        self.register_buffer("table", torch.tensor(rates))
"""


def test_a_constructor_that_refuses_meta_runs_with_parameters_there(write) -> None:
    target = load_target(write(REFUSES_META))
    register = nn.Module.register_parameter
    model = target.build("meta")
    assert nn.Module.register_parameter is register
    assert all(p.is_meta for p in model.parameters())
    assert model.layers[0].weight is model.layers[1].weight
    assert not model.frozen.requires_grad
    assert torch.equal(model.table, torch.linspace(0, 1, 4))
    target.build("meta")
    assert len(target.notes) == 1
    assert "fails on the meta device" in target.notes[0]
    real = target.build("cpu")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_a_constructor_that_refuses_meta_holds_one_parameter_at_a_time() -> None:
    resident_bytes = []

    def parameters() -> Iterator[nn.Parameter]:
        for _ in range(12):
            yield nn.Parameter(torch.ones(16 * 2**20))  # 64 MiB: what is freed goes back to the system
            resident_bytes.append(psutil.Process().memory_info().rss)

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            float(torch.zeros(()))  # refuses meta
            self.weights = nn.ParameterList(parameters())

    model, note = build_on_meta(Heavy)
    assert "only the parameters on meta" in note
    assert sum(p.numel() for p in model.parameters()) == 192 * 2**20
    assert max(resident_bytes) - resident_bytes[0] < 128 * 2**20  # of 768 MiB


def test_a_constructor_that_looks_at_its_weights_is_copied_to_meta(write) -> None:
    spec = write(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)
                self.b = self.a
                if self.a.weight.abs().max().item() > 10:
                    raise ValueError
        """
    )
    target = load_target(spec)
    model = target.build("meta")
    assert all(p.is_meta for p in model.parameters())
    assert model.a is model.b
    assert "whole model in memory" in target.notes[0]


def test_what_a_factory_keeps_stays_real(write) -> None:
    spec = write("kept = nn.Linear(4, 2)\ndef build_model():\n    return kept")
    target = load_target(spec)
    assert target.build("meta").weight.is_meta
    assert not target.build("cpu").weight.is_meta


def test_an_instance_is_made_anew_under_the_callers_seed(write) -> None:
    target = load_target(write("model = nn.Linear(4, 2)" + LINEAR_HOOKS))
    assert target.build("meta").weight.is_meta
    torch.manual_seed(3)
    first = target.build("cpu")
    torch.manual_seed(3)
    second = target.build("cpu")
    torch.manual_seed(3)
    own = nn.Linear(4, 2)
    assert first is not second
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, own.weight)


def test_the_same_seed_gives_the_users_own_weights(examples: Path) -> None:
    """nanogpt's scaled init of c_proj and lora's rotary buffers are those of the file's own constructor."""
    target = load_target(
        str(examples / "nanogpt.py"), model_args={"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 512}
    )
    torch.manual_seed(1)
    model = target.build("cpu")
    assert model.transformer["h"][0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    lora = load_target(str(examples / "lora.py"), model_args={"n_layer": 1, "n_embd": 16, "n_head": 2}).build("cpu")
    cos = lora.layers[0].attention.rotary.cos
    assert torch.equal(cos[0], torch.ones(4))
    assert "layers.0.attention.rotary.cos" not in lora.state_dict()


@pytest.fixture
def examples() -> Path:
    return Path(__file__).resolve().parents[2] / "examples"


TINY = {"n_layer": "2", "n_embd": "32", "n_head": "4", "vocab_size": "64", "block_size": "16"}


@pytest.mark.parametrize(
    ("name", "model_args", "side", "weighting"),
    [
        ("nanogpt.py", TINY, 16, "equal"),
        ("lora.py", TINY, 16, "tokens"),
        ("resnet.py", {"depth": "18", "width": "4", "num_classes": "10"}, 32, "equal"),
        ("llama_tiny", {}, 16, "tokens"),
        ("bert_tiny", {}, 16, "equal"),
    ],
)
def test_every_example_trains_at_a_tiny_size(
    examples: Path, name: str, model_args: dict[str, str], side: int, weighting: str
) -> None:
    target = load_target(str(examples / name), model_args=model_args)
    loss = step(target, seq=side)
    assert loss.isfinite()
    assert target.loss_weighting == weighting


@pytest.mark.parametrize(
    ("name", "parameters", "length"),
    [
        ("nanogpt.py", 124_475_904, 1024),
        ("resnet.py", 25_557_032, 224),
        ("llama_1b", 1_235_814_400, 4096),
        ("llama3_8b", 8_030_261_248, 4096),
        ("llama3_70b", 70_553_706_496, 4096),
        ("llama3_405b", 405_853_388_800, 4096),
        ("bert_base/config.json", 109_514_298, 512),
    ],
)
def test_published_sizes(examples: Path, name: str, parameters: int, length: int) -> None:
    target = load_target(str(examples / name))
    model = target.build("meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert target.default_sequence_length() == length


def test_lora_trains_only_its_adapters(examples: Path) -> None:
    model = load_target(str(examples / "lora.py"), model_args=TINY).build("meta")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4 * 2
    assert all(".lora_" in name for name in trainable)


def test_config_overrides_and_float32_masters(examples: Path) -> None:
    target = load_target(str(examples / "llama_tiny"), model_args={"num_hidden_layers": "2"})
    model = target.build("meta")
    assert len(model.model.layers) == 2
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_hf_loss_is_a_sum_over_all_targets(examples: Path) -> None:
    """Halves of a batch with unequal ignored labels add up to the whole, as the runtime needs it."""
    target = load_target(str(examples / "llama_tiny"))
    torch.manual_seed(0)
    model = target.build("cpu").double()
    inputs = target.example_inputs(model, 4, 12)
    inputs.kwargs["labels"][0, :9] = -100
    count = target.count_targets(inputs)
    assert count == 4 * 11 - 8
    extra = target.forward_kwargs(torch.tensor(count))

    def loss(part: Inputs) -> torch.Tensor:
        return target.loss(model(**part.kwargs, **extra), part)

    halves = loss(take(inputs, 0, 2)) + loss(take(inputs, 2, 4))
    assert torch.allclose(halves, loss(inputs), rtol=1e-6)
    assert torch.allclose(loss(inputs), model(**inputs.kwargs).loss, rtol=1e-6)


def test_loss_fn_with_a_global_count(examples: Path) -> None:
    target = load_target(str(examples / "lora.py"), model_args=TINY)
    torch.manual_seed(0)
    model = target.build("cpu")
    inputs = target.example_inputs(model, 4, 8)
    assert set(inputs.kwargs) == {"tokens"}
    assert set(inputs.extra) == {"labels"}
    inputs.extra["labels"][0, :5] = -100
    count = target.count_targets(inputs)
    assert count == 27
    assert target.forward_kwargs(count) == {}
    parts = [take(inputs, 0, 1), take(inputs, 1, 4)]
    total = sum(target.loss(model(*p.args, **p.kwargs), p, count) for p in parts)
    assert torch.allclose(total, target.loss(model(*inputs.args, **inputs.kwargs), inputs), rtol=1e-5)


def test_hooks_may_take_tuples_tensors_and_the_model(write) -> None:
    spec = write(
        """
        model = nn.Linear(4, 2)
        def example_inputs(batch, seq, model):
            return torch.randn(batch, model.in_features), torch.randint(0, 2, (batch,))
        def loss_fn(output, inputs, num_items_in_batch=None):
            x, y = inputs
            loss = nn.functional.cross_entropy(output, y, reduction="sum")
            return loss / (num_items_in_batch or len(y))
        def count_targets(inputs):
            return len(inputs[1])
        """
    )
    target = load_target(spec)
    assert step(target) > 0
    inputs = target.example_inputs(target.build("meta"), 3, 8)
    assert [len(inputs.args), list(inputs.extra)] == [1, ["1"]]
    assert target.count_targets(inputs) == 3
    assert target.loss_description == "loss_fn of model"


@pytest.mark.parametrize(
    ("output", "expected", "words"),
    [
        ({"loss": torch.tensor(2.0), "logits": torch.ones(3)}, 2.0, "output.loss"),
        (torch.tensor(3.0), 3.0, "0-dim output"),
        ((torch.ones(2), None, torch.tensor(4.0)), 4.0, "0-dim tensor"),
        ((torch.ones(2, dtype=torch.int64), torch.full((2, 2), 3.0, dtype=torch.bfloat16)), 9.0, "mean of squares"),
    ],
)
def test_where_a_loss_is_found(output: object, expected: float, words: str) -> None:
    loss, description = find_loss(output)
    assert loss.item() == expected
    assert loss.ndim == 0
    assert words in description


def test_loss_attribute_comes_before_other_scalars() -> None:
    class Output:
        loss = torch.tensor(5.0)
        other = torch.tensor(1.0)

    assert find_loss(Output())[0].item() == 5.0


def test_input_specs_are_keywords_positions_or_for_the_loss(write) -> None:
    spec = write(
        """
        class Net(nn.Linear):
            def __init__(self):
                super().__init__(4, 2)
            def forward(self, x, scale=None):
                return super().forward(x)
        def loss_fn(output, inputs):
            return nn.functional.cross_entropy(output, inputs["y"])
        """
    )
    target = load_target(spec, inputs=["x=float32[B,S]", "y=int64[B]<2"])
    torch.manual_seed(0)
    inputs = target.example_inputs(target.build("meta"), 3, 4)
    assert inputs.kwargs["x"].shape == (3, 4)
    assert inputs.extra["y"].tolist() == inputs.as_user()["y"].tolist()
    assert step(target, seq=4) > 0
    unnamed = load_target(spec, inputs=["bfloat16[B,4]"]).example_inputs(target.build("meta"), 2, 8)
    assert unnamed.args[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("ids=int64[B,S]<32000", (2, 8), torch.int64),
        ("x=float32[B, 3, S*2, S // 4]", (2, 3, 16, 2), torch.float32),
        ("m=bool[B,S+1]", (2, 9), torch.bool),
        ("t=torch.uint8[B]<10", (2,), torch.uint8),
        ("h=float16[1]", (1,), torch.float16),
        ("s=float64[]", (), torch.float64),
    ],
)
def test_input_spec_forms(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, tensor = draw(text, batch=2, seq=8)
    assert tuple(tensor.shape) == shape
    assert tensor.dtype == dtype
    assert not tensor.is_meta


def test_a_batch_can_be_cut(examples: Path) -> None:
    target = load_target(str(examples / "resnet.py"), model_args={"depth": 18, "width": 4})
    batch = target.example_inputs(target.build("meta"), 3, 32)
    part = take(batch, 1, 3)
    assert part.kwargs["images"].shape == (2, 3, 32, 32)
    assert torch.equal(part.extra["labels"], batch.extra["labels"][1:])
    assert part.structure == "dict"
    assert list(part.tensors()) == ["images", "labels"]


def test_a_configuration_dataclass_is_made_from_its_defaults(write) -> None:
    """A file as its users write it: the model takes a config and nothing else."""
    spec = write(
        """
        from dataclasses import dataclass
        @dataclass
        class Config:
            width: int = 4
            depth: int = 2
        class Net(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.config = config
                self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        """
    )
    target = load_target(spec, model_args={"depth": "3"})
    assert len(target.build("meta").layers) == 3
    assert target.notes == ("Net was given config=Config(depth=3), its defaults for the rest.",)


def test_hash_follows_the_content_not_the_place(write, tmp_path: Path) -> None:
    first = load_target(write("model = nn.Linear(4, 2)", "one.py"))
    assert load_target(write("model = nn.Linear(4, 2)", "two.py")).source_hash == first.source_hash
    assert load_target(write("model = nn.Linear(4, 3)", "one.py")).source_hash != first.source_hash
    plain = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (tmp_path / "other.json").write_text(json.dumps(dict(reversed(plain.items())), indent=4))
    assert load_target(str(tmp_path)).source_hash == load_target(str(tmp_path / "other.json")).source_hash


def test_sequence_defaults(write, tmp_path: Path) -> None:
    stated = load_target(write("model = nn.Linear(4, 2)\ndef example_inputs(batch, seq=77):\n    return None"))
    assert stated.sequence_default().length == 77
    nothing = load_target(write("model = nn.Linear(4, 2)", "b.py")).sequence_default()
    assert (nothing.length, nothing.source) == (4096, "the model names no maximum")
    images = load_target(write("model = nn.Conv2d(3, 4, 3)", "c.py")).sequence_default()
    assert (images.length, images.meaning) == (224, "side")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    vit = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 64, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(vit))
    assert load_target(str(tmp_path)).sequence_default().length == 64
    roberta = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "max_position_embeddings": 66}
    (tmp_path / "config.json").write_text(json.dumps(roberta | sizes))
    assert load_target(str(tmp_path)).default_sequence_length() == 64
