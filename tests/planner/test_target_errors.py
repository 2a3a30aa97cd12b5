"""Bad targets: each gets one or two lines with the remedy and a documented exit code, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn
from tpplan.errors import EnvironmentFailure, ModelError, TargetError, TpplanError, UsageError
from tpplan.planner.inputs import draw
from tpplan.planner.losses import find_loss
from tpplan.planner.target import load_target

HEAD = "import torch\nfrom torch import nn\n"
NET = """
class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in its own empty folder, so that paths look as typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "model.py", head: str = HEAD) -> str:
    Path(name).write_text(head + dedent(text))
    return name


def use(target: str, **options: Any) -> None:
    """Load, build and feed `target`, as every command does."""
    loaded = load_target(target, **options)
    loaded.example_inputs(loaded.build("meta"), 2, 8)


def refuse(error_type: type[TpplanError], exit_code: int, *words: str, target: str, **options: Any) -> None:
    """Using `target` raises this error, with these words and in the documented form."""
    with pytest.raises(error_type) as caught:
        use(target, **options)
    check_form(caught.value, exit_code, *words)


def check_form(error: TpplanError, exit_code: int, *words: str) -> None:
    assert error.exit_code == exit_code
    assert error.remedy
    lines = str(error).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) < 450
    for word in words:
        assert word in str(error)
    assert "Traceback" not in str(error)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("modle.py", ["No such file: modle.py", "Did you mean model.py?"]),
        ("modle.py:Net", ["No such file: modle.py", "Did you mean model.py?"]),
        ("model", ["Did you mean model.py?"]),
        ("lama", ["Did you mean llama?"]),
        ("lama/config.json", ["Did you mean llama?"]),
        ("elsewhere.py", ["there is: model.py, train.py"]),
        ("meta-llama/Llama-3-8B", ["never downloaded"]),
        ("notes.txt", ["neither a Python file nor a config.json"]),
        ("", ["empty"]),
        ("model.py:", ["after the colon"]),
        ("no such.module:x", ["neither a file nor a module"]),
        ("nothing_here.at.all:x", ["no module 'nothing_here'", "Install it"]),
        ("torch.nn:Linaer", ["no Linaer", "Linear"]),
        ("empty", ["no config.json"]),
    ],
)
def test_missing_targets_offer_what_is_near(spec: str, words: list[str]) -> None:
    for name in ("model.py", "train.py", "notes.txt"):
        Path(name).touch()
    for name in ("llama", "empty"):
        Path(name).mkdir()
    refuse(TargetError, 2, *words, target=spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import not_installed_anywhere\n", ["line 3", "ModuleNotFoundError", "Install 'not_installed_anywhere'"]),
        ("def f(:\n", ["line 3", "SyntaxError"]),
        ("x = 1\ny = {}['key']\n", ["line 4", "KeyError: 'key'", "y = {}['key']"]),
        ("import sys\nsys.exit(3)\n", ["called exit", "line 4", "__main__"]),
        ("import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()\n", ["line 6"]),
        ("from .layers import Block\n", ["relative import", "package.module:NAME"]),
        ("open('weights.bin')\n", ["FileNotFoundError", "relative to where"]),
        ("raise RuntimeError('a' * 5000)\n", ["RuntimeError: aaaa"]),
        ("class Odd(BaseException): pass\nraise RuntimeError('two\\nlines')\n", ["two lines"]),
    ],
)
def test_an_import_error_shows_cause_and_line(text: str, words: list[str]) -> None:
    before = set(sys.modules)
    refuse(ModelError, 4, "model.py", *words, target=write(text))
    assert not [name for name in set(sys.modules) - before if name.startswith("tpplan_target")]


def test_an_error_in_a_neighbour_names_its_line() -> None:
    write("\n\n1 / 0\n", "broken_neighbour.py")
    refuse(ModelError, 4, "broken_neighbour.py, line 5", "ZeroDivisionError", target=write("import broken_neighbour"))


def test_an_error_in_an_importable_module_is_the_models_own() -> None:
    write("import torch\nraise ValueError('no good')\n", "broken_module.py")
    refuse(ModelError, 4, "Importing broken_module", "line 4", "no good", target="broken_module:Net")


