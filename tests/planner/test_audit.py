"""The audit of a certificate: it passes true ones, catches false ones, and the written programme is the real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import highspy
import pytest
from tpplan.errors import TpplanError
from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner import audit as auditing
from tpplan.planner.audit import audit, demand, dump_lp, pruned_keys, sample
from tpplan.planner.mesh import Mesh
from tpplan.planner.pins import parse_pins
from tpplan.planner.planning import SearchOptions, Solved, solve_for
from tpplan.planner.request import Request
from tpplan.planner.runs import fold
from tpplan.planner.solve import scale_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def solved() -> Solved:
    """Pipelines of a small GPT, to within 1e-4."""
    from tpplan.planner.suggest import traced
    from tpplan.planner.target import load_target

    sizes = {"n_layer": "6", "n_embd": "256", "n_head": "4", "vocab_size": "512", "block_size": "128"}
    loaded = load_target(str(ROOT / "examples/nanogpt.py"), model_args=sizes, inputs=(), precision="bf16")
    subject = traced(loaded, load_profile("h100-sxm"), 128, "bf16")
    request = Request(
        gpus=4, gpus_per_node=8, sequence_length=128, global_batch=32, precision="bf16", optimizer="adamw",
        memory_limit_bytes=2**32, gap=1e-4, pins=parse_pins(least=["pp=2"], most=["tp=1"]),
    )  # fmt: skip
    found = solve_for(subject, request, SearchOptions(workers=1))
    assert found.result.status == "optimal"
    return found


def test_a_true_certificate_passes(solved: Solved) -> None:
    found = audit(solved, workers=1)
    assert found.violation == ""
    assert found.checked == found.pruned == len(pruned_keys(solved)) > 10
    assert found.undecided == 0
    demand(found, solved)


def test_a_false_bound_is_caught_with_the_combination_that_beats_it(solved: Solved) -> None:
    steps = sorted(solved.result.bounds[key] for key in pruned_keys(solved))
    false = replace(solved, result=replace(solved.result, lower_bound_s=steps[0] * 1.2))
    found = audit(false, workers=1)
    assert "Mesh(" in found.violation
    with pytest.raises(TpplanError, match="below the proven bound"):
        demand(found, false)


def test_a_candidate_pruned_wrongly_is_caught(solved: Solved) -> None:
    best = solved.best
    assert best is not None
    without = {**solved.result.proofs, best.key: "lb1"}
    lower = best.evaluation.step_time_s * 1.001
    false = replace(solved, result=replace(solved.result, proofs=without, lower_bound_s=lower))
    assert Mesh(*best.key).describe() in audit(false, workers=1).violation


def test_large_spaces_are_sampled_with_the_least_bounds_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "SAMPLE", 10)
    keys = [(i,) for i in range(100)]
    chosen = sample(keys)
    assert chosen[:5] == keys[:5]
    assert len(set(chosen)) == 10
    assert chosen == sample(keys)
    assert sample(keys[:10]) == keys[:10]


def test_the_written_programme_has_the_plan_s_step_as_its_optimum(solved: Solved, tmp_path: Path) -> None:
    best = solved.best
    assert best is not None
    problem = solved.model.problem(Mesh(*best.key))
    dump_lp(problem, tmp_path / "plan.lp", 1e-6)
    text = (tmp_path / "plan.lp").read_text()
    assert all(name in text for name in ("assign_0_0", "memory_0", "path_0", "send_row_0", "T"))
    engine = highspy.Highs()
    engine.silent()
    engine.readModel(str(tmp_path / "plan.lp"))
    engine.setOptionValue("mip_rel_gap", 0.0)
    engine.run()
    step_s = engine.getInfo().objective_function_value / scale_of(problem, fold(problem)).time + problem.step_fixed_s
    assert step_s == pytest.approx(best.evaluation.step_time_s, rel=2e-4)
