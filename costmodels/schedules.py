"""The event simulator of pipeline schedules: the one definition of step time.

The layers are cut into chunks; chunk c runs on rank c mod pp (one chunk a rank, v chunks under "interleaved"). Every
rank runs its forwards (F), backwards (B) and, under "zb", weight gradients (W) in the fixed order of
`schedule_order`, one at a time; a forward waits for the same microbatch's forward of the chunk before, a backward
for the backward of the chunk after, each plus one transfer. Planner, estimate and reports all call `simulate`, and
the ILP learns its critical paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb")


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one chunk of the pipeline (of one stage, where each rank has one chunk).

    forward_s, backward_s : one microbatch
    first_forward_extra_s, last_backward_extra_s : once a step, on the first forward and on the last backward
    tail_s : once a step, after the rank's last backward (optimizer)
    send_s : one transfer to the next chunk; the gradient coming back over the same cut takes as long
    weight_s : the part of backward_s that only makes gradients of weights; "zb" runs it by itself, later
    """

    forward_s: float
    backward_s: float
    first_forward_extra_s: float = 0.0
    last_backward_extra_s: float = 0.0
    tail_s: float = 0.0
    send_s: float = 0.0
    weight_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """One forward ("F"), backward ("B") or weight gradient ("W") of one microbatch in one chunk."""

    stage: int
    kind: str
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """How often each chunk time lies on one longest chain of events; every tuple has one entry a chunk.

    A chain is a lower bound of the step under *any* chunk times, which makes it a cut for the ILP:
    step >= sum_c forward[c] F_c + backward[c] B_c + first[c] + last[c] + tail[c] + send[c] + weight[c] W_c, times
    seconds. Under "zb" `backward` counts backwards without their weights' part: those count B_c and `weight` -W_c.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    first_forward: tuple[int, ...]
    last_backward: tuple[int, ...]
    tail: tuple[int, ...]
    send: tuple[int, ...]
    weight: tuple[int, ...] = ()

    def length_s(self, chunks: Sequence[StageTimes]) -> float:
        """Seconds of this chain when the chunks take `chunks`."""
        return sum(
            self.forward[c] * t.forward_s
            + self.backward[c] * t.backward_s
            + self.first_forward[c] * t.first_forward_extra_s
            + self.last_backward[c] * t.last_backward_extra_s
            + self.tail[c] * t.tail_s
            + self.send[c] * t.send_s
            + (self.weight[c] * t.weight_s if self.weight else 0.0)
            for c, t in enumerate(chunks)
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step.

    step_time_s : end of the last rank's tail + step_fixed_s
    in_flight : per chunk, the most microbatches between the start of F and the end of B (of W under "zb")
    bubble_fraction : idle / total over all ranks, without step_fixed_s
    critical_path : one longest chain (ties: the lower rank, and the event before on the same rank)
    """

    schedule: str
    microbatches: int
    virtual: int
    step_time_s: float
    in_flight: tuple[int, ...]
    bubble_fraction: float
    critical_path: CriticalPath
    ends_s: tuple[float, ...]
    durations_s: tuple[float, ...]

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, in an order in which each comes after what it waits for."""
        pp = len(self.in_flight) // self.virtual
        keys = _programme(self.schedule, pp, self.microbatches, self.virtual).keys
        return tuple(
            Event(chunk, kind, microbatch, end - duration, end)
            for (chunk, kind, microbatch), end, duration in zip(keys, self.ends_s, self.durations_s, strict=True)
        )


Order = tuple[tuple[str, int, int], ...]


def schedule_order(schedule: str, stages: int, microbatches: int, virtual: int = 1) -> tuple[Order, ...]:
    """The order of (kind, microbatch, chunk) on each rank.

    With 3 ranks and 4 microbatches (columns are the order on one rank, not time)::

        1f1b     rank 0    F0 F1 F2 B0 F3 B1 B2 B3     warm-up: min(M, pp - s) forwards,
                 rank 1    F0 F1 B0 F2 B1 F3 B2 B3     then one backward, one forward,
                 rank 2    F0 B0 F1 B1 F2 B2 F3 B3     then the backwards left
        gpipe    each      F0 F1 F2 F3 B0 B1 B2 B3

    interleaved: forwards go through a rank's chunks in rounds of M // max(1, M // pp) microbatches; warm-up is
    (v - 1) rounds and 2 (pp - 1 - s) forwards, then one forward, one backward. zb (ZB-H1): warm-up of pp - 1 - s
    forwards, then F and B in turn, with W from the s-th turn on: every rank holds up to pp of
    them.

    Parameters
    ----------
    schedule : str
        "1f1b" (PipeDream-Flush, Narayanan et al. 2021, arXiv:2104.04473; torch's Schedule1F1B), "gpipe"
        (Huang et al. 2019, arXiv:1811.06965; torch's ScheduleGPipe), "interleaved" (arXiv:2104.04473, section 2.2;
        torch's ScheduleInterleaved1F1B) or "zb" (ZB-H1, Qi et al. 2023, arXiv:2401.10241; torch's
        ScheduleInterleavedZeroBubble with one stage a rank).
    stages, microbatches : int
        pp and M, both at least 1.
    virtual : int
        v, chunks a rank: 1 but for interleaved, whose M must be a multiple of max(1, M // pp).

    Raises
    ------
    ValueError
        For another schedule, counts below 1, or counts that the schedule cannot have.

    Examples
    --------
    >>> schedule_order("1f1b", 2, 2)[0]
    (('F', 0, 0), ('F', 1, 0), ('B', 0, 0), ('B', 1, 0))
    >>> " ".join(f"{kind}{c}.{m}" for kind, m, c in schedule_order("interleaved", 2, 2, 2)[1])
    'F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1'
    """
    if stages < 1 or microbatches < 1 or virtual < 1:
        raise ValueError(
            f"a schedule needs at least one stage, microbatch and chunk, not {stages}, {microbatches}, {virtual}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    if virtual > 1 and schedule != "interleaved":
        raise ValueError(f"{schedule} runs one chunk a rank, not {virtual}")
    if schedule == "interleaved":
        rounds = max(1, microbatches // stages)
        if microbatches % rounds:
            raise ValueError(f"interleaved needs a multiple of {rounds} microbatches, not {microbatches}")
        return tuple(tuple(_interleaved(s, stages, microbatches, virtual)) for s in range(stages))
    if schedule == "zb":
        return tuple(tuple(_zero_bubble(s, stages, microbatches)) for s in range(stages))
    order = []
    for s in range(stages):
        warm_up = microbatches if schedule == "gpipe" else min(microbatches, stages - s)
        row = [("F", m, s) for m in range(warm_up)]
        for m in range(microbatches):
            row.append(("B", m, s))
            if warm_up + m < microbatches:
                row.append(("F", warm_up + m, s))
        order.append(tuple(row))
    return tuple(order)


def _interleaved(rank: int, pp: int, microbatches: int, virtual: int) -> Iterator[tuple[str, int, int]]:
    """One rank's order under interleaved 1F1B."""
    a_round = microbatches // max(1, microbatches // pp)
    total = microbatches * virtual
    warm_up = min(total, (virtual - 1) * a_round + 2 * (pp - 1 - rank))

    def place(step: int) -> tuple[int, int]:
        """(microbatch, local chunk) of the step-th forward; backwards take the chunks in reverse."""
        turn, within = divmod(step, a_round * virtual)
        return turn * a_round + within % a_round, within // a_round

    done = 0
    for step in range(total + warm_up):
        if step < total:
            m, local = place(step)
            yield "F", m, local * pp + rank
        if step >= warm_up:
            m, local = place(done)
            yield "B", m, (virtual - 1 - local) * pp + rank
            done += 1


def _zero_bubble(rank: int, pp: int, microbatches: int) -> Iterator[tuple[str, int, int]]:
    """One rank's order under ZB-H1."""
    warm_up = min(microbatches, pp - 1 - rank)
    weights = 0
    for step in range(microbatches + warm_up):
        if step < microbatches:
            yield "F", step, rank
        if step >= warm_up:
            yield "B", step - warm_up, rank
            if step - warm_up >= rank:
                yield "W", weights, rank
                weights += 1
    for m in range(weights, microbatches):
        yield "W", m, rank


KINDS = {"F": 0, "B": 2, "W": 4}


@dataclass(frozen=True, slots=True)
class _Programme:
    """A schedule compiled for the inner loop: events in topological order.

    `steps[i]` = (index of the event before on the rank, index of the event waited for, index of that
    transfer's seconds, index of the duration); index N = "none" for events, index pp v = "no transfer".
    Durations are indexed 6 c + (0 F, 1 first F, 2 B, 3 last B, 4 W, 5 last W).
    """

    keys: tuple[tuple[int, str, int], ...]
    steps: tuple[tuple[int, int, int, int], ...]
    last: tuple[int, ...]


@lru_cache(maxsize=256)
def _programme(schedule: str, pp: int, microbatches: int, virtual: int = 1) -> _Programme:
    """The compiled schedule; a pure function of four small values, hence remembered."""
    order = schedule_order(schedule, pp, microbatches, virtual)
    chunks = pp * virtual
    none = sum(len(row) for row in order)
    index: dict[tuple[int, str, int], int] = {}
    steps = []
    done, before = [0] * pp, [none] * pp
    while len(steps) < none:
        moved = len(steps)
        for s in range(pp):
            while done[s] < len(order[s]):
                kind, m, c = order[s][done[s]]
                neighbour = {"F": c - 1, "B": c + 1, "W": -1}[kind]
                waits = 0 <= neighbour < chunks
                if waits and (neighbour, kind, m) not in index:
                    break
                transfer = (c - 1 if kind == "F" else c) if waits else chunks
                source = index[(neighbour, kind, m)] if waits else none
                edge = m == 0 if kind == "F" else m == microbatches - 1
                steps.append((before[s], source, transfer, 6 * c + KINDS[kind] + edge))
                before[s] = index[(c, kind, m)] = len(steps) - 1
                done[s] += 1
        if len(steps) == moved:
            raise ValueError(f"{schedule} with {pp} stages and {microbatches} microbatches waits for itself")
    return _Programme(tuple(index), tuple(steps), tuple(before))


@lru_cache(maxsize=1024)
def in_flight_microbatches(schedule: str, stages: int, microbatches: int, virtual: int = 1) -> tuple[int, ...]:
    """The most microbatches each chunk holds at once, read off the schedule's own order.

    >>> in_flight_microbatches("1f1b", 4, 8), in_flight_microbatches("gpipe", 2, 8)
    ((4, 3, 2, 1), (8, 8))
    """
    vectors = in_flight_vectors(schedule, stages, microbatches, virtual)
    return tuple(max(v[c // stages] for v in vectors[c % stages]) for c in range(stages * virtual))


def _enough(schedule: str, stages: int, microbatches: int) -> int:
    """As many microbatches as it takes until no rank ever holds more: the schedules but GPipe repeat themselves.

    1F1B is full after pp, ZB-H1 after its turn pp; interleaved orders have a period of one round, and the longest
    warm-up ends within the third (rounds of pp; uneven rounds are not shortened).
    """
    if schedule == "1f1b":
        return min(microbatches, stages)
    if schedule == "zb":
        return min(microbatches, 2 * stages)
    if schedule == "interleaved" and microbatches % stages == 0:
        return min(microbatches, 5 * stages)
    return microbatches


@lru_cache(maxsize=1024)
def in_flight_vectors(
    schedule: str, stages: int, microbatches: int, virtual: int = 1
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each rank the largest counts of microbatches in flight in its chunks, none of them below another.

    A rank needs room for every one of them: the sum over its chunks of count x bytes.

    >>> in_flight_vectors("1f1b", 2, 8), in_flight_vectors("interleaved", 2, 4, 2)
    ((((2,),), ((1,),)), (((3, 2), (4, 1)), ((2, 1), (3, 0))))
    """
    enough = _enough(schedule, stages, microbatches)
    if enough < microbatches:
        return in_flight_vectors(schedule, stages, enough, virtual)
    ends = "W" if schedule == "zb" else "B"
    found = []
    for row in schedule_order(schedule, stages, microbatches, virtual):
        held, seen, rising = [0] * virtual, set(), False
        for kind, _, c in row:
            if kind == "F":
                held[c // stages] += 1
                rising = True
            elif kind == ends:
                if rising:
                    seen.add(tuple(held))
                held[c // stages] -= 1
                rising = False
        vectors = np.array(sorted(seen))
        covered = (vectors[None] >= vectors[:, None]).all(2).sum(1) > 1  # by another than itself
        found.append(tuple(map(tuple, vectors[~covered].tolist())))
    return tuple(found)


def simulate(
    schedule: str, chunks: Sequence[StageTimes], microbatches: int, step_fixed_s: float = 0.0, virtual: int = 1
) -> Timeline:
    """Play one step of `schedule` and return its timeline.

    start(e) = max(end(event before on the rank), end(event waited for) + send),
    end(e) = start(e) + duration(e),
    step_time_s = max_s(end(last event of rank s) + sum of its chunks' tail_s) + step_fixed_s.

    Transfers are latency: they overlap with compute. One stage is M forwards and backwards in turn (gradient
    accumulation).

    Parameters
    ----------
    schedule : str
        See `schedule_order`.
    chunks : sequence of StageTimes
        One a chunk, first to last [s]; their number is pp x virtual.
    microbatches : int
        M, microbatches of one step.
    step_fixed_s : float
        Added once [s].
    virtual : int
        v, chunks a rank.

    Raises
    ------
    ValueError
        For an unknown schedule, no stages or no microbatches.

    Examples
    --------
    Equal stages without transfers take (M + pp - 1)(F + B), and with v chunks each (M + (pp - 1)/v)(F + B):

    >>> simulate("1f1b", [StageTimes(1.0, 2.0)] * 4, 8).step_time_s
    33.0
    >>> simulate("interleaved", [StageTimes(0.5, 1.0)] * 8, 8, virtual=2).step_time_s
    28.5
    """
    pp, surplus = divmod(len(chunks), virtual)
    if surplus:
        raise ValueError(f"{len(chunks)} chunks are no multiple of {virtual}")
    programme = _programme(schedule, pp, microbatches, virtual)
    split = schedule == "zb"
    durations = []
    for t in chunks:
        backward = t.backward_s - t.weight_s if split else t.backward_s
        durations += [t.forward_s, t.forward_s + t.first_forward_extra_s]
        durations += [backward, backward + (0.0 if split else t.last_backward_extra_s)]
        durations += [t.weight_s, t.weight_s + t.last_backward_extra_s]
    latencies = [t.send_s for t in chunks]
    latencies[-1] = 0.0
    latencies.append(0.0)
    ends: list[float] = [0.0] * (len(programme.steps) + 1)
    for i, (before, source, transfer, duration) in enumerate(programme.steps):
        ready, arrives = ends[before], ends[source] + latencies[transfer]
        ends[i] = (ready if ready >= arrives else arrives) + durations[duration]
    finish = [ends[programme.last[s]] + sum(t.tail_s for t in chunks[s::pp]) for s in range(pp)]
    makespan = max(finish)
    busy = sum(
        microbatches * (t.forward_s + t.backward_s) + (t.first_forward_extra_s + t.last_backward_extra_s + t.tail_s)
        for t in chunks
    )
    return Timeline(
        schedule=schedule,
        microbatches=microbatches,
        virtual=virtual,
        step_time_s=makespan + step_fixed_s,
        in_flight=in_flight_microbatches(schedule, pp, microbatches, virtual),
        bubble_fraction=max(0.0, 1 - busy / (pp * makespan)) if makespan > 0 else 0.0,
        critical_path=_critical_path(programme, ends, latencies, finish.index(makespan), split),
        ends_s=tuple(ends[:-1]),
        durations_s=tuple(durations[step[3]] for step in programme.steps),
    )


def _critical_path(
    programme: _Programme, ends: Sequence[float], latencies: Sequence[float], last_rank: int, split: bool
) -> CriticalPath:
    """Walk back from the event that ends last, at each event to the one that let it start."""
    pp, none, chunks = len(programme.last), len(programme.steps), len(latencies) - 1
    counts = [0] * (6 * chunks)
    sends = [0] * (chunks + 1)
    event = programme.last[last_rank]
    while event != none:
        before, source, transfer, duration = programme.steps[event]
        counts[duration] += 1
        arrives = ends[source] + latencies[transfer]
        if source != none and (before == none or arrives > ends[before]):
            sends[transfer] += 1
            event = source
        else:
            event = before
    at = [counts[6 * c : 6 * c + 6] for c in range(chunks)]
    return CriticalPath(
        forward=tuple(n[0] + n[1] for n in at),
        backward=tuple(n[2] + n[3] for n in at),
        first_forward=tuple(n[1] for n in at),
        last_backward=tuple(n[5] if split else n[3] for n in at),
        tail=tuple(int(c % pp == last_rank) for c in range(chunks)),
        send=tuple(sends[:chunks]),
        weight=tuple(n[4] + n[5] - n[2] - n[3] for n in at) if split else (),
    )
