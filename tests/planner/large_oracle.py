"""A second exact engine for large problems: the best fillings of every rank, then all combinations replayed.

Exact where a layer's choices differ in backward time and bytes alone (recomputation): a longer backward never
shortens a step. With one chunk a rank, each stage takes the least backward time that fits, whatever the others do: a
knapsack for every piece of the chain, then every split replayed (`optimum`). With given chunks, each rank takes a
Pareto-optimal vector of its chunks' backward times, and every combination is replayed (`optimum_given`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from brute_force import Pieces, held_vectors, price_one, replay
from instances import with_kinds, with_skips
from tpplan.planner.problem import Assignment, Choice, Layer, Problem

BLOCK = 16384
ALIKE = ("forward_s", "weight_s", "first_forward_extra_s", "last_backward_extra_s", "tail_s")


def large_problem(seed: int) -> Problem:
    """24 to 60 layers of four kinds on four to eight stages; costs drift along the chain, memory is short."""
    rng = random.Random(seed)
    stages, n = rng.choice([(4, 60), (4, 48), (5, 36), (6, 28), (8, 24)])
    kinds = [_recomputable(rng) for _ in range(4)]
    shapes = {"sorted": sorted, "mixed": lambda o: o, "hourglass": lambda o: sorted(o) + sorted(o)[::-1]}
    shape = rng.choice(list(shapes))
    order = shapes[shape]([rng.randrange(4) for _ in range(n if shape != "hourglass" else n // 2)])
    layers = [replace(kinds[k], cut_after=rng.random() >= 0.1) for k in order]
    if shape == "hourglass":
        layers = with_skips(rng, layers)
    problem = Problem(
        with_kinds(layers),
        stages,
        microbatches=rng.choice([4, 6, 8, 16]),
        schedule=rng.choice(["1f1b", "1f1b", "gpipe", "zb"]),
        memory_bytes=0,
        stage_fixed_bytes=20,
        step_fixed_s=0.1,
    )
    held = max(max(x) for vectors in held_vectors(problem.schedule, stages, problem.microbatches) for x in vectors)
    least = sum(min(c.static_bytes + held * c.saved_bytes for c in layer.choices) for layer in problem.layers)
    most = sum(max(c.static_bytes + held * c.saved_bytes for c in layer.choices) for layer in problem.layers)
    room = least + rng.uniform(0.1, 0.6) * (most - least)
    return replace(problem, memory_bytes=int(room / stages) + 20 + 40)


def large_given(seed: int) -> Problem:
    """24 to 40 layers of three kinds as two chunks each on two to four ranks, memory short."""
    rng = random.Random(seed)
    ranks, per_chunk = rng.choice([(2, 8), (2, 10), (3, 6), (4, 4)])
    kinds = [_recomputable(rng) for _ in range(3)]
    n = 2 * ranks * per_chunk
    problem = Problem(
        with_kinds([kinds[rng.randrange(3) if rng.random() < 0.3 else i * 3 // n] for i in range(n)]),
        ranks,
        microbatches=ranks * rng.choice([1, 2, 4]),
        schedule="interleaved",
        memory_bytes=0,
        stage_fixed_bytes=20,
        step_fixed_s=0.1,
        virtual=2,
        ends=tuple(range(per_chunk, n + 1, per_chunk)),
    )
    least, most = (_fullest(problem, pick) for pick in (min, max))
    return replace(problem, memory_bytes=int(least + rng.uniform(0.2, 0.6) * (most - least)))


def _fullest(problem: Problem, pick: Callable) -> int:
    """Bytes of the fullest rank when every layer takes its choice of least (or most) saved bytes."""
    choices = [
        layer.choices.index(pick(layer.choices, key=lambda choice: choice.saved_bytes)) for layer in problem.layers
    ]
    assert problem.ends is not None
    return max(price_one(problem, Assignment(problem.ends, tuple(choices)))[1])


def _recomputable(rng: random.Random) -> Layer:
    """A layer whose two or three choices differ in backward time and bytes alone."""
    f, saved, transient = rng.uniform(0.5, 3), rng.randint(4, 12), rng.choice([0, 4, 8])
    b, static = f * rng.uniform(1.6, 2.2), rng.randint(1, 8)
    once = (rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0, 0.5))
    w = rng.uniform(0.4, 0.9) * f
    choices = [Choice("none", f, b, *once, static, saved, transient, w)]
    if rng.random() < 0.6:
        some = rng.uniform(0.1, 0.4) * f
        choices.append(Choice("selective", f, b + some, *once, static, saved // 2, transient, w))
    choices.append(Choice("full", f, b + f, *once, static, 1, transient + rng.choice([0, 4]), w))
    return Layer(0, tuple(choices), True, rng.uniform(0, 0.2), rng.randint(0, 3))


def least_backward(problem: Problem, held: int) -> np.ndarray:
    """Least backward seconds of one stage that holds layers i..j-1 and `held` microbatches; inf: does not fit.

    Bytes are counted exactly: for each value that the largest transient may have, spent[b] = least seconds with
    b bytes of static and saved.
    """
    n = len(problem.layers)
    out = np.full((n + 1, n + 1), inf)
    for level in sorted({c.transient_bytes for layer in problem.layers for c in layer.choices}):
        for i in range(n):
            received = held * problem.layers[i - 1].cut_bytes if i else 0
            room = problem.memory_bytes - problem.stage_fixed_bytes - received - level
            if room < 0 or (i and not problem.layers[i - 1].cut_after):
                continue
            spent = np.full(room + 1, inf)
            spent[0] = 0.0
            for j in range(i, n):
                then = np.full(room + 1, inf)
                for c in problem.layers[j].choices:
                    size = c.static_bytes + held * c.saved_bytes
                    if c.transient_bytes <= level and size <= room:
                        np.minimum(then[size:], spent[: room + 1 - size] + c.backward_s, out=then[size:])
                spent = then
                out[i, j + 1] = min(out[i, j + 1], spent.min())
                if spent.min() == inf:
                    break
    return out


def optimum(problem: Problem) -> tuple[float, int]:
    """The least step time [s] over all plans (inf: none fits), and how many splits were replayed."""
    pp, m = problem.stages, problem.microbatches
    assert problem.virtual == 1
    assert problem.ends is None
    held = [max(x[0] for x in vectors) for vectors in held_vectors(problem.schedule, pp, m)]
    tables = {x: least_backward(problem, x) for x in set(held)}
    sums = {name: _prefix(problem, name) for name in ALIKE}
    send = np.array([0.0, *(layer.send_s for layer in problem.layers)])
    best, replayed = inf, 0
    for ends in _blocks(problem):
        starts = np.vstack([np.zeros((1, ends.shape[1]), int), ends[:-1]])
        backward = np.array([tables[x][i, j] for x, i, j in zip(held, starts, ends, strict=True)])
        fits = np.isfinite(backward).all(0)
        starts, ends, backward = starts[:, fits], ends[:, fits], backward[:, fits]
        if not fits.any():
            continue
        f, weight, first, last, tail = (total[ends] - total[starts] for total in sums.values())
        times = Pieces(f, backward, weight, first, last, tail, send[ends])
        best = min(best, float(replay(problem.schedule, pp, m, 1, times).min()) + problem.step_fixed_s)
        replayed += ends.shape[1]
    return best, replayed


def _prefix(problem: Problem, name: str) -> np.ndarray:
    """Sums over the layers before each position of a number in which a layer's choices agree."""
    values = [{getattr(c, name) for c in layer.choices} for layer in problem.layers]
    assert all(len(value) == 1 for value in values)
    return np.concatenate([[0.0], np.cumsum([value.pop() for value in values])])


