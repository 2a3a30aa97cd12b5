"""The text that `tpplan suggest` and `hardware` print, as rich renderables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..planner.alternatives import TIED, in_order, row_of
from ..planner.plan import AXES, Baseline, MeshSection, Plan
from ..units import format_count, format_seconds, gib


def mesh_text(mesh: MeshSection) -> str:
    """A mesh in one word.

    >>> mesh_text(MeshSection(tensor_parallel_degree=2, data_parallel_shard_degree=8))
    'tp2 x fsdp8'
    """
    parts = [
        ("tp", mesh.tensor_parallel_degree),
        ("pp", mesh.pipeline_parallel_degree),
        ("ddp", mesh.data_parallel_replicate_degree),
        ("fsdp", mesh.data_parallel_shard_degree),
    ]
    return " x ".join(f"{name}{degree}" for name, degree in parts if degree > 1) or "one GPU"


def recompute_text(plan: Plan) -> str:
    """How many units run with each recomputation mode."""
    counts: dict[str, int] = {}
    total = 0
    for stage in plan.stages:
        total += len(stage.modules)
        for mode in stage.recompute.values():
            counts[mode] = counts.get(mode, 0) + 1
    if not counts:
        return "none"
    return ", ".join(f"{mode} in {n}" for mode, n in sorted(counts.items())) + f" of {total} units"


def plan_screen(plan: Plan) -> RenderableType:
    """The plan for people: what, how fast, how full, compared with what, and how sure."""
    return Group(
        _heading(plan),
        _facts(plan),
        _memory(plan),
        _ranking(plan),
        _comparison(plan),
        _certificate(plan),
        _list("Assumed (change with the flag)", plan.assumptions),
        _list("Notes", plan.notes),
    )


def _heading(plan: Plan) -> Text:
    m = plan.model
    text = Text()
    text.append(f"{m.name}", style="bold")
    text.append(f": {format_count(m.parameters)} parameters")
    if m.trainable_parameters != m.parameters:
        text.append(f" ({format_count(m.trainable_parameters)} trainable)")
    text.append(f", {m.layers} units in {m.classes} classes, on {plan.hardware.gpus} x {plan.hardware.name}\n")
    text.append("Plan: ", style="bold")
    text.append(mesh_text(plan.mesh), style="bold green")
    b = plan.batch
    text.append(f", {b.microbatches} microbatch{'es' if b.microbatches > 1 else ''} of {b.microbatch_size} per replica")
    if plan.tensor_parallel.sequence_parallel:
        text.append(", sequence parallel")
    if plan.mesh.pipeline_parallel_degree > 1:
        text.append(f", schedule {_schedule_text(plan.schedule.name, plan.schedule.virtual_stages)}")
    if plan.mesh.data_parallel_shard_degree > 1:
        kept = sum(len(stage.kept_gathered) for stage in plan.stages)
        text.append(f", ZeRO-{plan.sharding.zero_stage}" + (f" (ZeRO-2 in {kept} units)" if kept else ""))
    if plan.mesh.data_parallel_degree > 1 and b.microbatches > 1:
        text.append(
            f", gradients reduced {'every' if plan.schedule.gradient_sync == 'every' else 'after the last'} microbatch"
        )
    text.append(f", recompute {recompute_text(plan)}")
    if inner := innermost(plan.mesh):
        text.append(f", ranks of {inner} are neighbours")
    if not plan.schedule.runnable:
        text.append(
            f"\nThis plan cannot be run yet: tpplan run knows no {plan.schedule.name} schedule.", style="bold red"
        )
    return text


def innermost(mesh: MeshSection) -> str:
    """The innermost axis of a mesh whose order is not the usual one (tp inside shards inside replicas inside stages).

    >>> innermost(MeshSection(pipeline_parallel_degree=2, data_parallel_shard_degree=8,
    ...                       order=["dp_shard", "dp_replicate", "cp", "tp", "pp"]))
    'pp'
    """
    degrees = {
        "tp": mesh.tensor_parallel_degree,
        "pp": mesh.pipeline_parallel_degree,
        "dp_replicate": mesh.data_parallel_replicate_degree,
        "dp_shard": mesh.data_parallel_shard_degree,
    }
    used = [axis for axis in mesh.order if degrees.get(axis, 1) > 1]
    return used[-1] if used != [axis for axis in AXES if axis in used] else ""


def _facts(plan: Plan) -> Table:
    p = plan.predicted
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("Step time", format_seconds(p.step_time_s), _parts(p.breakdown_s, p.step_time_s))
    rate = f"{p.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    table.add_row("Throughput", rate, f"{p.samples_per_s:,.1f} samples/s, MFU {p.mfu:.1%} of {plan.hardware.peak_name}")
    return table


def _parts(parts: Mapping[str, float], total: float) -> str:
    shown = [(name, s) for name, s in parts.items() if abs(s) > 0.002 * total]
    return ", ".join(f"{name.replace('_', ' ')} {s / total:.0%}" for name, s in shown)


def _memory(plan: Plan) -> Table:
    limit = plan.hardware.memory_limit_bytes
    table = Table(
        title="Memory by pipeline rank (GiB)",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    names = [n for n in plan.predicted.memory_bytes[0] if any(s[n] for s in plan.predicted.memory_bytes)]
    for column in ("rank", "units", *names, "device", "of limit"):
        table.add_column(column, justify="right")
    units = Counter[int]()  # a rank of an interleaved pipeline runs several of the plan's stages
    for stage in plan.stages:
        units[stage.pipeline_rank] += len(stage.modules)
    for (rank, count), parts, device in _sample(
        list(zip(sorted(units.items()), plan.predicted.memory_bytes, plan.predicted.device_bytes, strict=True))
    ):
        cells = [f"{gib(parts[n]):.1f}" for n in names]
        table.add_row(
            str(rank),
            str(count),
            *cells,
            f"{gib(device):.1f}",
            f"{device / limit:.0%}",
        )
    return table


def _sample(rows: Sequence[Any], most: int = 8) -> Iterable[Any]:
    """All rows, or the first and last ones of a long pipeline."""
    return rows if len(rows) <= most else [*rows[: most // 2], *rows[-(most // 2) :]]


def _comparison(plan: Plan) -> Table:
    table = Table(title="Against", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("layout", "mesh", "microbatch", "recompute", "step", "this plan is"):
        table.add_column(column)
    for baseline in plan.baselines:
        table.add_row(*_baseline_cells(plan, baseline))
    return table


def _baseline_cells(plan: Plan, baseline: Baseline) -> list[str]:
    cells = [baseline.name, mesh_text(baseline.mesh), str(baseline.microbatch_size), baseline.recompute]
    if baseline.step_time_s is None:
        return [*cells, "-", "the one that fits"]
    ratio = baseline.step_time_s / plan.predicted.step_time_s
    return [*cells, format_seconds(baseline.step_time_s), f"{ratio:.2f}x as fast"]


def _ranking(plan: Plan) -> RenderableType:
    """The layouts of the ranking, the plan among them; those that are tied in the order of memory margin."""
    if not plan.alternatives:
        return Text("")
    limit = plan.hardware.memory_limit_bytes
    own = row_of(plan, plan.predicted.step_time_s)
    title = f"Layouts (> this plan; * tied within {TIED:.0%}: by memory left)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("", "layout", "batches", "schedule", "recompute", "step", "slower", "GiB left"):
        table.add_column(column, no_wrap=column not in ("recompute", "GiB left"))
    for row in in_order([own, *plan.alternatives], limit):
        schedule = _schedule_text(row.schedule, row.virtual_stages)
        table.add_row(
            (">" if row is own else "") + ("*" if row.tied else ""),
            mesh_text(row.mesh),
            f"{row.microbatches} x {row.microbatch_size}",
            schedule if row.mesh.pipeline_parallel_degree > 1 else "-",
            row.recompute,
            format_seconds(row.step_time_s),
            f"{row.step_time_s / own.step_time_s - 1:.1%}",
            f"{gib(limit - row.device_bytes):.1f}",
        )
    return table


def _schedule_text(name: str, virtual_stages: int) -> str:
    return f"{name} v{virtual_stages}" if virtual_stages > 1 else name


def _certificate(plan: Plan) -> RenderableType:
    """What was proven, over how many combinations, closed by what, in which time; and what the space leaves out."""
    s = plan.solver
    pruned = ", ".join(f"{n} by {name}" for name, n in s.pruned.items() if n) or "none"
    sure = f"gap {s.gap:.2%}" + ("" if s.status == "optimal" else ", the search was cut short")
    proof = (
        f"Proof: step time is at least {format_seconds(s.lower_bound_s)} for every plan of the searched space "
        f"({sure}); {s.candidates} combinations: {s.infeasible} do not fit, pruned: {pruned}, "
        f"{s.solved} solved by {s.name} {s.version}."
    )
    lines = [proof, *(f"{said[0].upper()}{said[1:]}." for said in s.proofs)]
    if s.seconds:
        lines.append(f"Seconds: {s.wall_s:.1f} in all; {_seconds(s.seconds)}.")
    return Group(Text("\n".join(lines), style="dim"), _list("Searched space", s.space))


def _seconds(seconds: Mapping[str, float]) -> str:
    """Wall time by phase; the parts of the search, summed over its processes, in brackets."""
    phases = [f"{name} {s:.1f}" for name, s in seconds.items() if ": " not in name]
    parts = [f"{name.partition(': ')[2]} {s:.1f}" for name, s in seconds.items() if ": " in name]
    return ", ".join(phases) + (f" (of the search, over all processes: {', '.join(parts)})" if parts else "")


def _list(title: str, lines: Sequence[str]) -> RenderableType:
    if not lines:
        return Text("")
    return Group(Text(title, style="bold"), *(Text(f"  {line}") for line in lines))


def frame_table(frame: Any) -> Table:
    """A pandas data frame as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in frame.columns:
        table.add_column(str(column))
    for row in frame.itertuples(index=False):
        table.add_row(*(str(cell) for cell in row))
    return table
