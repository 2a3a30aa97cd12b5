"""The executed plan equals one process that runs the same microbatches: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import SEED, check_gradients, check_roughly, initial_state, run_compiled, run_plan, target_of
from plans import EXAMPLES, split, write_plan
from tpplan.planner.plan import ModuleStyle, Plan
from tpplan.runtime.initialise import build_seeded, named_tensors

GPT_ARGS = {"n_layer": "4", "n_head": "4", "n_embd": "32", "block_size": "32", "vocab_size": "96"}
GPT_UNITS = ["wte", "wpe", "drop", "h.0", "h.1", "h.2", "h.3", "ln_f"]
MODELS: dict[str, dict[str, Any]] = {
    "nanogpt": {
        "target": str(EXAMPLES / "nanogpt.py"),
        "model_args": GPT_ARGS,
        "units": [f"transformer.{u}" for u in GPT_UNITS] + ["lm_head"],
        "half": "transformer.h.1",
        "quarters": [f"transformer.h.{i}" for i in range(3)],
    },
    "llama": {
        "target": str(EXAMPLES / "llama_tiny"),
        "units": ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"],
        "replicated": ["model.rotary_emb"],
        "half": "model.layers.1",
        "quarters": [f"model.layers.{i}" for i in range(3)],
    },
    "resnet": {
        "target": str(EXAMPLES / "resnet.py"),
        "model_args": {"depth": "18", "width": "8", "num_classes": "10"},
        "units": [
            *(f"stem.{i}" for i in range(4)),
            *(f"groups.{i}.{j}" for i in range(4) for j in range(2)),
            *("pool", "head"),
        ],
        "half": "stem.1",
        "quarters": ["stem.1", "groups.1.0", "groups.2.1"],
    },
    "lora": {
        "target": str(EXAMPLES / "lora.py"),
        "model_args": {"n_layer": "4", "n_head": "4", "n_embd": "32", "block_size": "32", "vocab_size": "96"},
        "units": ["embed", *(f"layers.{i}" for i in range(4)), "norm", "head"],
        "half": "embed",
    },
    "bert": {
        "target": str(EXAMPLES / "bert_tiny"),
        "units": ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(4)), "cls"],
        "half": "bert.encoder.layer.1",
    },
}


COL, ROW = ModuleStyle(style="col", output="shard"), ModuleStyle(style="row")
VOCAB = ModuleStyle(style="vocab")


def styles_of(model: str) -> dict[str, ModuleStyle]:
    """Megatron's split of the model, by hand."""
    layers = range(4)
    if model == "nanogpt":
        packed = ModuleStyle(style="packed", sizes=[32, 32, 32], output="shard")
        names = {"attn.c_attn": packed, "attn.c_proj": ROW, "mlp.c_fc": COL, "mlp.c_proj": ROW}
        blocks = {f"transformer.h.{i}.{n}": s for i in layers for n, s in names.items()}
        return {"transformer.wte": VOCAB, **blocks, "lm_head": COL}
    if model == "llama":
        names = dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], COL)
        names |= {"self_attn.o_proj": ROW, "mlp.gate_proj": COL, "mlp.up_proj": COL, "mlp.down_proj": ROW}
        blocks = {f"model.layers.{i}.{n}": s for i in layers for n, s in names.items()}
        return {"model.embed_tokens": VOCAB, **blocks, "lm_head": COL}
    names = dict.fromkeys([f"attention.self.{n}" for n in ("query", "key", "value")], COL)
    names |= {"attention.output.dense": ROW, "intermediate.dense": COL, "output.dense": ROW}
    blocks = {f"bert.encoder.layer.{i}.{n}": s for i in layers for n, s in names.items()}
    return {"bert.embeddings.word_embeddings": VOCAB, **blocks, "cls.predictions.decoder": COL}


def plan_of(model: str, pp: int = 1, chunks: int = 1, **options: Any) -> Plan:
    """A plan of one of the example models, cut into as many stages as pp x chunks."""
    spec = MODELS[model]
    units = spec["units"]
    ends = {1: [], 2: [spec["half"]], 4: spec.get("quarters", ())}[pp * chunks]
    return write_plan(
        spec["target"],
        split(units, [units.index(end) + 1 for end in ends]),
        wires=[[f"{end}:0:0"] for end in ends],
        model_args=spec.get("model_args"),
        replicated=spec.get("replicated", ()),
        styles=styles_of(model) if options.get("tp", 1) > 1 else {},
        loss_parallel=options.get("tp", 1) > 1,
        chunks=chunks,
        **({"schedule": "interleaved"} if chunks > 1 else {}),
        **options,
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp4": {"dp_shard": 4},
    "tp2xdp2": {"tp": 2, "dp_shard": 2},
    "tp2xpp2": {"tp": 2, "pp": 2},
    "pp2xdp2": {"pp": 2, "dp_shard": 2, "microbatches": 4},
}


