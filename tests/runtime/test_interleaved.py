"""Several stages on a rank: parameters that two of them hold, buffers in flight, and plans that cannot run so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_tasks import LARGEST_NORM, LR, SEED, STEPS, buffers_in_flight, gathered, trained
from numeric import target_of
from plans import write_plan
from tpplan.errors import PlanFileError, UsageError
from tpplan.planner.plan import AXES, MeshSection, Plan
from tpplan.runtime.data import Samples
from tpplan.runtime.initialise import build_seeded
from tpplan.runtime.mesh import rank_grid
from tpplan.runtime.metrics import closing_table
from tpplan.runtime.pipeline import make_schedule
from tpplan.runtime.stage import sections_of
from tpplan.runtime.train import check_runnable, pipeline_lines

# With pp 2 and 2 chunks a rank, `first` and `third` share their weight on rank 0, all four stages hold the gain.
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 1.5))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.third.weight = self.first.weight
    def forward(self, x):
        x = self.first(x * self.gain).tanh() * self.scale
        x = self.second(x) * self.gain
        x = self.third(x * self.gain).tanh() * self.scale
        return self.head(x * self.gain)

def build_model():
    return Model()

def example_inputs(batch, seq):
    return torch.randn(batch, 8)

def loss_fn(output, inputs):
    return output.square().mean()
"""


def plan_of_chunks(folder: Path, **options: Any) -> Plan:
    (folder / "model.py").write_text(MODEL)
    wires = [[f"{unit}:0:0"] for unit in ("first", "second", "third")]
    stages = [["first"], ["second"], ["third"], ["head"]]
    target = str(folder / "model.py")
    given = {"schedule": "interleaved", "chunks": 2, "microbatches": 4, "sequence_length": 0} | options
    return write_plan(target, stages, wires=wires, **given)


def train_alone(plan: Plan) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The norms of all steps and the parameters after them, of one process with the same samples."""
    target, batch, replicas = target_of(plan), plan.batch, plan.mesh.data_parallel_degree
    model = build_seeded(target, SEED, torch.float64)
    samples = Samples(target, model, batch.sequence_length, SEED)
    microbatches = [
        inputs
        for replica in range(replicas)
        for inputs in samples.of_replica(0, replica, replicas, batch.microbatches, batch.microbatch_size)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for inputs in microbatches:
            output = model(*(t.double() for t in inputs.args))
            (output.square().mean() / len(microbatches)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM))
        optimizer.step()
    return torch.stack(norms), {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("options", [{}, {"dp_shard": 2, "kept": ["third"]}], ids=["pp2", "pp2xfsdp2"])
def test_training_equals_one_process_where_chunks_of_a_rank_share_parameters(
    pool, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = plan_of_chunks(tmp_path, **options)
    norms, expected = train_alone(plan)
    results = pool.run(trained, world=plan.mesh.world_size, plan=plan)
    # Of rank 0: gain, scale, one weight, two biases; of rank 1 two weights. Nothing is trained twice.
    assert {result["optimized"] for result in results} == {5, 6}
    seen = set()
    for result in results:
        torch.testing.assert_close(result["norms"], norms, rtol=1e-9, atol=0)
        for key, value in result["values"].items():
            name = key.partition(".")[2]
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
            seen.add(key)
    assert {"0.first.weight", "2.third.weight", "0.gain", "3.gain", "3.scale"} <= seen


def test_receive_buffers_live_as_long_as_their_microbatch(pool, tmp_path: Path) -> None:
    plan = plan_of_chunks(tmp_path, microbatches=16)
    for first, most, last in pool.run(buffers_in_flight, world=2, plan=plan):
        assert first <= 2
        assert 0 < most <= 10
        assert last == 0


@pytest.mark.parametrize("sync", ["last", "every"])
def test_only_units_kept_gathered_stay_so(pool, tmp_path: Path, sync: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    units = ["first", "second", "third", "head"]
    plan = write_plan(
        str(tmp_path / "model.py"), [units], kept=["second"], dp_shard=2, gradient_sync=sync, sequence_length=0
    )
    whole_between = [sync == "last", False]
    expected = [[False, False], [True, False], whole_between, [True, False], [False, False]]
    assert pool.run(gathered, world=2, plan=plan, units=["second", "head"]) == [expected] * 2


def test_microbatches_that_no_round_divides_are_refused(tmp_path: Path) -> None:
    plan = plan_of_chunks(tmp_path, microbatches=5)
    with pytest.raises(UsageError, match="2 rounds over 2 pipeline ranks, which does not divide 5"):
        make_schedule(plan, [])


def test_stages_on_other_ranks_than_in_turn_are_refused(tmp_path: Path) -> None:
    plan = plan_of_chunks(tmp_path)
    assert [[s.index for s in sections_of(plan, rank)] for rank in range(2)] == [[0, 2], [1, 3]]
    data = plan.model_dump()
    data["stages"][2]["pipeline_rank"] = 1
    with pytest.raises(PlanFileError, match="must be on rank 0"):
        sections_of(Plan.model_validate(data), 0)
    with pytest.raises(PlanFileError, match="4 stages for 2 pipeline ranks with 1 each"):
        sections_of(Plan.model_validate(plan.model_dump() | {"schedule": {"name": "1f1b"}}), 0)


def test_a_run_says_its_schedule_its_neighbours_and_the_memory_of_each_rank(tmp_path: Path) -> None:
    plan = plan_of_chunks(tmp_path, dp_shard=2, order=["tp", "dp_shard", "cp", "dp_replicate", "pp"])
    assert pipeline_lines(plan) == [
        "Schedule interleaved with 2 stages a rank.",
        "Consecutive ranks run along pp, then dp_shard.",
    ]
    rows = closing_table(plan, [1.0], [2**20, 2**28], "active").splitlines()
    assert [row.split("  ")[0] for row in rows[2:4]] == ["peak memory, stages 0, 2", "peak memory, stages 1, 3"]
    assert rows[3].endswith("256.0 MiB  1.00")


@pytest.mark.parametrize("change", [{"name": "zb", "runnable": False}, {"runnable": False}])
def test_plans_for_estimates_only_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = plan_of_chunks(tmp_path)
    check_runnable(plan)
    schedule = plan.schedule.model_dump() | change
    with pytest.raises(UsageError, match="can be estimated and exported, but not run"):
        check_runnable(Plan.model_validate(plan.model_dump() | {"schedule": schedule}))


def test_consecutive_ranks_run_along_the_innermost_axis() -> None:
    order: Any = ["dp_shard", "pp", "cp", "tp", "dp_replicate"]
    section = MeshSection(
        pipeline_parallel_degree=3, data_parallel_shard_degree=2, tensor_parallel_degree=4, order=order
    )
    grid = rank_grid(section)
    degree = dict(zip(AXES, grid.shape, strict=True))
    assert degree == {"pp": 3, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 4}
    expected = [[[4 * (3 * shard + stage) + t for t in range(4)] for shard in range(2)] for stage in range(3)]
    assert grid.squeeze().tolist() == expected
    # DeviceMesh of torch 2.11 takes only slices whose strides fall.
    assert grid.stride() == (8, 8, 4, 4, 1)
