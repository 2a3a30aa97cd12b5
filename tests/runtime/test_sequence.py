"""Sequence parallelism equals one process: loss and every gradient, on streams that people write differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import check_gradients, run_plan
from test_numeric import MODELS, plan_of
from tpplan.planner.plan import Plan

LISTED: dict[str, list[str]] = {
    "nanogpt": ["", "ln_1", "attn.resid_dropout", "ln_2", "mlp.dropout"],
    "llama": ["", "input_layernorm", "post_attention_layernorm"],
    "bert": [
        *("attention.output", "attention.output.dropout", "attention.output.LayerNorm"),
        *("output", "output.dropout", "output.LayerNorm"),
    ],
}


def sequence_plan(model: str, **options: Any) -> Plan:
    """A plan of an example model whose stream is split, by hand."""
    plan = plan_of(model, **options)
    blocks = [unit for unit in MODELS[model]["units"] if unit.rpartition(".")[2].isdigit()]
    styles = {
        fqn: style.model_copy(update={"output": "sequence"}) if style.style == "row" else style
        for fqn, style in plan.tensor_parallel.styles.items()
    }
    section = plan.tensor_parallel.model_copy(
        update={
            "styles": styles,
            "sequence_parallel": True,
            "sequence_modules": [f"{block}.{name}".rstrip(".") for block in blocks for name in LISTED[model]],
            "sequence_ends": blocks[-1:],
        }
    )
    return plan.model_copy(update={"tensor_parallel": section})


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2xdp2": {"tp": 2, "dp_shard": 2},
    "tp2xpp2": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("model", LISTED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_one_process(pool, model: str, layout: str) -> None:
    plan = sequence_plan(model, **LAYOUTS[layout])
    results = pool.run(run_plan, world=plan.mesh.world_size, plan=plan)
    check_gradients(plan, results, torch.float64, 1e-9)
