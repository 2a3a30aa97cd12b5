"""The event simulator against hand-drawn schedules, closed forms and a longest-path oracle over networkx."""

from __future__ import annotations

import random
from itertools import pairwise

import networkx as nx
import pytest
from tpplan.costmodels.schedules import (
    SCHEDULES,
    StageTimes,
    in_flight_microbatches,
    in_flight_vectors,
    schedule_order,
    simulate,
)


def random_chunks(rng: random.Random, count: int) -> list[StageTimes]:
    found = []
    for _ in range(count):
        forward, backward = rng.uniform(0.1, 3), rng.uniform(0.1, 3)
        found.append(
            StageTimes(forward, backward, *(rng.uniform(0, 2) for _ in range(4)), rng.uniform(0, 1) * backward)
        )
    return found


def random_sizes(rng: random.Random, schedule: str) -> tuple[int, int, int]:
    """(pp, M, v) that the schedule can have."""
    pp, m = rng.randint(1, 5), rng.randint(1, 9)
    if schedule != "interleaved":
        return pp, m, 1
    return pp, m - m % max(1, m // pp), rng.randint(1, 3)


def longest_path(schedule: str, chunks: list[StageTimes], microbatches: int, virtual: int = 1) -> float:
    """The same definition, solved by networkx on an explicit graph."""
    graph = nx.DiGraph()
    pp = len(chunks) // virtual
    split = schedule == "zb"

    def duration(kind: str, m: int, c: int) -> float:
        t = chunks[c]
        if kind == "F":
            return t.forward_s + (t.first_forward_extra_s if m == 0 else 0)
        last = t.last_backward_extra_s if m == microbatches - 1 and split == (kind == "W") else 0
        if kind == "W":
            return t.weight_s + last
        return t.backward_s - (t.weight_s if split else 0) + last

    for s, row in enumerate(schedule_order(schedule, pp, microbatches, virtual)):
        graph.add_edge("start", row[0], weight=0)
        for a, b in pairwise(row):
            graph.add_edge(a, b, weight=duration(*a))
        graph.add_edge(row[-1], "end", weight=duration(*row[-1]) + sum(t.tail_s for t in chunks[s::pp]))
    for m in range(microbatches):
        for c in range(len(chunks) - 1):
            send = chunks[c].send_s
            graph.add_edge(("F", m, c), ("F", m, c + 1), weight=duration("F", m, c) + send)
            graph.add_edge(("B", m, c + 1), ("B", m, c), weight=duration("B", m, c + 1) + send)
    return nx.dag_longest_path_length(graph)


def test_order_is_the_drawn_one() -> None:
    rows = {
        "1f1b": ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"],
        "gpipe": ["F0 F1 F2 F3 B0 B1 B2 B3"] * 3,
    }
    for schedule, expected in rows.items():
        drawn = [" ".join(f"{kind}{m}" for kind, m, _ in row) for row in schedule_order(schedule, 3, 4)]
        assert drawn == expected


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("pp", "m"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (5, 16)])
def test_equal_stages_follow_the_closed_form(schedule: str, pp: int, m: int) -> None:
    timeline = simulate(schedule, [StageTimes(1.0, 2.0)] * pp, m, step_fixed_s=0.5)
    assert timeline.step_time_s == (m + pp - 1) * 3.0 + 0.5
    assert timeline.bubble_fraction == pytest.approx((pp - 1) / (m + pp - 1))


@pytest.mark.parametrize(("pp", "v", "m"), [(2, 2, 2), (2, 4, 8), (4, 2, 4), (4, 3, 16), (8, 4, 32)])
def test_equal_chunks_divide_the_bubble(pp: int, v: int, m: int) -> None:
    timeline = simulate("interleaved", [StageTimes(1.0, 2.0)] * (pp * v), m, virtual=v)
    assert timeline.step_time_s == (m * v + pp - 1) * 3.0


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 5), (8, 16)])
def test_zero_bubble_fills_the_bubble_with_weights(pp: int, m: int) -> None:
    """ZB-H1 of arXiv:2401.10241, table 1: with F = B = W the bubble is a third of 1F1B's."""
    timeline = simulate("zb", [StageTimes(1.0, 2.0, weight_s=1.0)] * pp, m)
    assert timeline.step_time_s == m * 3.0 + (pp - 1)
    assert timeline.in_flight == (pp,) * pp  # as many on every rank as on the first one under 1F1B


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulation_is_the_longest_path_and_its_critical_path_adds_up(schedule: str) -> None:
    rng = random.Random(schedule)
    for _ in range(60):
        pp, m, v = random_sizes(rng, schedule)
        chunks = random_chunks(rng, pp * v)
        timeline = simulate(schedule, chunks, m, virtual=v)
        assert timeline.step_time_s == pytest.approx(longest_path(schedule, chunks, m, v), rel=1e-12)
        assert timeline.critical_path.length_s(chunks) == pytest.approx(timeline.step_time_s, rel=1e-12)


