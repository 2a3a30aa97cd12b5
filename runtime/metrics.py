"""What a run measures: a JSON object a step, progress lines, and the closing table of predicted against measured."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from ..errors import UsageError
from ..planner.plan import Plan
from ..units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the metrics file.

    `grad_norm` is of all gradients, before clipping. `peak_memory_bytes` is the largest over ranks since the
    first step: of active CUDA memory, or on a CPU of the process's resident memory (`memory_kind`).
    """

    step: int
    loss: float
    grad_norm: float
    step_time_s: float
    tokens_per_s_per_gpu: float
    peak_memory_bytes: int
    memory_kind: str


class MetricsFile:
    """A JSON-lines file, written through after each step; without a path it writes nothing.

    Raises
    ------
    UsageError
        If the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  (open for the whole run)
            except OSError as error:
                raise UsageError(f"Cannot write {path}: {error.strerror}.", "Choose another --metrics file.") from None

    def write(self, record: StepRecord) -> None:
        """Append one step."""
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of active CUDA memory of this rank, or on a CPU of its process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_stats(device)["active_bytes.all.peak"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_kind(device: torch.device) -> str:
    """What `peak_memory_bytes` measures on this device."""
    return "active" if device.type == "cuda" else "process"


def progress_line(record: StepRecord, steps: int) -> str:
    """One step for people."""
    return (
        f"step {record.step:>{len(str(steps))}}/{steps}  loss {record.loss:.6f}  grad norm {record.grad_norm:.4g}  "
        f"{format_seconds(record.step_time_s)}  {record.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    )


def measured_step_time_s(times: Sequence[float]) -> tuple[float, int]:
    """Median step time without the warm-up, and how many steps that leaves out: up to 3, at most half.

    >>> measured_step_time_s([9.0, 5.0, 1.0, 2.0, 3.0, 1.5, 2.5])
    (2.25, 3)
    """
    skipped = min(3, len(times) // 2)
    return statistics.median(times[skipped:]), skipped


def closing_table(plan: Plan, times: Sequence[float], rank_peaks: Sequence[int], kind: str) -> str:
    """Predicted and measured step time and memory, side by side; `rank_peaks` has one for each pipeline rank."""
    measured, skipped = measured_step_time_s(times)
    predicted = plan.predicted.step_time_s
    rows = [("", "predicted", "measured", "measured/predicted")]
    rows.append(("step time", format_seconds(predicted), format_seconds(measured), f"{measured / predicted:.2f}"))
    for rank, peak in enumerate(rank_peaks):
        expected = plan.predicted.peak_memory_bytes[rank]
        chunks = [str(stage.index) for stage in plan.stages if stage.pipeline_rank == rank]
        stages = f"stage{'s' if len(chunks) > 1 else ''} {', '.join(chunks)}"
        label = f"peak memory, {stages}" if len(rank_peaks) > 1 else "peak memory"
        rows.append((label, format_bytes(expected), format_bytes(peak), f"{peak / max(expected, 1):.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"Step time: median of {len(times) - skipped} steps after {skipped} of warm-up.")
    if kind == "process":
        lines.append("Memory measured on a CPU is the whole process's, with Python and torch: not comparable.")
    return "\n".join(lines)
