"""Plans that the planner itself writes run, and equal one process: its own choice, and a model with wide borders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import check_gradients, run_plan
from plans import EXAMPLES
from tpplan.planner.suggest import suggest

COMMON: dict[str, Any] = {"gpus": 4, "hardware": "cpu-gloo", "precision": "fp32", "global_batch": 8}
GPT_ARGS = {"n_layer": "4", "n_head": "4", "n_embd": "32", "block_size": "32", "vocab_size": "96"}
CHOICES: dict[str, dict[str, Any]] = {
    "nanogpt": {"target": str(EXAMPLES / "nanogpt.py"), "model_args": GPT_ARGS, "seq_len": 16},
    "llama": {"target": str(EXAMPLES / "llama_tiny"), "seq_len": 16},
    "bert": {"target": str(EXAMPLES / "bert_tiny"), "seq_len": 16},
    "resnet": {
        "target": str(EXAMPLES / "resnet.py"),
        "model_args": {"depth": "18", "width": "8", "num_classes": "10"},
        "seq_len": 32,
    },
    "llama, interleaved": {
        "target": str(EXAMPLES / "llama_tiny"),
        "seq_len": 16,
        "fix": ["schedule=interleaved", "pp=2", "tp=1"],
    },
    "lora": {"target": str(EXAMPLES / "lora.py"), "model_args": GPT_ARGS, "seq_len": 16, "fix": ["tp=2", "pp=2"]},
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "decoder_start_token_id": 0,
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", CHOICES)
def test_the_planners_choice_equals_one_process(pool, model: str) -> None:
    plan = suggest(**COMMON, **CHOICES[model])
    results = pool.run(run_plan, world=plan.mesh.world_size, plan=plan)
    check_gradients(plan, results, torch.float64, 1e-9)


@pytest.mark.slow
def test_several_tensors_cross_the_borders_of_an_encoder_and_decoder(pool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(T5))
    plan = suggest(target=str(tmp_path), **COMMON, seq_len=16, fix=["pp=4"])
    # Encoder output and position biases; the embedding is tied between three stages.
    assert max(len(stage.sends) for stage in plan.stages) > 1
    check_gradients(plan, pool.run(run_plan, plan=plan), torch.float64, 1e-9)
