"""Six situations whose best layout is neither the rule of thumb's nor plain FSDP's, and turns when one figure changes.

All plan one GPT of eight wide blocks on H100, traced once. A situation is a number of samples, a memory limit and the
speed of the links; links are slowed in a copy of the profile, latencies left as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
from tpplan.planner import trace as tracing
from tpplan.planner.plan import Baseline, Plan
from tpplan.planner.suggest import suggest

TARGET = Path(__file__).resolve().parents[2] / "examples" / "nanogpt.py"
WIDE = {"n_layer": "8", "n_embd": "4096", "n_head": "32"}
HEAVY_HEAD = {"n_layer": "8", "n_embd": "2048", "n_head": "16", "vocab_size": "256000"}
Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    """A planner for situations, which traces each model once and plans each situation once."""
    folder, real = tmp_path_factory.mktemp("profiles"), tracing.trace
    traces: dict[str, object] = {}
    plans: dict[str, Plan] = {}
    model = WIDE

    def trace_once(*args, **options):
        key = str(model)
        if key not in traces:
            traces[key] = real(*args, **options)
        return traces[key]

    def plan(batch: int, sizes: dict[str, str] = WIDE, gpus: int = 16, nvlink=1.0, network=1.0, gib=None) -> Plan:
        nonlocal model
        model, key = sizes, str((batch, sizes, gpus, nvlink, network, gib))
        if key not in plans:
            profile = folder / "links.json"
            profile.write_text(with_links(nvlink=nvlink, network=network))
            plans[key] = suggest(
                str(TARGET),
                gpus=gpus,
                global_batch=batch,
                seq_len=1024,
                hardware=str(profile),
                memory_limit_gib=gib,
                model_args=sizes,
            )
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace", trace_once)
        yield plan


def with_links(**speed: float) -> str:
    """The profile h100-sxm with the bandwidth of each named level times a factor."""
    profile = json.loads(resources.files("tpplan.hardware_profiles").joinpath("h100-sxm.json").read_text())
    assert {link["name"] for link in profile["links"]} == set(speed)
    for link in profile["links"]:
        factor = speed[link["name"]]
        link["bandwidth_bytes_per_s"]["value"] *= factor
        for collective in link["collectives"].values():
            collective["bandwidth_bytes_per_s"] *= factor
            collective["rows"] = [[group, size, seconds / factor] for group, size, seconds in collective["rows"]]
    return json.dumps(profile)


def degrees(layout: Plan | Baseline) -> tuple[int, int, int, int]:
    """(pp, tp, dp_replicate, dp_shard)."""
    mesh = layout.mesh
    return (
        mesh.pipeline_parallel_degree,
        mesh.tensor_parallel_degree,
        mesh.data_parallel_replicate_degree,
        mesh.data_parallel_shard_degree,
    )


def gain(plan: Plan) -> float:
    """How many times as fast the plan is as the better of the rule of thumb and plain FSDP; other degrees than both."""
    assert any(baseline.name == "rule of thumb" for baseline in plan.baselines)
    for baseline in plan.baselines:
        assert degrees(baseline) != degrees(plan), baseline.name
    steps = [baseline.step_time_s for baseline in plan.baselines if baseline.step_time_s is not None]
    return min(steps) / plan.predicted.step_time_s


def test_slow_nvlink_drives_tensor_parallelism_out(planned: Planner) -> None:
    """Eight samples for 16 GPUs: NVLink feeds tp 4 or more; at a fiftieth its sums cost more than a long pipeline."""
    fast, slow = planned(8), planned(8, nvlink=0.02)
    assert gain(fast) > 1.2
    assert degrees(fast)[1] >= 4
    assert degrees(slow)[0] >= 8
    assert degrees(slow)[1] <= 2
    assert gain(slow) > 2


def test_more_samples_drive_tensor_parallelism_out(planned: Planner) -> None:
    """One sample a GPU makes thin products and weights that nothing hides: tp 4 makes them four samples a group; with
    four samples a GPU plain FSDP hides its weights."""
    few, many = planned(16), planned(64)
    assert gain(few) > 1.1
    assert degrees(few)[1] > 1
    assert degrees(many) == (1, 1, 1, 16)


def test_a_slow_network_calls_for_a_pipeline(planned: Planner) -> None:
    """Gathering weights over a tenth of the network more than doubles the step; a pipeline sends activations only."""
    slow, fast = planned(64, network=0.1), planned(64)
    assert gain(slow) > 1.5
    assert degrees(slow)[0] > 1
    assert degrees(fast) == (1, 1, 1, 16)


def test_more_samples_call_for_replicas(planned: Planner) -> None:
    """On that slow network and with 32 samples a GPU a pipeline's bubble is too dear; shards within the node halve what
    crosses the network: one reduction of gradients instead of weights and gradients. With four samples it pipelines."""
    many, few = planned(512, network=0.1), planned(64, network=0.1)
    assert gain(many) > 1.02
    assert degrees(many) == (1, 1, 2, 8)
    assert degrees(few)[0] > 1


def test_short_memory_calls_for_tensor_parallelism_and_recomputation(planned: Planner) -> None:
    """In 12 GiB activations must shrink: recomputing some blocks and cutting by tp 2 beats recomputing them all, and
    beats enough tp to recompute nothing; in 80 GiB none of it is needed."""
    tight, roomy = planned(256, gpus=8, gib=12), planned(256, gpus=8, gib=80)
    recomputed = [len(stage.recompute) for stage in tight.stages]
    assert gain(tight) > 1.02
    assert degrees(tight)[1] > 1
    assert sum(recomputed) > 0
    assert degrees(roomy) == (1, 1, 1, 8)
    assert not any(stage.recompute for stage in roomy.stages)


def test_a_heavy_head_takes_blocks_from_its_stage(planned: Planner) -> None:
    """A head over 256,000 words costs as much as ten blocks: stages are even in time, not in blocks, where a slow
    network calls for stages at all."""
    slow, fast = planned(64, HEAVY_HEAD, network=0.1), planned(64, HEAVY_HEAD)
    blocks = [sum(".h." in f".{name}." for name in stage.modules) for stage in slow.stages]
    assert gain(slow) > 1.5
    assert degrees(slow)[0] > 1
    assert blocks[-1] < max(blocks) - 2
    assert degrees(fast)[0] == 1
