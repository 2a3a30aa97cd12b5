"""The ranking for people: different layouts with what they cost; what the model cannot tell apart in order of use.

The cost model is not exact, so plans whose predicted step times are close are no ranking: over the layouts of one
model that were measured (docs/accuracy.md) the relative errors spread by a standard deviation of 3.4 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .plan import Alternative, Plan
from .planning import Solved

TIED = 0.03
MARGIN_STEP = 0.05  # of the limit: memory margins closer than that are alike


def alternatives(solved: Solved, fields: dict[str, Any]) -> list[Alternative]:
    """The ranked layouts after the first, in the order of `in_order`; `fields` as for `assemble.build_plan`."""
    if len(solved.result.ranking) < 2:
        return []
    best_s = solved.result.ranking[0].evaluation.step_time_s
    rows = [row_of(solved.plan(ranked, fields), best_s) for ranked in solved.result.ranking[1:]]
    return in_order(rows, solved.request.memory_limit_bytes)


def row_of(plan: Plan, best_s: float) -> Alternative:
    """A plan as a row of a ranking whose best step takes `best_s`."""
    return Alternative(
        mesh=plan.mesh,
        microbatch_size=plan.batch.microbatch_size,
        microbatches=plan.batch.microbatches,
        schedule=plan.schedule.name,
        virtual_stages=plan.schedule.virtual_stages,
        recompute=recompute_text([mode for stage in plan.stages for mode in stage.recompute.values()]),
        zero_stage=plan.sharding.zero_stage,
        step_time_s=plan.predicted.step_time_s,
        device_bytes=max(plan.predicted.device_bytes),
        tied=plan.predicted.step_time_s <= best_s * (1 + TIED),
        fix=pins_of(plan),
    )


def in_order(rows: Sequence[Alternative], memory_limit_bytes: int) -> list[Alternative]:
    """Tied layouts first, by memory margin (in steps of `MARGIN_STEP`) and then by simplicity; the others by time."""

    def key(row: Alternative) -> tuple:
        if not row.tied:
            return (1, row.step_time_s)
        margin = (memory_limit_bytes - row.device_bytes) / memory_limit_bytes
        return (0, -round(margin / MARGIN_STEP), axes_in_use(row), row.step_time_s)

    return sorted(rows, key=key)


def axes_in_use(row: Alternative) -> int:
    """How many kinds of parallelism and other measures a layout needs: the fewer, the simpler."""
    m = row.mesh
    degrees = (
        m.tensor_parallel_degree,
        m.pipeline_parallel_degree,
        m.data_parallel_replicate_degree,
        m.data_parallel_shard_degree,
        row.virtual_stages,
    )
    return sum(degree > 1 for degree in degrees) + (row.recompute != "none")


def recompute_text(modes: Sequence[str]) -> str:
    """Recomputation by count of units.

    >>> recompute_text(["full", "selective", "full"])
    'full in 2, selective in 1'
    """
    counts = {mode: modes.count(mode) for mode in sorted(set(modes))}
    return ", ".join(f"{mode} in {n}" for mode, n in counts.items()) or "none"


def pins_of(plan: Plan) -> list[str]:
    """The values of `--fix` that make a plan's mesh the only one of its kind."""
    m = plan.mesh
    fixed = [
        f"tp={m.tensor_parallel_degree}",
        f"pp={m.pipeline_parallel_degree}",
        f"dp_replicate={m.data_parallel_replicate_degree}",
        f"dp_shard={m.data_parallel_shard_degree}",
        f"microbatch_size={plan.batch.microbatch_size}",
        f"gradient_sync={plan.schedule.gradient_sync}",
    ]
    if m.pipeline_parallel_degree > 1:
        fixed += [f"schedule={plan.schedule.name}", f"virtual={plan.schedule.virtual_stages}"]
    if m.tensor_parallel_degree > 1:
        fixed.append(f"sequence_parallel={'on' if plan.tensor_parallel.sequence_parallel else 'off'}")
    return fixed
