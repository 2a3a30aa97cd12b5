"""A second exact engine for large problems: a knapsack for every piece of the chain, then every split replayed.

Exact where a layer's choices differ in backward time and bytes alone (recomputation) and each rank has one chunk: a
later backward never shortens a step, so each stage takes the least backward time that fits, whatever the others do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from math import inf

import numpy as np
from brute_force import Pieces, held_vectors, replay
from instances import with_kinds, with_skips
from tpplan.planner.problem import Choice, Layer, Problem

BLOCK = 16384


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
        schedule=rng.choice(["1f1b", "1f1b", "gpipe"]),
        memory_bytes=0,
        stage_fixed_bytes=20,
        step_fixed_s=0.1,
    )
    held = max(max(x) for vectors in held_vectors(problem.schedule, stages, problem.microbatches) for x in vectors)
    least = sum(min(c.static_bytes + held * c.saved_bytes for c in layer.choices) for layer in problem.layers)
    most = sum(max(c.static_bytes + held * c.saved_bytes for c in layer.choices) for layer in problem.layers)
    room = least + rng.uniform(0.1, 0.6) * (most - least)
    return replace(problem, memory_bytes=int(room / stages) + 20 + 40)


def _recomputable(rng: random.Random) -> Layer:
    """A layer whose two or three choices differ in backward time and bytes alone."""
    f, saved, transient = rng.uniform(0.5, 3), rng.randint(4, 12), rng.choice([0, 4, 8])
    b, static = f * rng.uniform(1.6, 2.2), rng.randint(1, 8)
    once = (rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0, 0.5))
    choices = [Choice("none", f, b, *once, static, saved, transient)]
    if rng.random() < 0.6:
        choices.append(Choice("selective", f, b + rng.uniform(0.1, 0.4) * f, *once, static, saved // 2, transient))
    choices.append(Choice("full", f, b + f, *once, static, 1, transient + rng.choice([0, 4])))
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
    assert problem.schedule in ("1f1b", "gpipe")
    held = [max(x[0] for x in vectors) for vectors in held_vectors(problem.schedule, pp, m)]
    tables = {x: least_backward(problem, x) for x in set(held)}
    sums = {name: _prefix(problem, name) for name in ("forward_s", "first_forward_extra_s", "last_backward_extra_s")}
    sums["tail_s"] = _prefix(problem, "tail_s")
    send = np.array([0.0, *(layer.send_s for layer in problem.layers)])
    best, replayed = inf, 0
    for ends in _blocks(problem):
        starts = np.vstack([np.zeros((1, ends.shape[1]), int), ends[:-1]])
        backward = np.array([tables[x][i, j] for x, i, j in zip(held, starts, ends, strict=True)])
        fits = np.isfinite(backward).all(0)
        starts, ends, backward = starts[:, fits], ends[:, fits], backward[:, fits]
        if not fits.any():
            continue
        f, first, last, tail = (total[ends] - total[starts] for total in sums.values())
        times = Pieces(f, backward, np.zeros_like(f), first, last, tail, send[ends])
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
