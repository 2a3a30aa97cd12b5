"""What an assignment costs: exact bytes of every stage, and the simulated step time.

The planner's objective, `predicted` in a plan and the cost of a user's own layout are this one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..costmodels.schedules import StageTimes, Timeline, in_flight_vectors, simulate
from .problem import Assignment, Problem


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one pipeline rank: static + kept + transient + fixed.

    `kept_bytes` are what microbatches in flight keep in all of the rank's chunks (saved for backward, and received
    activations), at the worst moment of the schedule; `transient_bytes` is the largest of the rank's layers.
    """

    static_bytes: int
    kept_bytes: int
    transient_bytes: int
    fixed_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum that is judged against the limit."""
        return self.static_bytes + self.kept_bytes + self.transient_bytes + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The cost of one assignment: `step_time_s`, bytes of each pipeline rank, and where they come from.

    `stage_bytes` and `memory` have one entry a rank, `stages` one a chunk.
    """

    step_time_s: float
    stage_bytes: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    stages: tuple[StageTimes, ...]
    timeline: Timeline
    memory_bytes: int

    @property
    def fits(self) -> bool:
        """Whether every rank stays within the memory limit."""
        return max(self.stage_bytes) <= self.memory_bytes

    @property
    def shortfall(self) -> tuple[int, int]:
        """Bytes above the limit on the worst rank (0 if it fits), and that rank."""
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
    pp, m, v = problem.stages, problem.microbatches, problem.virtual
    stages = tuple(_chunk_times(problem, assignment, c) for c in range(problem.chunks))
    timeline = simulate(problem.schedule, stages, m, problem.step_fixed_s, v)
    vectors = in_flight_vectors(problem.schedule, pp, m, v)
    memory = tuple(_rank_memory(problem, assignment, s, vectors[s]) for s in range(pp))
    return Evaluation(
        step_time_s=timeline.step_time_s,
        stage_bytes=tuple(m.total_bytes for m in memory),
        memory=memory,
        stages=stages,
        timeline=timeline,
        memory_bytes=problem.memory_bytes,
    )


def _check(problem: Problem, assignment: Assignment) -> None:
    """One boundary a chunk, rising to the last layer, at legal cuts; one choice a layer."""
    n, boundaries, choices = len(problem.layers), assignment.boundaries, assignment.choices
    if len(boundaries) != problem.chunks or len(choices) != n or boundaries[-1] != n:
        raise ValueError(f"{len(boundaries)} boundaries and {len(choices)} choices do not fit {n} layers")
    if any(b <= a for a, b in zip((0, *boundaries), boundaries, strict=False)):
        raise ValueError(f"boundaries {boundaries} leave a stage empty")
    if problem.ends is not None and boundaries != problem.ends:
        raise ValueError(f"boundaries {boundaries} are not the given {problem.ends}")
    illegal = [b for b in boundaries[:-1] if not problem.layers[b - 1].cut_after]
    if illegal:
        raise ValueError(f"no stage may end after layer {illegal[0] - 1}")
    for layer, choice in zip(problem.layers, choices, strict=True):
        if not 0 <= choice < len(layer.choices):
            raise ValueError(f"choice {choice} of a layer with {len(layer.choices)} choices")


def _span(assignment: Assignment, chunk: int) -> range:
    """Positions of the layers of `chunk`."""
    return range(assignment.boundaries[chunk - 1] if chunk else 0, assignment.boundaries[chunk])


def _chunk_times(problem: Problem, assignment: Assignment, chunk: int) -> StageTimes:
    """Seconds of one chunk, layers added in order so that the sum is the same float everywhere."""
    forward = backward = first = last = tail = weight = 0.0
    for i in _span(assignment, chunk):
        choice = problem.layers[i].choices[assignment.choices[i]]
        forward += choice.forward_s
        backward += choice.backward_s
        first += choice.first_forward_extra_s
        last += choice.last_backward_extra_s
        tail += choice.tail_s
        weight += choice.weight_s
    ends = chunk + 1 == problem.chunks
    send = 0.0 if ends else problem.layers[assignment.boundaries[chunk] - 1].send_s
    return StageTimes(forward, backward, first, last, tail, send, weight)


def _rank_memory(
    problem: Problem, assignment: Assignment, rank: int, vectors: Sequence[tuple[int, ...]]
) -> StageMemory:
    """Bytes of one rank; `vectors` are the largest counts of microbatches in flight in its chunks."""
    chunks = range(rank, problem.chunks, problem.stages)
    static = transient = 0
    kept = []
    for c in chunks:
        chosen = [problem.layers[i].choices[assignment.choices[i]] for i in _span(assignment, c)]
        static += sum(choice.static_bytes for choice in chosen)
        received = problem.layers[assignment.boundaries[c - 1] - 1].cut_bytes if c else 0
        kept.append(sum(choice.saved_bytes for choice in chosen) + received)
        transient = max(transient, *(choice.transient_bytes for choice in chosen))
    return StageMemory(
        static_bytes=static,
        kept_bytes=max(sum(x * size for x, size in zip(vector, kept, strict=True)) for vector in vectors),
        transient_bytes=transient,
        fixed_bytes=problem.stage_fixed_bytes,
    )