def test_a_critical_path_bounds_every_other_timing() -> None:
    rng = random.Random(7)
    for _ in range(100):
        schedule = rng.choice(SCHEDULES)
        pp, m, v = random_sizes(rng, schedule)
        path = simulate(schedule, random_chunks(rng, pp * v), m, virtual=v).critical_path
        other = random_chunks(rng, pp * v)
        assert path.length_s(other) <= simulate(schedule, other, m, virtual=v).step_time_s * (1 + 1e-12)


def test_events_respect_stage_and_transfer() -> None:
    stages = [StageTimes(1.0, 2.0, 0.5, 0.25, 3.0, 0.125), StageTimes(1.5, 2.5)]
    timeline = simulate("1f1b", stages, 3)
    at = {(e.stage, e.kind, e.microbatch): e for e in timeline.events}
    assert len(at) == 12
    assert at[0, "F", 0].end_s == 1.5
    assert at[1, "F", 0].start_s == 1.625
    assert at[0, "B", 0].start_s == at[1, "B", 0].end_s + 0.125
    assert at[0, "B", 2].end_s - at[0, "B", 2].start_s == 2.25
    assert timeline.step_time_s == at[0, "B", 2].end_s + 3.0


def test_in_flight_microbatches() -> None:
    assert in_flight_microbatches("1f1b", 4, 2) == (2, 2, 2, 1)
    assert in_flight_microbatches("1f1b", 1, 9) == (1,)
    assert in_flight_microbatches("gpipe", 3, 5) == (5, 5, 5)


def test_order_matches_torch_1f1b() -> None:
    """torch's own loop: min(M, pp - s) warm-up forwards, then B F pairs, then backwards."""
    for pp, m in ((2, 2), (4, 8), (3, 7)):
        for s, row in enumerate(schedule_order("1f1b", pp, m)):
            expected, forward, backward = [], 0, 0
            for _ in range(min(m, pp - s)):
                expected.append(("F", forward, s))
                forward += 1
            while True:
                expected.append(("B", backward, s))
                backward += 1
                if forward == m:
                    break
                expected.append(("F", forward, s))
                forward += 1
            expected += [("B", b, s) for b in range(backward, m)]
            assert list(row) == expected


@pytest.mark.parametrize(
    ("name", "schedule"), [("ScheduleInterleaved1F1B", "interleaved"), ("ScheduleInterleavedZeroBubble", "zb")]
)
def test_order_matches_torchs_own(name: str, schedule: str) -> None:
    """The orders that torch's schedules compute for each rank, without the gaps that they mark."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for pp, v, m in ((2, 2, 2), (2, 3, 8), (4, 2, 4), (4, 2, 10), (4, 3, 16), (3, 1, 7), (4, 1, 8), (4, 1, 3)):
        if (v > 1) == (schedule == "zb") or m % max(1, m // pp):
            continue
        judge = object.__new__(getattr(schedules, name))
        judge.pp_group_size, judge.n_local_stages, judge._n_microbatches = pp, v, m
        judge.number_of_rounds = max(1, m // pp)
        judge.microbatches_per_round = m // judge.number_of_rounds
        for rank, row in enumerate(schedule_order(schedule, pp, m, v)):
            actions = [a for a in judge._calculate_single_rank_operations(rank) if a is not None]
            kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W"}
            assert list(row) == [(kinds[a.computation_type.name], a.microbatch_index, a.stage_index) for a in actions]


@pytest.mark.parametrize(
    "arguments", [("2f2b", 1, 1), ("1f1b", 0, 1), ("1f1b", 1, 0), ("interleaved", 4, 9, 2), ("1f1b", 2, 2, 2)]
)
def test_nonsense_is_refused(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError):
        schedule_order(*arguments)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_microbatches_than_enough_hold_no_more(schedule: str) -> None:
    """The short cut of `in_flight_vectors` against the whole order, counted here."""
    for pp, m, v in (
        (1, 9, 1),
        (2, 16, 2),
        (2, 24, 4),
        (3, 21, 3),
        (4, 28, 2),
        (4, 40, 1),
        (5, 35, 5),
        (2, 17, 2),
        (4, 26, 2),
    ):
        v = v if schedule == "interleaved" else 1
        if schedule == "interleaved" and m % max(1, m // pp):
            continue
        ends = "W" if schedule == "zb" else "B"
        for rank, row in enumerate(schedule_order(schedule, pp, m, v)):
            held, seen = [0] * v, set()
            for kind, _, c in row:
                held[c // pp] += {"F": 1, ends: -1}.get(kind, 0)
                seen.add(tuple(held))
            top = {a for a in seen if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in seen)}
            assert set(in_flight_vectors(schedule, pp, m, v)[rank]) == top
