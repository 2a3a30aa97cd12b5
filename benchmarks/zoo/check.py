"""Trace, plan and check one member of the zoo against torch; one JSON object on the last line of the output.

python benchmarks/zoo/check.py gpt2
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from member import Member
from members import by_name

GPUS, HARDWARE, GLOBAL_BATCH = 16, "h100-sxm", 256
LONGEST = 4096
_ORACLE_BATCH, _SAVED_BATCH = 2, 4


def check(member: Member, folder: Path) -> dict[str, Any]:
    """All figures of one member; what fails is under "errors", by the name of the check."""
    found: dict[str, Any] = {"name": member.name, "family": member.family, "library": member.library, "errors": {}}
    for step in (_plan, _oracle, _saved):
        started = time.perf_counter()
        try:
            step(member, folder, found)
        except Exception as error:
            name = step.__name__.strip("_")
            lines = str(error).strip().splitlines() or [""]
            found["errors"][name] = f"{type(error).__name__}: {lines[0]}"[:400]
            found.setdefault("traces", {})[name] = traceback.format_exc()[-3000:]
        found.setdefault("seconds", {})[step.__name__.strip("_")] = round(time.perf_counter() - started, 2)
    return found


def _load(member: Member, folder: Path, small: bool, precision: str) -> Any:
    from tpplan.planner.target import load_target

    spec, arguments = member.target(folder, small)
    return load_target(spec, model_args=arguments, inputs=member.inputs, precision=precision)


def _sequence(member: Member, target: Any) -> int:
    return member.seq or min(LONGEST, target.default_sequence_length())


def _plan(member: Member, folder: Path, found: dict[str, Any]) -> None:
    """Trace at the real size and plan for 16 GPUs."""
    from tpplan.errors import InfeasibleError
    from tpplan.planner.suggest import suggest_in_detail

    target = _load(member, folder, small=False, precision=member.precision)
    found["seq"] = seq = _sequence(member, target)
    spec, arguments = member.target(folder)
    for gpus in (GPUS * 2**k for k in range(8)):
        try:
            done = suggest_in_detail(
                spec,
                gpus=gpus,
                hardware=HARDWARE,
                seq_len=seq,
                global_batch=GLOBAL_BATCH,
                precision=member.precision,
                model_args=arguments,
                inputs=member.inputs,
                time_limit_s=60,
            )
            break
        except InfeasibleError:  # its training state is larger than the memory of so many GPUs
            if gpus == GPUS * 2**7:
                raise
    graph, plan, sharding = done.graph, done.plan, done.sharding
    counts: dict[int, int] = {}
    for unit in graph.units:
        counts[unit.class_index] = counts.get(unit.class_index, 0) + 1
    found["trace"] = {
        **graph.summary(1),
        "captured": graph.captured,
        "unused": sorted(graph.unused),
        "notes": list(graph.notes),
        "folded": [[graph.classes[c].module_type, n] for c, n in counts.items()],
        "seconds": round(done.seconds["trace"], 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "batches": list(graph.traced_batches),
    }
    found["flops"] = [graph.flops_forward.at(_ORACLE_BATCH), graph.flops_backward.at(_ORACLE_BATCH)]
    found["tp"] = {
        "share": round(sharding.sharded_share, 3),
        "degrees": sharding.degrees_allowed(GPUS),
        "reasons": list(sharding.reasons),
    }
    mesh = plan.mesh
    found["plan"] = {
        "gpus": plan.hardware.gpus,
        "layout": {k: v for k, v in mesh.model_dump().items() if isinstance(v, int) and v > 1},
        "step_time_s": plan.predicted.step_time_s,
        "gap": plan.solver.gap,
        "seconds": {k: round(v, 2) for k, v in done.seconds.items()},
    }


def _oracle(member: Member, folder: Path, found: dict[str, Any]) -> None:
    """FLOPs, parameters and unused parameters as torch counts them, at the real size where that ends soon."""
    from oracle import count
    from tpplan.planner.fake_run import NEEDS_DATA
    from tpplan.planner.trace import trace

    target = _load(member, folder, small=False, precision=member.precision)
    model = target.build("meta")
    found["oracle"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": sum(b.numel() for b in model.buffers()),
    }
    del model
    seq, ours, unused = found.get("seq", 0), found.get("flops"), found.get("trace", {}).get("unused")
    on_small, real = member.oracle_small or ours is None, False
    if not on_small:
        try:
            torchs = count(target, _ORACLE_BATCH, seq, member.precision)
        except NEEDS_DATA:  # torch's counter cannot follow it without data
            on_small = real = True
    if on_small:
        precision = "fp32" if real else member.precision
        target, seq = _load(member, folder, small=True, precision=precision), member.small_seq
        graph = trace(target, sequence_length=seq, precision=precision)
        ours = [graph.flops_forward.at(_ORACLE_BATCH), graph.flops_backward.at(_ORACLE_BATCH)]
        unused = sorted(graph.unused)
        torchs = count(target, _ORACLE_BATCH, seq, precision, real)
    found["oracle"] |= {
        "seq": seq,
        "small": on_small,
        "real_data": real,
        "flops": [torchs.forward, torchs.backward],
        "flops_error": [ours[0] / torchs.forward - 1, ours[1] / torchs.backward - 1],
        "unused": sorted(torchs.unused),
        "without_gradient": len(torchs.without_gradient),
        "unused_equal": sorted(torchs.unused) == unused,
    }


def _saved(member: Member, folder: Path, found: dict[str, Any]) -> None:
    """Bytes kept for backward, traced against a real step of the small variant."""
    from oracle import saved_bytes
    from tpplan.planner.trace import trace

    target = _load(member, folder, small=True, precision="fp32")
    traced = trace(target, sequence_length=member.small_seq, precision="fp32").saved_bytes.at(_SAVED_BATCH)
    real = saved_bytes(target, _SAVED_BATCH, member.small_seq)
    found["saved"] = {"traced": traced, "real": real, "error": traced / real - 1}


def main() -> None:
    """Check the named member."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = check(by_name(given.name), Path(folder))
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
