"""--init-from: values of a safetensors folder, every name and shape checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plans import EXAMPLES
from safetensors.torch import save_file
from tpplan.errors import UsageError
from tpplan.planner.target import load_target
from tpplan.runtime.initialise import build_seeded, load_safetensors, named_tensors

ARGS = {"n_layer": "2", "n_head": "2", "n_embd": "16", "block_size": "16", "vocab_size": "50"}


@pytest.fixture
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    target = load_target(str(EXAMPLES / "nanogpt.py"), model_args=ARGS)
    return build_seeded(target, 1), build_seeded(target, 2)


def test_a_sharded_folder_replaces_every_value(models, tmp_path: Path) -> None:
    source, other = models
    state = dict(source.named_parameters())  # without the second name of the tied head
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n].detach().clone() for n in part}, tmp_path / f"model-{i}.safetensors")
    load_safetensors(other, tmp_path)
    for name, tensor in named_tensors(source).items():
        assert torch.equal(tensor, named_tensors(other)[name]), name


def test_wrong_names_and_shapes_are_refused(models, tmp_path: Path) -> None:
    source, other = models
    state = {n: p.detach().clone() for n, p in source.named_parameters()}
    first = state.pop("transformer.ln_f.weight")
    state["stranger"] = first
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"1 missing \(first: transformer.ln_f.weight\), 1 unexpected \(first: str"):
        load_safetensors(other, tmp_path)
    state["transformer.ln_f.weight"] = torch.zeros(3)
    del state["stranger"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"transformer.ln_f.weight has shape \(3,\)"):
        load_safetensors(other, tmp_path)


def test_an_empty_folder_is_refused(models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        load_safetensors(models[0], tmp_path)


def test_the_seed_alone_decides_the_weights(models) -> None:
    target = load_target(str(EXAMPLES / "nanogpt.py"), model_args=ARGS)
    torch.manual_seed(99)
    again = named_tensors(build_seeded(target, 1))
    assert all(torch.equal(again[n], t) for n, t in named_tensors(models[0]).items())
    assert any(not torch.equal(again[n], t) for n, t in named_tensors(models[1]).items())