def _blocks(problem: Problem) -> Iterator[np.ndarray]:
    """All splits as arrays of shape (stages, up to BLOCK)."""
    n = len(problem.layers)
    cuts = [i + 1 for i, layer in enumerate(problem.layers[:-1]) if layer.cut_after]
    every = ((*inner, n) for inner in itertools.combinations(cuts, problem.stages - 1))
    while block := list(itertools.islice(every, BLOCK)):
        yield np.array(block).T


@dataclass(frozen=True)
class Filling:
    """One way to run a chunk's layers, up to their order: backward seconds, bytes, largest transient."""

    backward_s: float
    static: int
    saved: int
    transient: int


def optimum_given(problem: Problem) -> tuple[float, int]:
    """The least step time [s] of a problem with given chunks (inf: none fits), and how many plans were replayed."""
    assert problem.ends is not None
    pp, v, m = problem.stages, problem.virtual, problem.microbatches
    starts = (0, *problem.ends[:-1])
    spans = [range(a, b) for a, b in zip(starts, problem.ends, strict=True)]
    vectors = held_vectors(problem.schedule, pp, m, v)
    fronts = []
    for rank in range(pp):
        chunks = range(rank, problem.chunks, pp)
        received = [problem.layers[starts[c] - 1].cut_bytes if c else 0 for c in chunks]
        ways = itertools.product(*(fillings([problem.layers[i] for i in spans[c]]) for c in chunks))
        room = problem.memory_bytes - problem.stage_fixed_bytes
        times = {tuple(w.backward_s for w in way) for way in ways if _needs(way, received, vectors[rank]) <= room}
        fronts.append(np.array(pareto(times)).reshape(-1, v))
    sizes = [len(front) for front in fronts]
    plans = int(np.prod(sizes))
    send = np.array([[problem.layers[b - 1].send_s] for b in problem.ends[:-1]] + [[0.0]])
    alike = {name: _prefix(problem, name) for name in ALIKE}
    f, weight, first, last, tail = (
        (total[list(problem.ends)] - total[list(starts)])[:, None] for total in alike.values()
    )
    best = inf
    for begin in range(0, plans, BLOCK):
        picks = np.unravel_index(np.arange(begin, min(begin + BLOCK, plans)), sizes)
        # Chunk c of rank s is the (c // pp)-th of its vector.
        backward = np.array([fronts[c % pp][picks[c % pp], c // pp] for c in range(problem.chunks)])
        rows = (np.broadcast_to(value, backward.shape) for value in (weight, first, last, tail))
        times = Pieces(np.broadcast_to(f, backward.shape), backward, *rows, send)
        best = min(best, float(replay(problem.schedule, pp, m, v, times).min()) + problem.step_fixed_s)
    return best, plans


def fillings(layers: list[Layer]) -> list[Filling]:
    """All ways to run the layers of a chunk that differ in more than the order of equal layers."""
    per_kind = []
    for kind in sorted({layer.kind for layer in layers}):
        alike = [layer for layer in layers if layer.kind == kind]
        per_kind.append(list(itertools.combinations_with_replacement(alike[0].choices, len(alike))))
    ways = [list(itertools.chain(*picks)) for picks in itertools.product(*per_kind)]
    return [
        Filling(
            sum(c.backward_s for c in way),
            sum(c.static_bytes for c in way),
            sum(c.saved_bytes for c in way),
            max(c.transient_bytes for c in way),
        )
        for way in ways
    ]


def _needs(way: tuple[Filling, ...], received: list[int], vectors: set[tuple[int, ...]]) -> int:
    """Bytes of a rank, without what is fixed."""
    kept = max(sum(x * (w.saved + r) for x, w, r in zip(held, way, received, strict=True)) for held in vectors)
    return kept + sum(w.static for w in way) + max(w.transient for w in way)


def pareto(points: set[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The points that no other one is below or equal to everywhere."""
    front: list[tuple[float, ...]] = []
    for point in sorted(points):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front.append(point)
    return front
