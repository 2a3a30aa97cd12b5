"""Stage borders that carry more than activations: integers, constants, and parameters that no unit owns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import check_gradients, run_plan, target_of
from plans import write_plan
from tpplan.errors import ModelError, PlanFileError
from tpplan.planner.inputs import Inputs
from tpplan.planner.plan import Plan
from tpplan.runtime.pipeline import pack, travel_dtype, unpack
from tpplan.runtime.stage import check_plan_fits, parameter_holders
from tpplan.runtime.stubs import Wire
from tpplan.runtime.unit_outputs import Leaf, record_unit_outputs

MODEL = """
import torch
from torch import nn

class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        y = self.linear(x)
        return {"mask": (y.detach() > 0).to(y.dtype), "bucket": (y > 0).sum(-1), "y": y}

class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)
    def forward(self, routed):
        return self.linear(routed["y"]) * routed["mask"] + self.table(routed["bucket"])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 1.5))
        self.router, self.expert, self.head = Router(), Expert(), nn.Linear(8, 1)
        self.register_buffer("shift", torch.rand(8), persistent=False)
    def forward(self, x):
        routed = self.router(x * self.gain + self.shift)
        return self.head(self.expert(routed) * self.gain)

def build_model():
    return Model()

def example_inputs(batch, seq):
    return torch.randn(batch, 8)

def loss_fn(output, inputs):
    return output.square().mean()
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "model.py").write_text(MODEL)
    wires = [[f"router:0:{leaf}" for leaf in range(3)]]
    stages = [["router"], ["expert", "head"]]
    return write_plan(str(tmp_path / "model.py"), stages, wires=wires, dp_replicate=2, sequence_length=0)


def test_integers_constants_and_loose_parameters_cross_a_border(pool, plan: Plan) -> None:
    check_gradients(plan, pool.run(run_plan, plan=plan), torch.float64, 1e-9)


def test_a_loose_parameter_is_held_by_all_stages_unless_the_plan_says_which(plan: Plan) -> None:
    model = _build(plan)
    assert parameter_holders(model, plan)["gain"] == (0, 1)
    assert parameter_holders(model, plan)["expert.table.weight"] == (1,)
    placed = plan.model_dump() | {"parameters": {"gain": {"stages": [1]}}}
    assert parameter_holders(model, Plan.model_validate(placed))["gain"] == (1,)


def test_a_module_in_two_stages_is_refused(plan: Plan) -> None:
    data = plan.model_dump()
    data["stages"][1]["modules"].append("router")
    with pytest.raises(PlanFileError, match="router runs in stages 0 and 1"):
        check_plan_fits(_build(plan), Plan.model_validate(data))


def test_a_parameter_count_of_another_model_is_refused(plan: Plan) -> None:
    data = plan.model_dump()
    data["model"]["parameters"] = 7
    with pytest.raises(PlanFileError, match="the plan's 7"):
        check_plan_fits(_build(plan), Plan.model_validate(data))


def test_a_failing_forward_is_the_models_error(plan: Plan) -> None:
    model = torch.nn.Linear(3, 3, device="meta")
    with pytest.raises(ModelError, match="failed on fake tensors"):
        record_unit_outputs(model, [], Inputs(args=(torch.zeros(2, 5),)), torch.float32, target_of(plan))


def test_units_are_recorded_where_code_looks_at_data_and_writes_in_place(plan: Plan) -> None:
    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            rows = hidden.isfinite().all(-1).nonzero()[:, 0]
            hidden += x
            return self.second(hidden[rows])

    model = Picky().to("meta")
    before = dict(model.named_parameters())
    inputs = Inputs(args=(torch.ones(2, 4),))
    outputs = record_unit_outputs(model, ["first", "second"], inputs, torch.float32, target_of(plan))
    assert outputs["first", 0].leaves == (Leaf((2, 4), torch.float32, True, written=True),)
    assert outputs["second", 0].leaves == (Leaf((2, 4), torch.float32, True),)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_wires_travel_as_floats_and_come_back_as_they_were() -> None:
    metas = [Leaf((2,), torch.int64, False), Leaf((2,), torch.float32, True), Leaf((2,), torch.bfloat16, False)]
    wires = [Wire("unit", 0, i, meta) for i, meta in enumerate(metas)]
    base = torch.tensor([1.0, 2.0], requires_grad=True)
    values = [torch.tensor([2**40 + 1, -3]), base * 3, torch.tensor([1.0, 0.5], dtype=torch.bfloat16)]
    sent = pack(values, wires)
    assert [t.dtype for t in sent] == [torch.float64, torch.float32, torch.bfloat16] == [*map(travel_dtype, wires)]
    assert all(t.requires_grad for t in sent)
    received = [t.detach().requires_grad_() for t in sent]
    restored = unpack(received, wires)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(restored, values, strict=True))
    restored[1].sum().backward()
    # torch's stages send a gradient for every tensor that was received.
    assert [t.grad.tolist() for t in received if t.grad is not None] == [[0, 0], [1, 1], [0, 0]]


def _build(plan: Plan) -> Any:
    from numeric import target_of

    return target_of(plan).build("meta")
