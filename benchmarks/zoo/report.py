"""Write docs/zoo.md from the results of run.py.

python benchmarks/zoo/report.py [results.json] [docs/zoo.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from members import MEMBERS
from run import RESULTS

HERE = Path(__file__).resolve().parent

DOC = HERE.parents[1] / "docs" / "zoo.md"
_SHORT = {
    "tensor_parallel_degree": "tp",
    "pipeline_parallel_degree": "pp",
    "data_parallel_replicate_degree": "ddp",
    "data_parallel_shard_degree": "fsdp",
}
Result = Mapping[str, Any]


def count(n: float) -> str:
    """A count with three digits and a letter.

    >>> count(6738415616), count(124e6), count(900)
    ('6.74B', '124M', '900')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.0f}"


def is_captured(m: Result) -> bool:
    """Traced, with at most a fifth of the FLOPs in opaque parts."""
    return bool(m.get("trace", {}).get("captured"))


def ran(m: Result, layout: str) -> bool:
    """Executed with loss and gradients equal; with tp, at least half of the parameter bytes sharded."""
    run = m.get("runs", {}).get(layout)
    return bool(run and run["equal"] and (not layout.startswith("tp") or run["sharded_share"] >= 0.5))


def counts_match(m: Result) -> bool:
    """Parameters, buffers, FLOPs and unused parameters as torch counts them."""
    trace, oracle = m.get("trace", {}), m.get("oracle", {})
    if "flops_error" not in oracle or not trace:
        return False
    same = trace["parameters"] == oracle["parameters"] and trace["buffers"] == oracle["buffers"]
    return same and oracle["unused_equal"] and not any(oracle["flops_error"])


def _run_cell(m: Result, layout: str) -> str:
    run = m.get("runs", {}).get(layout)
    if run is None:
        return "–"
    if run["equal"]:
        return f"equal, {run['sharded_share']:.0%}" if layout.startswith("tp") else "equal"
    if run["error"]:
        return "not possible" if "InfeasibleError" in run["error"] else "fails"
    return f"differs ({max(run['loss_error'], run['worst_gradient_error']):.0e})"


def _flops_cell(m: Result) -> str:
    oracle = m.get("oracle", {})
    if "flops_error" not in oracle:
        return "–"
    forward, backward = oracle["flops_error"]
    where = " (small)" if oracle["small"] else ""
    return f"equal{where}" if not forward and not backward else f"{forward:+.2%}, {backward:+.2%}{where}"


def _saved_cell(m: Result) -> str:
    saved = m.get("saved")
    if saved is None:
        return "–"
    return "equal" if not saved["error"] else f"{saved['error']:+.2%}"


def _captured_cell(m: Result) -> str:
    trace = m.get("trace")
    if trace is None:
        return "no"
    opaque = sum(part["flops_share"] for part in trace["opaque"])
    extended = any("extended to" in note for note in trace["notes"])
    text = "yes" if is_captured(m) else "no"
    if trace["opaque"]:
        text += f", {opaque:.0%} opaque"
    return text + (", extended" if extended else "")


def _plan_cell(m: Result) -> str:
    plan = m.get("plan")
    if plan is None:
        return "–"
    degrees = " x ".join(f"{short}{plan['layout'][k]}" for k, short in _SHORT.items() if k in plan["layout"])
    return f"{plan['gpus']}: {degrees or 'one GPU'}"


def _row(m: Result) -> Sequence[str]:
    trace = m.get("trace", {})
    flops = m.get("flops")
    return (
        m["name"],
        m["library"],
        _captured_cell(m),
        f"{trace['layers']} / {trace['classes']}" if trace else "–",
        count(m.get("oracle", {}).get("parameters", 0)),
        count(sum(flops) / 2) if flops else "–",
        _flops_cell(m),
        _saved_cell(m),
        f"{trace['seconds']:.1f}" if trace else "–",
        _plan_cell(m),
        _run_cell(m, "tp=2"),
        _run_cell(m, "pp=2"),
    )


_HEAD = (
    "member", "library", "captured", "units / classes", "parameters", "FLOPs a sample", "FLOPs against torch",
    "saved bytes against a real step", "trace s", "GPUs: plan", "tp 2", "pp 2",
)  # fmt: skip


