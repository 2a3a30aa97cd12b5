"""Memory over time: curves drawn by hand, and unit figures that add up to the live bytes of a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import tpplan
from tpplan.planner.graph_view import nbytes
from tpplan.planner.liveness import _curve
from tpplan.planner.run_once import run_once
from tpplan.planner.stand_in import FakeModel, describe_parameters
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace

EXAMPLES = Path(tpplan.__file__).parent / "examples"
BATCH = 5


def test_curve_by_hand():
    #    tick            3  4  5  6
    #    8 bytes, 1..4   8  8
    #    2 bytes, 4..5      2  2
    #    1 byte, 6..end           1
    assert _curve(3, 6, [(1, 4, 8), (4, 5, 2), (6, -1, 1), (0, 2, 99)]) == [8, 10, 2, 1]


@pytest.mark.parametrize(
    ("spec", "args", "seq"),
    [
        ("llama_tiny/config.json", {}, 32),
        ("nanogpt.py", {"n_layer": "5", "n_head": "4", "n_embd": "32", "vocab_size": "128"}, 16),
        ("resnet.py", {"depth": "50", "width": "8", "num_classes": "10"}, 64),
    ],
)
def test_units_add_up_to_the_peak_of_the_whole_run(spec, args, seq):
    """peak = max over units of (saved so far + workspace [+ gradients of its outputs]), as the run shows it."""
    target = load_target(str(EXAMPLES / spec), model_args=args)
    graph = trace(target, sequence_length=seq, precision="fp32")
    model = target.build("meta").train()
    parameters = describe_parameters(model)
    rec = run_once(FakeModel(model, "fp32"), target, BATCH, seq, parameters, full=True).recording
    lives = [
        (s.born, s.died, s.nbytes)
        for s in rec.storages
        if s.kind not in ("parameter", "buffer", "input") and not s.parameter_gradient
    ]
    measured = max(_curve(0, rec.clock, lives))
    kept, predicted = 0.0, 0.0
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        kept += cls.saved_bytes.at(BATCH) - sum(shared.at(BATCH) for _, shared in unit.shared_saved)
        outputs = sum(nbytes(cls.tensors[t]).at(BATCH) for t in cls.outputs)
        predicted = max(predicted, kept + cls.workspace_forward.at(BATCH))
        predicted = max(predicted, kept + outputs + cls.workspace_backward.at(BATCH))
    inputs = sum(s.nbytes for s in rec.storages if s.kind == "input")
    assert measured <= predicted <= 1.02 * measured + inputs
