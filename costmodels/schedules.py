"""The event simulator of pipeline schedules: the one definition of step time.

Every stage runs its forwards (F) and backwards (B) in the fixed order of `schedule_order`, one at a time; a
forward waits for the same microbatch's forward on the stage before, a backward for the backward on the stage
after, each plus one transfer. Planner, estimate and reports all call `simulate`, and the ILP learns its
critical paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one pipeline stage.

    forward_s, backward_s : one microbatch
    first_forward_extra_s, last_backward_extra_s : once a step, on the first forward and on the last backward
    tail_s : once a step, after the last backward (optimizer)
    send_s : one transfer to the next stage; the gradient coming back over the same cut takes as long
    """

    forward_s: float
    backward_s: float
    first_forward_extra_s: float = 0.0
    last_backward_extra_s: float = 0.0
    tail_s: float = 0.0
    send_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """One forward ("F") or backward ("B") of one microbatch on one stage."""

    stage: int
    kind: str
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """How often each stage time lies on one longest chain of events; every tuple has one entry a stage.

    A chain is a lower bound of the step under *any* stage times, which makes it a cut for the ILP:
    step >= sum_s forward[s] F_s + backward[s] B_s + first[s] + last[s] + tail[s] + send[s], times seconds.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    first_forward: tuple[int, ...]
    last_backward: tuple[int, ...]
    tail: tuple[int, ...]
    send: tuple[int, ...]

    def length_s(self, stages: Sequence[StageTimes]) -> float:
        """Seconds of this chain when the stages take `stages`."""
        return sum(
            self.forward[s] * t.forward_s
            + self.backward[s] * t.backward_s
            + self.first_forward[s] * t.first_forward_extra_s
            + self.last_backward[s] * t.last_backward_extra_s
            + self.tail[s] * t.tail_s
            + self.send[s] * t.send_s
            for s, t in enumerate(stages)
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step.

    step_time_s : end of the last stage's tail + step_fixed_s
    in_flight : per stage, the most microbatches between the start of F and the end of B
    bubble_fraction : idle / total over all stages, without step_fixed_s
    critical_path : one longest chain (ties: the lower stage, and the event before on the same stage)
    """

    schedule: str
    microbatches: int
    step_time_s: float
    in_flight: tuple[int, ...]
    bubble_fraction: float
    critical_path: CriticalPath
    ends_s: tuple[float, ...]
    durations_s: tuple[float, ...]

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, in an order in which each comes after what it waits for."""
        keys = _programme(self.schedule, len(self.in_flight), self.microbatches).keys
        return tuple(
            Event(stage, kind, microbatch, end - duration, end)
            for (stage, kind, microbatch), end, duration in zip(keys, self.ends_s, self.durations_s, strict=True)
        )


def schedule_order(schedule: str, stages: int, microbatches: int) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The order of (kind, microbatch) on each stage.

    With 3 stages and 4 microbatches (columns are the order on one stage, not time)::

        1f1b     stage 0   F0 F1 F2 B0 F3 B1 B2 B3     warm-up: min(M, pp - s) forwards,
                 stage 1   F0 F1 B0 F2 B1 F3 B2 B3     then one backward, one forward,
                 stage 2   F0 B0 F1 B1 F2 B2 F3 B3     then the backwards left
        gpipe    each      F0 F1 F2 F3 B0 B1 B2 B3

    Parameters
    ----------
    schedule : str
        "1f1b" (PipeDream-Flush, Narayanan et al. 2021, arXiv:2104.04473; torch's Schedule1F1B) or "gpipe"
        (Huang et al. 2019, arXiv:1811.06965; torch's ScheduleGPipe).
    stages, microbatches : int
        pp and M, both at least 1.

    Raises
    ------
    ValueError
        For another schedule, or counts below 1.

    Examples
    --------
    >>> schedule_order("1f1b", 2, 2)
    ((('F', 0), ('F', 1), ('B', 0), ('B', 1)), (('F', 0), ('B', 0), ('F', 1), ('B', 1)))
    """
    if stages < 1 or microbatches < 1:
        raise ValueError(f"a schedule needs at least one stage and one microbatch, not {stages} and {microbatches}")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    order = []
    for s in range(stages):
        warm_up = microbatches if schedule == "gpipe" else min(microbatches, stages - s)
        row = [("F", m) for m in range(warm_up)]
        for m in range(microbatches):
            row.append(("B", m))
            if warm_up + m < microbatches:
                row.append(("F", warm_up + m))
        order.append(tuple(row))
    return tuple(order)


@dataclass(frozen=True, slots=True)
class _Programme:
    """A schedule compiled for the inner loop: events in topological order.

    `steps[i]` = (index of the event before on the stage, index of the event waited for, index of that
    transfer's seconds, index of the duration); index N = "none" for events, index pp = "no transfer".
    Durations are indexed 4 s + (0 F, 1 first F, 2 B, 3 last B).
    """

    keys: tuple[tuple[int, str, int], ...]
    steps: tuple[tuple[int, int, int, int], ...]
    last: tuple[int, ...]