def _table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _summary(members: Sequence[Result]) -> Iterator[str]:
    total = len(members)
    both = [m for m in members if ran(m, "tp=2") and ran(m, "pp=2")]
    figures = (
        ("captured (at most 20 % of the FLOPs opaque)", sum(is_captured(m) for m in members)),
        ("planned", sum("plan" in m for m in members)),
        ("parameters, buffers, unused parameters and FLOPs equal to torch's", sum(counts_match(m) for m in members)),
        (
            "saved bytes within 1 % of a real step",
            sum(abs(m.get("saved", {"error": 1})["error"]) <= 0.01 for m in members),
        ),
        ("executed with tp = 2, at least half of the bytes sharded, equal", sum(ran(m, "tp=2") for m in members)),
        ("executed with pp = 2, equal", sum(ran(m, "pp=2") for m in members)),
        ("executed with both", len(both)),
    )
    yield from _table(((what, f"{n} of {total}") for what, n in figures), ("", "members"))


def _lists(members: Sequence[Result]) -> Iterator[str]:
    """What is not as it should be, member by member."""
    yield "## Opaque parts\n"
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for m in members:
        for part in m.get("trace", {}).get("opaque", []):
            alike.setdefault((m["name"], part["reason"]), []).append(part)
    for (name, reason), parts in alike.items():
        where = parts[0]["fqn"] or "the model itself"
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        yield f"- {name}, `{where}`{more} ({sum(p['flops_share'] for p in parts):.1%} of the FLOPs): {reason}"
    if not alike:
        yield "None."
    yield "\n## Parameters that no operator reads\n"
    for m in members:
        unused = m.get("trace", {}).get("unused")
        if unused:
            yield f"- {m['name']}: {len(unused)}, the first `{unused[0]}`"
    yield "\n## Where tensor parallelism is not possible\n"
    for m in members:
        run = m.get("runs", {}).get("tp=2", {})
        if "InfeasibleError" in run.get("error", ""):
            reason = run["error"].partition(": ")[2].replace("|", "\\|")
            yield f"- {m['name']}: {reason}"
    yield "\n## What fails or differs\n"
    for m in members:
        for step, error in m["errors"].items():
            yield f"- {m['name']}, {step}: {error[:300]}"
        for layout, run in m.get("runs", {}).items():
            if not run["equal"] and "InfeasibleError" not in run["error"]:
                worst = f"gradient of {run['worst_gradient']} differs by {run['worst_gradient_error']}"
                yield f"- {m['name']}, {layout}: {run['error'][:300] or worst}"
    yield "\n## Not executed\n"
    for m in members:
        if m.get("why_not_executed"):
            yield f"- {m['name']}: {m['why_not_executed']}"


def _environments(results: Mapping[str, Any]) -> Iterator[str]:
    """Which members ran where, and on which tree."""
    for tree, where in results["environments"].items():
        names = [name for name, m in results["members"].items() if m["tree"] == tree]
        if names:
            listed = f": {', '.join(sorted(names))}" if len(names) < len(results["members"]) / 2 else ""
            yield (
                f"- {len(names)} members on {where['date']}, torch {where['torch']}, transformers"
                f" {where['transformers']}, Python {where['python']}, {where['cpus']} CPU cores, tree {tree}{listed}."
            )


def document(results: Mapping[str, Any]) -> str:
    """docs/zoo.md."""
    members = [results["members"][m.name] for m in MEMBERS if m.name in results["members"]]
    lines = [
        "# The zoo: architectures that tpplan traces, plans and runs",
        "",
        "Written by `benchmarks/zoo/report.py` from runs of `benchmarks/zoo/run.py`:",
        "",
        *_environments(results),
        "",
        *_summary(members),
        "",
        "Each member is traced at the size in its config (no memory is needed for weights) and planned for 16 H100, or"
        " the smallest power of two above that holds its training state. *Extended*: a loop over time steps was traced"
        " at short lengths and extended. *FLOPs a sample*: forward and backward. *FLOPs against torch*: torch's"
        " FlopCounterMode on the whole unfolded model, with formulas for what it lacks (benchmarks/zoo/oracle.py);"
        " *(small)*: at the small size, because the whole model takes too long without folding or looks at its data."
        " *Saved bytes*: what a real float32 CPU step of the small variant keeps for backward. *tp 2* and *pp 2*: the"
        " planner's plan of the small variant run on two gloo processes in float64, loss and every gradient equal to"
        " one process within 1e-9 (the rule is in tests/runtime/numeric.py), with the share of the parameter bytes"
        " that tp divides.",
    ]
    for family in dict.fromkeys(m.family for m in MEMBERS):
        rows = [_row(m) for m in members if m["family"] == family]
        if rows:
            lines += ["", f"## {family[0].upper()}{family[1:]}", "", *_table(rows, _HEAD)]
    return "\n".join([*lines, "", *_lists(members), ""])


def main() -> None:
    """Write the page."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else DOC
    target.write_text(document(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
