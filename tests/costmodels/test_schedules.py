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
    schedule_order,
    simulate,
)


def random_stages(rng: random.Random, pp: int) -> list[StageTimes]:
    return [
        StageTimes(*(rng.uniform(0.1, 3) for _ in range(2)), *(rng.uniform(0, 2) for _ in range(4))) for _ in range(pp)
    ]


def longest_path(schedule: str, stages: list[StageTimes], microbatches: int) -> float:
    """The same definition, solved by networkx on an explicit graph."""
    graph = nx.DiGraph()
    pp = len(stages)

    def duration(s: int, kind: str, m: int) -> float:
        t = stages[s]
        if kind == "F":
            return t.forward_s + (t.first_forward_extra_s if m == 0 else 0)
        return t.backward_s + (t.last_backward_extra_s if m == microbatches - 1 else 0)

    for s, row in enumerate(schedule_order(schedule, pp, microbatches)):
        graph.add_edge("start", (s, *row[0]), weight=0)
        for a, b in pairwise(row):
            graph.add_edge((s, *a), (s, *b), weight=duration(s, *a))
        graph.add_edge((s, *row[-1]), "end", weight=duration(s, *row[-1]) + stages[s].tail_s)
    for m in range(microbatches):
        for s in range(pp - 1):
            graph.add_edge((s, "F", m), (s + 1, "F", m), weight=duration(s, "F", m) + stages[s].send_s)
            graph.add_edge((s + 1, "B", m), (s, "B", m), weight=duration(s + 1, "B", m) + stages[s].send_s)
    return nx.dag_longest_path_length(graph)


def test_order_is_the_drawn_one() -> None:
    rows = {
        "1f1b": ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"],
        "gpipe": ["F0 F1 F2 F3 B0 B1 B2 B3"] * 3,
    }
    for schedule, expected in rows.items():
        drawn = [" ".join(f"{kind}{m}" for kind, m in row) for row in schedule_order(schedule, 3, 4)]
        assert drawn == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "m"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (5, 16)])
def test_equal_stages_follow_the_closed_form(schedule: str, pp: int, m: int) -> None:
    timeline = simulate(schedule, [StageTimes(1.0, 2.0)] * pp, m, step_fixed_s=0.5)
    assert timeline.step_time_s == (m + pp - 1) * 3.0 + 0.5
    assert timeline.bubble_fraction == pytest.approx((pp - 1) / (m + pp - 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulation_is_the_longest_path_and_its_critical_path_adds_up(schedule: str) -> None:
    rng = random.Random(schedule)
    for _ in range(60):
        pp, m = rng.randint(1, 5), rng.randint(1, 9)
        stages = random_stages(rng, pp)
        timeline = simulate(schedule, stages, m)
        assert timeline.step_time_s == pytest.approx(longest_path(schedule, stages, m), rel=1e-12)
        assert timeline.critical_path.length_s(stages) == pytest.approx(timeline.step_time_s, rel=1e-12)


def test_a_critical_path_bounds_every_other_timing() -> None:
    rng = random.Random(7)
    for _ in range(60):
        pp, m = rng.randint(1, 5), rng.randint(1, 9)
        schedule = rng.choice(SCHEDULES)
        path = simulate(schedule, random_stages(rng, pp), m).critical_path
        other = random_stages(rng, pp)
        assert path.length_s(other) <= simulate(schedule, other, m).step_time_s * (1 + 1e-12)


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
                expected.append(("F", forward))
                forward += 1
            while True:
                expected.append(("B", backward))
                backward += 1
                if forward == m:
                    break
                expected.append(("F", forward))
                forward += 1
            expected += [("B", b) for b in range(backward, m)]
            assert list(row) == expected


@pytest.mark.parametrize("arguments", [("2f2b", 1, 1), ("1f1b", 0, 1), ("1f1b", 1, 0)])
def test_nonsense_is_refused(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError):
        schedule_order(*arguments)
