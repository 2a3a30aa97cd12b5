"""The executed plan equals one process that runs the same microbatches: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import check_gradients, initial_state, run_plan, target_of, SEED
from plans import EXAMPLES, split, write_plan
from tpplan.planner.plan import Plan
from tpplan.runtime.initialise import build_seeded, named_tensors

GPT_ARGS = {"n_layer": "4", "n_head": "4", "n_embd": "32", "block_size": "32", "vocab_size": "96"}
GPT_UNITS = ["wte", "wpe", "drop", "h.0", "h.1", "h.2", "h.3", "ln_f"]
MODELS: dict[str, dict[str, Any]] = {
    "nanogpt": dict(
        target=str(EXAMPLES / "nanogpt.py"),
        model_args=GPT_ARGS,
        units=[f"transformer.{u}" for u in GPT_UNITS] + ["lm_head"],
        cut=("transformer.h.1", "transformer.h.1:0:0"),
    ),
    "llama": dict(
        target=str(EXAMPLES / "llama_tiny"),
        units=["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"],
        replicated=["model.rotary_emb"],
        cut=("model.layers.1", "model.layers.1:0:0"),
    ),
    "bert": dict(
        target=str(EXAMPLES / "bert_tiny"),
        units=["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(4)), "cls"],
        cut=("bert.encoder.layer.1", "bert.encoder.layer.1:0:0"),
    ),
}


def plan_of(model: str, pp: int = 1, **options: Any) -> Plan:
    """A plan of one of the example models, cut in the middle if pp is 2."""
    spec = MODELS[model]
    units = spec["units"]
    cuts = [units.index(spec["cut"][0]) + 1] if pp == 2 else []
    return write_plan(
        spec["target"],
        split(units, cuts),
        wires=[[spec["cut"][1]]] if pp == 2 else [],
        model_args=spec.get("model_args"),
        replicated=spec.get("replicated", ()),
        **options,
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp4": dict(dp_shard=4),
    "pp2xdp2": dict(pp=2, dp_shard=2, microbatches=4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_one_process(pool, model: str, layout: str) -> None:
    plan = plan_of(model, **LAYOUTS[layout])
    check_gradients(plan, pool.run(run_plan, plan=plan), torch.float64, 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_state_is_bit_equal_to_the_users_construction(pool, layout: str) -> None:
    plan = plan_of("nanogpt", **LAYOUTS[layout])
    expected = named_tensors(build_seeded(target_of(plan), SEED))
    seen = set()
    for state in pool.run(initial_state, plan=plan):
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name
            seen.add(name)
    assert seen == set(expected)