def test_interrupt_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_target(write("raise KeyboardInterrupt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ["No model in model.py", "def build_model()", "model.py:NAME"]),
        ("a = nn.Linear(4, 2)\nb = nn.Linear(4, 2)\n", ["2 models: a, b", "model.py:a"]),
        (
            "class A(nn.Module): pass\nclass B(nn.Module): pass\nclass C(A): pass\n",
            ["2 model classes: B, C", "model.py:B"],
        ),
        ("model = 3\n", ["No model in model.py"]),
        ("def build_model():\n    return 'a model'\n", ["returned a str", "Let it return the model"]),
        ("def build_model(width):\n    pass\n", ["build_model() needs width", "--model-arg width=..."]),
        ("class Net(nn.Module):\n    def __init__(self, a, b, c=1): pass\n", ["Net() needs a, b"]),
        ("model = nn.Linear(4, 2).requires_grad_(False)\n", ["no trainable parameters (2 frozen)", "requires_grad"]),
        ("model = nn.ReLU()\n", ["no parameters to train"]),
        ("model = nn.LazyLinear(4)\n", ["only known after a first forward", "nn.Linear for nn.LazyLinear"]),
        ("model = nn.Linear(4, 2)\nexample_inputs = 3\n", ["example_inputs beside the model is a int"]),
        ("model = nn.Linear(4, 2)\n", ["What to feed Linear.forward(input)", "example_inputs(batch, seq)", "--input"]),
    ],
)
def test_no_model_several_or_none_to_train(text: str, words: list[str]) -> None:
    refuse(TargetError, 2, *words, target=write(text))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nte", ["has no Nte", "Did you mean Net?"]),
        ("zzz", ["has no zzz", "Models and factories in it: Net"]),
        ("NUMBER", ["is a int, not a model"]),
        ("Other", ["is a type, not a model"]),
        ("Net.inner", ["has no Net.inner"]),
    ],
)
def test_a_wrong_name_in_the_file(name: str, words: list[str]) -> None:
    refuse(TargetError, 2, *words, target=f"{write(NET + 'NUMBER = 3' + chr(10) + 'class Other: pass')}:{name}")


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("def build_model(n_layer=2): pass", {"n_layers": "3"}, ["no argument 'n_layers'", "Did you mean n_layer?"]),
        ("def build_model(n_layer=2): pass", {"zzz": "3"}, ["It takes: n_layer"]),
        ("def build_model(): pass", {"zzz": "3"}, ["It takes no arguments"]),
        (
            "import dataclasses as d\n@d.dataclass\nclass C:\n    width: int = 1\n"
            "class Net(nn.Module):\n    def __init__(self, config: C): pass",
            {"widht": "3"},
            ["C has no field 'widht'", "Did you mean width?"],
        ),
        (
            "import dataclasses as d\n@d.dataclass\nclass C:\n    width: int\n"
            "class Net(nn.Module):\n    def __init__(self, config: C): pass",
            {},
            ["Net() needs config"],
        ),
        ("model = nn.Linear(4, 2)", {"width": "3"}, ["already an instance", "drop --model-arg"]),
    ],
)
def test_wrong_model_args(text: str, arguments: dict[str, str], words: list[str]) -> None:
    refuse(TargetError, 2, *words, target=write(text), model_args=arguments)


def test_a_failing_constructor_shows_its_own_line() -> None:
    text = """
    class Net(nn.Module):
        def __init__(self, heads=3):
            super().__init__()
            raise ValueError(f"64 is not divisible by {heads}")
    """
    refuse(ModelError, 4, "line 7", "ValueError: 64 is not divisible by 3", target=write(text))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("{'input': torch.ones(2, 4), 'y': torch.ones(2)}", ["'y', which forward does not take", "loss_fn"]),
        ("(torch.ones(2, 4), torch.ones(2))", ["returns 2 values; forward takes 1"]),
        ("{'imput': torch.ones(2, 4)}", ["'imput'", "Did you mean input?"]),
        ("None", ["returned a NoneType", "dict, a tuple or a tensor"]),
    ],
)
def test_example_inputs_that_do_not_fit(returned: str, words: list[str]) -> None:
    text = f"model = nn.Linear(4, 2)\ndef example_inputs(batch, seq):\n    return {returned}\n"
    refuse(TargetError, 2, *words, target=write(text))