SIZES: dict[str, dict[str, Any]] = {"resnet": {"sequence_length": 32, "microbatch_size": 2}}
# Convolutions run without tp. Both border cases of a cut are here: before an operator in place (resnet), and
# behind units without gradients (lora).
CASES = [(model, layout) for model in ("nanogpt", "llama", "bert") for layout in LAYOUTS]
CASES += [("resnet", "fsdp4"), ("resnet", "dp4"), ("resnet", "pp2xdp2"), ("lora", "pp2xdp2"), ("lora", "fsdp4")]
OTHERS: dict[str, dict[str, Any]] = {
    "dp4": {"dp_replicate": 4, "reshard": False},
    "hsdp, reduced every microbatch": {"dp_replicate": 2, "dp_shard": 2, "gradient_sync": "every"},
    "zero 2": {"dp_shard": 2, "reshard": False, "microbatches": 3},
    "gpipe, full recompute": {"pp": 2, "dp_shard": 2, "schedule": "gpipe", "recompute": "full"},
    "selective recompute": {"tp": 2, "pp": 2, "recompute": "selective"},
    "all axes": {"tp": 2, "dp_replicate": 2, "recompute": "full"},
    "some units kept gathered": {"dp_shard": 2, "microbatches": 3, "kept": ["model.layers.0", "model.layers.2"]},
    "tp outermost, pp innermost": {"tp": 2, "pp": 2, "order": ["tp", "cp", "dp_shard", "dp_replicate", "pp"]},
}
INTERLEAVED: list[tuple[str, dict[str, Any]]] = [
    ("nanogpt", {"microbatches": 4}),
    ("nanogpt", {"microbatches": 8, "dp_shard": 2, "kept": ["transformer.h.1"]}),
    ("llama", {"microbatches": 4, "tp": 2, "recompute": "full"}),
    ("llama", {"microbatches": 8, "dp_shard": 2, "order": ["dp_shard", "tp", "cp", "dp_replicate", "pp"]}),
    ("resnet", {"microbatches": 4, "dp_replicate": 2, "sequence_length": 32, "microbatch_size": 2}),
]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_gradients_equal_one_process(pool, model: str, layout: str) -> None:
    plan = plan_of(model, **{**OTHERS, **LAYOUTS}[layout], **SIZES.get(model, {}))
    check_gradients(plan, pool.run(run_plan, plan=plan), torch.float64, 1e-9)


@pytest.mark.parametrize("layout", OTHERS)
def test_gradients_of_other_layouts(pool, layout: str) -> None:
    plan = plan_of("llama", **OTHERS[layout])
    results = pool.run(run_plan, world=plan.mesh.world_size, plan=plan)
    check_gradients(plan, results, torch.float64, 1e-9)


@pytest.mark.parametrize(("model", "options"), INTERLEAVED)
def test_gradients_of_an_interleaved_schedule(pool, model: str, options: dict[str, Any]) -> None:
    plan = plan_of(model, pp=2, chunks=2, **options)
    results = pool.run(run_plan, world=plan.mesh.world_size, plan=plan)
    check_gradients(plan, results, torch.float64, 1e-9)


@pytest.mark.parametrize("layout", ["tp2xpp2", "fsdp4"])
def test_gradients_in_float32(pool, layout: str) -> None:
    plan = plan_of("nanogpt", **LAYOUTS[layout])
    check_gradients(plan, pool.run(run_plan, plan=plan, float64=False), torch.float32, 1e-5)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"tp": 2, "pp": 2}),
        ("lora", {"dp_shard": 4}),
        ("resnet", {"pp": 2, "dp_shard": 2, "sequence_length": 64, "microbatch_size": 8}),
    ],
)
def test_bf16_runs_are_close_to_float32(pool, model: str, options: dict[str, Any]) -> None:
    plan = plan_of(model, precision="bf16", **options)
    # Many batch norms over few samples magnify rounding: one process under torch.autocast is as far off.
    tolerance = 0.1 if model == "resnet" else 0.05
    check_roughly(plan, pool.run(run_plan, plan=plan, float64=False), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "recompute"), [(1, 1, "none"), (2, 1, "selective"), (2, 2, "full")])
def test_compiled_blocks_share_one_graph_and_have_the_same_gradients(pool, tp: int, pp: int, recompute: str) -> None:
    plan = plan_of("llama", tp=tp, pp=pp, dp_shard=4 // (tp * pp), recompute=recompute)
    results = pool.run(run_compiled, plan=plan)
    check_gradients(plan, results, torch.float32, 1e-5)
    assert [(result["graphs"], result["breaks"]) for result in results] == [(1, {})] * 4


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
