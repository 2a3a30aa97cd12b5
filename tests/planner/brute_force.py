"""The planner's oracle: replays all four schedules and prices every plan of a small problem, by code of its own.

Nothing here imports the simulator, the evaluation or the solver that it judges; only the problem's data classes
are shared. Plans that differ in their choices alone are priced together, as arrays with one column a plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np
from tpplan.planner.problem import Assignment, Problem

Event = tuple[str, int, int]
"""(kind, chunk, microbatch): "F" forward, "B" backward (zero-bubble: of inputs alone), "W" backward of weights."""


def rank_order(schedule: str, ranks: int, microbatches: int, virtual: int = 1) -> list[list[Event]]:
    """What each rank does, in its order.

    gpipe        all forwards, then all backwards.
    1f1b         forwards until ranks - rank microbatches are held (or none is left); from then on a backward as
                 soon as that many are held, else a forward.
    interleaved  the k-th forward of a rank is of chunk (k // g) mod v and microbatch g (k // (g v)) + k mod g, where
                 g = M / max(1, M // ranks) microbatches make a round; backwards the same with the chunks reversed.
                 (v - 1) g + 2 (ranks - 1 - rank) forwards come first, then forward and backward in turn.
    zb           as 1f1b with backwards split; the weights of microbatch k follow the inputs of k + rank.
    """
    m, rows = microbatches, []
    for rank in range(ranks):
        if schedule == "interleaved":
            rows.append(_interleaved(rank, ranks, m, virtual))
            continue
        row: list[Event] = []
        forwards = backwards = 0
        while backwards < m:
            full = forwards - backwards == (m if schedule == "gpipe" else ranks - rank)
            if forwards == m or full:
                row.append(("B", rank, backwards))
                if schedule == "zb" and backwards >= rank:
                    row.append(("W", rank, backwards - rank))
                backwards += 1
            else:
                row.append(("F", rank, forwards))
                forwards += 1
        if schedule == "zb":
            row += [("W", rank, k) for k in range(max(0, m - rank), m)]
        rows.append(row)
    return rows


def _interleaved(rank: int, ranks: int, m: int, virtual: int) -> list[Event]:
    """One rank of the interleaved schedule."""
    rounds = max(1, m // ranks)
    if m % rounds:
        raise ValueError(f"{m} microbatches do not make {rounds} equal rounds")
    group = m // rounds
    forwards, backwards = [], []
    for first in range(0, m, group):
        for piece in range(virtual):
            for k in range(first, first + group):
                forwards.append(("F", piece * ranks + rank, k))
                backwards.append(("B", (virtual - 1 - piece) * ranks + rank, k))
    warm_up = min(m * virtual, (virtual - 1) * group + 2 * (ranks - 1 - rank))
    steady = [event for pair in zip(forwards[warm_up:], backwards, strict=False) for event in pair]
    return [*forwards[:warm_up], *steady, *backwards[m * virtual - warm_up :]]


@dataclass(frozen=True)
class Pieces:
    """Seconds of each chunk, arrays of shape (chunks, plans): `backward` includes `weight`."""

    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    last: np.ndarray
    tail: np.ndarray
    send: np.ndarray


def replay(schedule: str, ranks: int, microbatches: int, virtual: int, t: Pieces) -> np.ndarray:
    """Seconds of one step of every plan, shape (plans,).

    A rank does one thing at a time, in order. The forward of chunk c waits for that of c - 1, its backward for
    that of c + 1, each plus the transfer over the cut between them.
    """
    chunks, m = ranks * virtual, microbatches
    split = schedule == "zb"
    todo = [list(reversed(row)) for row in rank_order(schedule, ranks, m, virtual)]
    clock = [np.zeros(t.forward.shape[1]) for _ in range(ranks)]
    end: dict[Event, np.ndarray] = {}
    while any(todo):
        before = sum(map(len, todo))
        for rank, row in enumerate(todo):
            while row:
                kind, c, k = row[-1]
                source = {"F": c - 1, "B": c + 1, "W": -1}[kind]
                start = clock[rank]
                if 0 <= source < chunks:
                    if (kind, source, k) not in end:
                        break
                    start = np.maximum(start, end[kind, source, k] + t.send[min(c, source)])
                if kind == "B" and source == chunks:
                    start = np.maximum(start, end["F", c, k])
                if kind == "F":
                    takes = t.forward[c] + (t.first[c] if k == 0 else 0.0)
                elif kind == "W":
                    takes = t.weight[c]
                else:
                    takes = t.backward[c] - (t.weight[c] if split else 0.0)
                if kind == ("W" if split else "B") and k == m - 1:
                    takes = takes + t.last[c]
                clock[rank] = end[kind, c, k] = start + takes
                row.pop()
        assert sum(map(len, todo)) < before, f"{schedule} with {ranks} ranks and {m} microbatches is stuck"
    tails = [sum(t.tail[c] for c in range(rank, chunks, ranks)) for rank in range(ranks)]
    return np.max([clock[rank] + tails[rank] for rank in range(ranks)], axis=0)


def held_vectors(schedule: str, ranks: int, microbatches: int, virtual: int = 1) -> list[set[tuple[int, ...]]]:
    """Per rank all that it ever holds: microbatches in flight of each of its chunks, lowest chunk first.

    A microbatch is held from the start of its forward to the end of its last backward ("W" where there is one).
    """
    ends = "W" if schedule == "zb" else "B"
    out = []
    for rank, row in enumerate(rank_order(schedule, ranks, microbatches, virtual)):
        held, seen = [0] * virtual, set()
        for kind, c, _ in row:
            held[(c - rank) // ranks] += {"F": 1, ends: -1}.get(kind, 0)
            seen.add(tuple(held))
        assert not any(held)
        out.append(seen)
    return out


@dataclass(frozen=True)
class Plans:
    """All plans of one split.

    boundaries : where each chunk ends
    choices : (plans, layers) array
    step_s : (plans,) array
    peak_bytes : (ranks, plans) array of integers
    """

    boundaries: tuple[int, ...]
    choices: np.ndarray
    step_s: np.ndarray
    peak_bytes: np.ndarray


def splits(problem: Problem) -> list[tuple[int, ...]]:
    """All legal boundaries."""
    n = len(problem.layers)
    cuts = [i + 1 for i, layer in enumerate(problem.layers[:-1]) if layer.cut_after]
    every = [(*inner, n) for inner in itertools.combinations(cuts, problem.chunks - 1)]
    return [b for b in every if problem.ends is None or b == problem.ends]


def price(problem: Problem, boundaries: tuple[int, ...], choices: np.ndarray) -> Plans:
    """The cost of every row of `choices` under one split."""
    layers, ranks, v = problem.layers, problem.stages, problem.virtual
    spans = [range(a, b) for a, b in itertools.pairwise((0, *boundaries))]

    def of_layer(name: str) -> np.ndarray:
        kind = np.int64 if name.endswith("_bytes") else np.float64
        rows = [
            np.array([getattr(c, name) for c in layer.choices], kind)[choices[:, i]] for i, layer in enumerate(layers)
        ]
        return np.array(rows)

    def of_chunk(name: str) -> np.ndarray:
        values = of_layer(name)
        return np.array([values[span.start : span.stop].sum(0) for span in spans])

    send = np.array([[layers[b - 1].send_s] for b in boundaries[:-1]] + [[0.0]])
    names = ("forward_s", "backward_s", "weight_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")
    times = Pieces(*(of_chunk(name) for name in names), send)
    step = replay(problem.schedule, ranks, problem.microbatches, v, times) + problem.step_fixed_s
    static, saved, transient = of_chunk("static_bytes"), of_chunk("saved_bytes"), of_layer("transient_bytes")
    received = np.array([0] + [layers[b - 1].cut_bytes for b in boundaries[:-1]])
    peaks = []
    for rank, vectors in enumerate(held_vectors(problem.schedule, ranks, problem.microbatches, v)):
        mine = range(rank, problem.chunks, ranks)
        kept = [sum(x * (saved[c] + received[c]) for x, c in zip(held, mine, strict=True)) for held in vectors]
        largest = np.max([transient[i] for c in mine for i in spans[c]], axis=0)
        peaks.append(np.max(kept, axis=0) + sum(static[c] for c in mine) + largest + problem.stage_fixed_bytes)
    return Plans(boundaries, choices, step, np.array(peaks))


def every_plan(problem: Problem) -> Iterator[Plans]:
    """All plans, split by split, whether they fit or not."""
    grids = np.indices([len(layer.choices) for layer in problem.layers])
    choices = grids.reshape(len(problem.layers), -1).T
    for boundaries in splits(problem):
        yield price(problem, boundaries, choices)


def price_one(problem: Problem, assignment: Assignment) -> tuple[float, tuple[int, ...]]:
    """Step time [s] and peak of every rank [B] of one plan."""
    plans = price(problem, assignment.boundaries, np.array([assignment.choices]))
    return float(plans.step_s[0]), tuple(int(peak) for peak in plans.peak_bytes[:, 0])


@dataclass(frozen=True)
class Answer:
    """What brute force says of one problem.

    optimum_s : least step of the plans that fit (inf: none does)
    unlimited_s : least step of all plans
    least_bytes : least limit under which a plan fits
    """

    optimum_s: float
    unlimited_s: float
    least_bytes: int


def answer(problem: Problem, plans: list[Plans]) -> Answer:
    """The answer under the problem's limit, given all its plans (at least one)."""
    optimum = unlimited = inf
    least = 2**62
    for p in plans:
        peak = p.peak_bytes.max(0)
        fits = p.step_s[peak <= problem.memory_bytes]
        optimum = min(optimum, float(fits.min())) if len(fits) else optimum
        unlimited = min(unlimited, float(p.step_s.min()))
        least = min(least, int(peak.min()))
    return Answer(optimum, unlimited, least)