def test_example_inputs_that_fail() -> None:
    text = "model = nn.Linear(4, 2)\ndef example_inputs(batch, seq):\n    return torch.ones(2, 4).cuda(99)\n"
    refuse(ModelError, 4, "example_inputs of model failed", "line 5", target=write(text))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ids", ["Cannot read --input 'ids'", "for example"]),
        ("ids=int46[B]<3", ["'int46' is no torch dtype", "int4"]),
        ("ids=nn[B]", ["'nn' is no torch dtype"]),
        ("ids=int64[B,S]", ["integers need an upper bound"]),
        ("ids=int64[B]<0", ["integers need an upper bound"]),
        ("x=float32[B]<3", ["floats are normal"]),
        ("x=float32[B,T]", ["cannot make a size of 'T'", "S is 8"]),
        ("x=float32[S-8]", ["cannot make a size of 'S-8'"]),
        ("x=float32[S/0]", ["cannot make a size"]),
        ("x=float32[__import__('os')]", ["cannot make a size"]),
    ],
)
def test_malformed_input_specs(spec: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        draw(spec, batch=2, seq=8)
    check_form(caught.value, 2, *words)


def test_an_input_that_forward_does_not_take() -> None:
    refuse(TargetError, 2, "no 'inptu'", "Did you mean input?", target=write(NET), inputs=["inptu=float32[B,4]"])


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{'single': 1", ["not valid JSON"]),
        ('{"model_type": "bert"', ["not valid JSON"]),
        ("[1, 2]", ["no model configuration"]),
        ({"hidden_size": 3}, ["neither model_type nor architectures"]),
        ({"schema_version": 1, "mesh": {}, "model": {}}, ["is a plan, not a model", "tpplan run"]),
        (BERT | {"model_type": "berd"}, ["no model type 'berd'", "Did you mean bert"]),
        (BERT | {"model_type": "my_own", "auto_map": {}}, ["never run", "model.py"]),
        (BERT | {"architectures": ["BertForMasked"]}, ["no architecture 'BertForMasked'", "BertForMaskedLM"]),
        ({"_class_name": "UNet2DConditionModle"}, ["no model 'UNet2DConditionModle'", "UNet2DConditionModel"]),
    ],
)
def test_bad_configs(config: object, words: list[str]) -> None:
    if "_class_name" in str(config):
        pytest.importorskip("diffusers")
    Path("config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    refuse(TargetError, 2, *words, target="config.json")


def test_a_config_the_model_refuses() -> None:
    Path("config.json").write_text(json.dumps(BERT | {"num_attention_heads": 5}))
    refuse(ModelError, 4, "not a multiple of the number of attention heads", target="config.json")


def test_wrong_config_overrides() -> None:
    Path("config.json").write_text(json.dumps(BERT))
    arguments = {"num_hiden_layers": "2"}
    refuse(TargetError, 2, "Did you mean num_hidden_layers?", target="config.json", model_args=arguments)


def test_a_pipeline_folder_names_its_parts() -> None:
    Path("model_index.json").write_text("{}")
    for part in ("unet", "vae"):
        Path(part).mkdir()
        Path(part, "config.json").write_text("{}")
    refuse(TargetError, 2, "unet, vae", target=".")


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.json").write_text(json.dumps(BERT))
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuse(EnvironmentFailure, 6, 'pip install "tpplan[hf]"', target="config.json")


def test_no_float_output_and_bad_loss_fn() -> None:
    with pytest.raises(ModelError) as caught:
        find_loss((torch.ones(2, dtype=torch.int64),))
    check_form(caught.value, 4, "no floating-point tensor", "loss_fn")
    target = load_target(write(NET + "def loss_fn(output, inputs):\n    return output"), inputs=["float32[B,4]"])
    inputs = target.example_inputs(target.build("meta"), 2, 8)
    with pytest.raises(ModelError) as caught:
        target.loss(torch.ones(2, 3), inputs)
    check_form(caught.value, 4, "shape (2, 3), not one value")


def test_loss_fn_with_a_count_but_no_known_targets() -> None:
    text = NET + "def loss_fn(output, inputs, num_items_in_batch=None):\n    return output.sum()"
    target = load_target(write(text), inputs=["float32[B,4]"])
    with pytest.raises(TargetError) as caught:
        target.count_targets(target.example_inputs(target.build("meta"), 2, 8))
    check_form(caught.value, 2, "count_targets(inputs)")


def test_unknown_precision_and_device() -> None:
    with pytest.raises(UsageError) as caught:
        load_target(write(NET), precision="fp8")
    check_form(caught.value, 2, "fp8", "bf16 or fp32")
    with pytest.raises(UsageError) as caught:
        load_target(write(NET)).build("cuda")
    check_form(caught.value, 2, "'cuda'")


def test_a_patched_registration_is_undone_after_a_failure() -> None:
    register = nn.Module.register_parameter
    with pytest.raises(ModelError):
        load_target(write("def build_model():\n    raise ValueError('never')")).build("meta")
    assert nn.Module.register_parameter is register


def test_a_missing_file_is_told_at_once_and_without_torch() -> None:
    """The command line as a user meets it: exit code 2, two lines, and torch is not even imported."""
    write(NET)
    code = (
        "import sys\nfrom tpplan.errors import TpplanError\nfrom tpplan.planner.target import load_target\n"
        "try:\n    load_target('modle.py')\nexcept TpplanError as error:\n"
        "    print(error, file=sys.stderr)\n    assert 'torch' not in sys.modules\n    sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "No such file: modle.py.\nDid you mean model.py?\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("import not_installed_anywhere\n", 4, "Install 'not_installed_anywhere'"),
        ("a = nn.Linear(4, 2)\nb = nn.Linear(4, 2)\n", 2, "model.py:a"),
    ],
)
def test_the_command_line_exits_with_the_documented_code(text: str, code: int, words: str) -> None:
    command = [sys.executable, "-m", "tpplan", "trace", write(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
