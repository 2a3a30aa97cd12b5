"""The oracle's schedules against torch's own, and the simulator against the oracle."""

from __future__ import annotations

import random
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from brute_force import Event, Pieces, held_vectors, rank_order, replay
from torch.distributed.pipelining import schedules as torch_schedules
from tpplan.costmodels.schedules import (
    SCHEDULES,
    StageTimes,
    in_flight_microbatches,
    in_flight_vectors,
    schedule_order,
    simulate,
)

LOOPS = {"1f1b": "Schedule1F1B", "gpipe": "ScheduleGPipe"}
TABLES = {"interleaved": "ScheduleInterleaved1F1B", "zb": "ScheduleInterleavedZeroBubble"}
KINDS = {"F": "F", "B": "B", "I": "B", "W": "W"}


def torch_loop(name: str, ranks: int, rank: int, microbatches: int) -> list[Event]:
    """What torch's own loop calls on a stage that only writes it down."""
    done: list[Event] = []
    stage = MagicMock(stage_index=rank)
    for receive in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, receive).return_value = []
    stage.forward_one_chunk.side_effect = lambda k, *_, **__: done.append(("F", rank, k))
    stage.backward_one_chunk.side_effect = lambda k, **_: done.append(("B", rank, k))
    schedule = MagicMock(_stage=stage, _n_microbatches=microbatches, _num_stages=ranks)
    schedule._check_inputs.return_value = ([()] * microbatches, [{}] * microbatches)
    loop: Any = getattr(torch_schedules, name)
    loop._step_microbatches(schedule)
    return done


def torch_table(name: str, ranks: int, rank: int, microbatches: int, virtual: int) -> list[Event]:
    """The row of torch's table of operations, without its gaps."""
    rounds = max(1, microbatches // ranks)
    schedule = SimpleNamespace(
        n_local_stages=virtual,
        pp_group_size=ranks,
        microbatches_per_round=microbatches // rounds,
        _n_microbatches=microbatches,
    )
    table: Any = getattr(torch_schedules, name)
    row = table._calculate_single_rank_operations(schedule, rank)
    return [(KINDS[a.computation_type.value], a.stage_index, a.microbatch_index) for a in row if a is not None]


@pytest.mark.parametrize("schedule", LOOPS)
def test_the_oracle_orders_as_torch_runs(schedule: str) -> None:
    for ranks, microbatches in product((1, 2, 4), (1, 2, 3, 4, 7)):
        rows = rank_order(schedule, ranks, microbatches)
        assert rows == [torch_loop(LOOPS[schedule], ranks, rank, microbatches) for rank in range(ranks)]


@pytest.mark.parametrize(("schedule", "virtual"), [("interleaved", v) for v in (1, 2, 3, 4)] + [("zb", 1)])
def test_the_oracle_orders_as_torch_plans(schedule: str, virtual: int) -> None:
    seen = 0
    for ranks in range(1, 7):
        for microbatches in range(1, 17):
            if schedule == "interleaved" and microbatches % max(1, microbatches // ranks):
                with pytest.raises(ValueError, match="equal rounds"):
                    rank_order(schedule, ranks, microbatches, virtual)
                continue
            rows = rank_order(schedule, ranks, microbatches, virtual)
            for rank, row in enumerate(rows):
                assert row == torch_table(TABLES[schedule], ranks, rank, microbatches, virtual)
            seen += 1
    assert seen > 50


def shapes(schedule: str) -> list[tuple[int, int, int]]:
    """(ranks, microbatches, virtual) that a schedule can have."""
    if schedule != "interleaved":
        return [(ranks, m, 1) for ranks in range(1, 6) for m in range(1, 11)]
    every = product(range(1, 5), range(1, 11), (1, 2, 3))
    return [(ranks, m, v) for ranks, m, v in every if m % max(1, m // ranks) == 0]


def random_chunks(rng: random.Random, count: int) -> list[StageTimes]:
    """Chunks of random seconds; every second number is 0 or repeats, so that paths tie."""
    some = [rng.uniform(0.1, 3) for _ in range(2)]

    def seconds(most: float) -> float:
        return rng.choice([rng.uniform(0, most), 0.0, rng.choice(some)])

    chunks = []
    for _ in range(count):
        backward, forward = rng.choice(some) + rng.uniform(0, 2), rng.choice(some)
        once = [seconds(2) for _ in range(4)]
        chunks.append(StageTimes(forward, backward, *once, weight_s=rng.choice([0.0, 0.5, 1.0]) * backward))
    return chunks


def pieces(chunks: list[StageTimes]) -> Pieces:
    """The oracle's input of one plan."""
    names = ("forward_s", "backward_s", "weight_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")
    return Pieces(*(np.array([[getattr(c, name)] for c in chunks]) for name in (*names, "send_s")))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_the_oracles(schedule: str) -> None:
    for ranks, m, v in shapes(schedule):
        ours = schedule_order(schedule, ranks, m, v)
        assert [[(kind, c, k) for kind, k, c in row] for row in ours] == rank_order(schedule, ranks, m, v)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_step_and_critical_path_are_the_oracles(schedule: str) -> None:
    rng = random.Random(schedule)
    for ranks, m, v in shapes(schedule):
        chunks = random_chunks(rng, ranks * v)
        timeline = simulate(schedule, chunks, m, virtual=v)
        assert timeline.step_time_s == pytest.approx(float(replay(schedule, ranks, m, v, pieces(chunks))[0]), rel=1e-12)
        assert timeline.critical_path.length_s(chunks) == pytest.approx(timeline.step_time_s, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_critical_path_bounds_every_other_timing(schedule: str) -> None:
    rng = random.Random(schedule + "other")
    for ranks, m, v in shapes(schedule):
        path = simulate(schedule, random_chunks(rng, ranks * v), m, virtual=v).critical_path
        other = random_chunks(rng, ranks * v)
        assert path.length_s(other) <= float(replay(schedule, ranks, m, v, pieces(other))[0]) * (1 + 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_flight_vectors_are_the_largest_that_the_oracle_holds(schedule: str) -> None:
    for ranks, m, v in shapes(schedule):
        vectors = in_flight_vectors(schedule, ranks, m, v)
        for ours, held in zip(vectors, held_vectors(schedule, ranks, m, v), strict=True):
            largest = {x for x in held if not any(x != y and all(map(int.__le__, x, y)) for y in held)}
            assert set(ours) == largest
            assert len(ours) == len(largest)
        most = in_flight_microbatches(schedule, ranks, m, v)
        assert most == tuple(max(x[c // ranks] for x in vectors[c % ranks]) for c in range(ranks * v))
