"""What an assignment costs: exact bytes of every stage, and the simulated step time.

The planner's objective, `predicted` in a plan and the cost of a user's own layout are this one function.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..costmodels.schedules import StageTimes, Timeline, simulate
from .problem import Assignment, Problem


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage: static + in_flight x (saved + cut) + transient + fixed.

    `saved_bytes` and `cut_bytes` (received activations) are per in-flight microbatch; `transient_bytes` is
    the largest of the stage's layers.
    """

    static_bytes: int
    saved_bytes: int
    cut_bytes: int
    in_flight: int
    transient_bytes: int
    fixed_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum that is judged against the limit."""
        kept = self.in_flight * (self.saved_bytes + self.cut_bytes)
        return self.static_bytes + kept + self.transient_bytes + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The cost of one assignment: `step_time_s`, `stage_bytes` [B], and where they come from."""

    step_time_s: float
    stage_bytes: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    stages: tuple[StageTimes, ...]
    timeline: Timeline
    memory_bytes: int

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the memory limit."""
        return max(self.stage_bytes) <= self.memory_bytes

    @property
    def shortfall(self) -> tuple[int, int]:
        """Bytes above the limit on the worst stage (0 if it fits), and that stage."""
        worst = max(self.stage_bytes)
        return max(0, worst - self.memory_bytes), self.stage_bytes.index(worst)


def evaluate(problem: Problem, assignment: Assignment) -> Evaluation:
    """Sum the layers of each stage in order, and simulate the schedule.

    Parameters
    ----------
    problem : Problem
    assignment : Assignment
        Memory may exceed the limit (see `Evaluation.fits`); the boundaries must be legal.

    Raises
    ------
    ValueError
        If the assignment does not belong to the problem: lengths, empty stages, or an illegal cut.

    Examples
    --------
    >>> from tpplan.planner.problem import Choice, Layer
    >>> layer = Layer(0, (Choice("none", 1.0, 2.0, static_bytes=10, saved_bytes=3),))
    >>> problem = Problem((layer,) * 4, stages=2, microbatches=4, schedule="1f1b", memory_bytes=100)
    >>> result = evaluate(problem, Assignment((2, 4), (0, 0, 0, 0)))
    >>> result.step_time_s, result.stage_bytes
    (30.0, (32, 26))
    """
    _check(problem, assignment)
    stages = tuple(_stage_times(problem, assignment, s) for s in range(problem.stages))
    timeline = simulate(problem.schedule, stages, problem.microbatches, problem.step_fixed_s)
    memory = tuple(_stage_memory(problem, assignment, s, x) for s, x in enumerate(timeline.in_flight))
    return Evaluation(
        step_time_s=timeline.step_time_s,
        stage_bytes=tuple(m.total_bytes for m in memory),
        memory=memory,
        stages=stages,
        timeline=timeline,
        memory_bytes=problem.memory_bytes,
    )


def _check(problem: Problem, assignment: Assignment) -> None:
    """One boundary a stage, rising to the last layer, at legal cuts; one choice a layer."""
    n, boundaries, choices = len(problem.layers), assignment.boundaries, assignment.choices
    if len(boundaries) != problem.stages or len(choices) != n or boundaries[-1] != n:
        raise ValueError(f"{len(boundaries)} boundaries and {len(choices)} choices do not fit {n} layers")
    if any(b <= a for a, b in zip((0, *boundaries), boundaries, strict=False)):
        raise ValueError(f"boundaries {boundaries} leave a stage empty")
    illegal = [b for b in boundaries[:-1] if not problem.layers[b - 1].cut_after]
    if illegal:
        raise ValueError(f"no stage may end after layer {illegal[0] - 1}")
    for layer, choice in zip(problem.layers, choices, strict=True):
        if not 0 <= choice < len(layer.choices):
            raise ValueError(f"choice {choice} of a layer with {len(layer.choices)} choices")


def _span(assignment: Assignment, stage: int) -> range:
    """Positions of the layers of `stage`."""
    return range(assignment.boundaries[stage - 1] if stage else 0, assignment.boundaries[stage])


def _stage_times(problem: Problem, assignment: Assignment, stage: int) -> StageTimes:
    """Seconds of one stage, layers added in order so that the sum is the same float everywhere."""
    forward = backward = first = last = tail = 0.0
    for i in _span(assignment, stage):
        choice = problem.layers[i].choices[assignment.choices[i]]
        forward += choice.forward_s
        backward += choice.backward_s
        first += choice.first_forward_extra_s
        last += choice.last_backward_extra_s
        tail += choice.tail_s
    send = problem.layers[assignment.boundaries[stage] - 1].send_s if stage + 1 < problem.stages else 0.0
    return StageTimes(forward, backward, first, last, tail, send)


def _stage_memory(problem: Problem, assignment: Assignment, stage: int, in_flight: int) -> StageMemory:
    """Bytes of one stage with `in_flight` microbatches."""
    chosen = [problem.layers[i].choices[assignment.choices[i]] for i in _span(assignment, stage)]
    return StageMemory(
        static_bytes=sum(choice.static_bytes for choice in chosen),
        saved_bytes=sum(choice.saved_bytes for choice in chosen),
        cut_bytes=problem.layers[assignment.boundaries[stage - 1] - 1].cut_bytes if stage else 0,
        in_flight=in_flight,
        transient_bytes=max(choice.transient_bytes for choice in chosen),
        fixed_bytes=problem.stage_fixed_bytes,
    )
