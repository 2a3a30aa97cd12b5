"""The layouts found are at least as good by cost as those that transformers ships with its configs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner.sharding import analyse

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tp_plans", ROOT / "benchmarks" / "tp_plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tp_plans"] = module
    spec.loader.exec_module(module)
    return module


def compared(script: ModuleType, folder: Path, model_type: str, architecture: str) -> Any:
    config = {**SMALL, "model_type": model_type, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    graph = script.traced(str(folder / "config.json"), 16)
    links = load_profile("h100-sxm").links
    return script.compare(model_type, graph, analyse(graph), script.shipped_plan(model_type), links)


def test_llama_is_laid_out_as_transformers_does(script: ModuleType, tmp_path: Path) -> None:
    found = compared(script, tmp_path, "llama", "LlamaForCausalLM")
    assert found.ours.rank_bytes == found.theirs.rank_bytes
    assert found.differences == []
    assert found.verdict == "as good or better"


def test_packed_projections_need_no_gathering(script: ModuleType, tmp_path: Path) -> None:
    found = compared(script, tmp_path, "phi3", "Phi3ForCausalLM")
    assert found.verdict == "as good or better"
    assert found.ours.collective_s < 0.6 * found.theirs.collective_s
    assert any("qkv_proj" in line and "need not be gathered" in line for line in found.differences)


def test_a_norm_over_all_heads_exchanges_its_mean_alone(script: ModuleType, tmp_path: Path) -> None:
    found = compared(script, tmp_path, "olmo2", "Olmo2ForCausalLM")
    assert found.verdict == "as good or better"
    assert found.ours.collective_bytes < 0.5 * found.theirs.collective_bytes