@lru_cache(maxsize=256)
def _programme(schedule: str, pp: int, microbatches: int) -> _Programme:
    """The compiled schedule; a pure function of three small values, hence remembered."""
    order = schedule_order(schedule, pp, microbatches)
    none = 2 * pp * microbatches
    index: dict[tuple[int, str, int], int] = {}
    steps = []
    done, before = [0] * pp, [none] * pp
    while len(steps) < none:
        for s in range(pp):
            while done[s] < len(order[s]):
                kind, m = order[s][done[s]]
                neighbour = s - 1 if kind == "F" else s + 1
                waits = 0 <= neighbour < pp
                if waits and (neighbour, kind, m) not in index:
                    break
                transfer = (s - 1 if kind == "F" else s) if waits else pp
                source = index[(neighbour, kind, m)] if waits else none
                edge = m == 0 if kind == "F" else m == microbatches - 1
                steps.append((before[s], source, transfer, 4 * s + 2 * (kind == "B") + edge))
                before[s] = index[(s, kind, m)] = len(steps) - 1
                done[s] += 1
    return _Programme(tuple(index), tuple(steps), tuple(before))


@lru_cache(maxsize=1024)
def in_flight_microbatches(schedule: str, stages: int, microbatches: int) -> tuple[int, ...]:
    """The most microbatches each stage holds at once, read off the schedule's own order.

    >>> in_flight_microbatches("1f1b", 4, 8), in_flight_microbatches("gpipe", 2, 8)
    ((4, 3, 2, 1), (8, 8))
    """
    most = []
    for row in schedule_order(schedule, stages, microbatches):
        held = [0]
        for kind, _ in row:
            held.append(held[-1] + (1 if kind == "F" else -1))
        most.append(max(held))
    return tuple(most)


def simulate(schedule: str, stages: Sequence[StageTimes], microbatches: int, step_fixed_s: float = 0.0) -> Timeline:
    """Play one step of `schedule` and return its timeline.

    start(e) = max(end(event before on the stage), end(event waited for) + send),
    end(e) = start(e) + duration(e),
    step_time_s = max_s(end(last backward of s) + tail_s) + step_fixed_s.

    Transfers are latency: they overlap with compute. One stage is M forwards and backwards in turn (gradient
    accumulation).

    Parameters
    ----------
    schedule : str
        See `schedule_order`.
    stages : sequence of StageTimes
        One a stage, first to last [s].
    microbatches : int
        M, microbatches of one step.
    step_fixed_s : float
        Added once [s].

    Raises
    ------
    ValueError
        For an unknown schedule, no stages or no microbatches.

    Examples
    --------
    Equal stages without transfers take (M + pp - 1)(F + B):

    >>> simulate("1f1b", [StageTimes(1.0, 2.0)] * 4, 8).step_time_s
    33.0
    """
    pp = len(stages)
    programme = _programme(schedule, pp, microbatches)
    durations = []
    for t in stages:
        durations += [t.forward_s, t.forward_s + t.first_forward_extra_s]
        durations += [t.backward_s, t.backward_s + t.last_backward_extra_s]
    latencies = [t.send_s for t in stages]
    latencies[-1] = 0.0
    latencies.append(0.0)
    ends: list[float] = [0.0] * (len(programme.steps) + 1)
    for i, (before, source, transfer, duration) in enumerate(programme.steps):
        ready, arrives = ends[before], ends[source] + latencies[transfer]
        ends[i] = (ready if ready >= arrives else arrives) + durations[duration]
    finish = [ends[programme.last[s]] + t.tail_s for s, t in enumerate(stages)]
    makespan = max(finish)
    busy = sum(
        microbatches * (t.forward_s + t.backward_s) + (t.first_forward_extra_s + t.last_backward_extra_s + t.tail_s)
        for t in stages
    )
    return Timeline(
        schedule=schedule,
        microbatches=microbatches,
        step_time_s=makespan + step_fixed_s,
        in_flight=in_flight_microbatches(schedule, pp, microbatches),
        bubble_fraction=max(0.0, 1 - busy / (pp * makespan)) if makespan > 0 else 0.0,
        critical_path=_critical_path(programme, ends, latencies, finish.index(makespan)),
        ends_s=tuple(ends[:-1]),
        durations_s=tuple(durations[step[3]] for step in programme.steps),
    )


def _critical_path(
    programme: _Programme, ends: Sequence[float], latencies: Sequence[float], last_stage: int
) -> CriticalPath:
    """Walk back from the event that ends last, at each event to the one that let it start."""
    pp, none = len(programme.last), len(programme.steps)
    counts = [0] * (4 * pp)
    sends = [0] * (pp + 1)
    event = programme.last[last_stage]
    while event != none:
        before, source, transfer, duration = programme.steps[event]
        counts[duration] += 1
        arrives = ends[source] + latencies[transfer]
        if source != none and (before == none or arrives > ends[before]):
            sends[transfer] += 1
            event = source
        else:
            event = before
    return CriticalPath(
        forward=tuple(counts[4 * s] + counts[4 * s + 1] for s in range(pp)),
        backward=tuple(counts[4 * s + 2] + counts[4 * s + 3] for s in range(pp)),
        first_forward=tuple(counts[4 * s + 1] for s in range(pp)),
        last_backward=tuple(counts[4 * s + 3] for s in range(pp)),
        tail=tuple(int(s == last_stage) for s in range(pp)),
        send=tuple(sends[:pp]),
    )
