"""Instances for the planner's tests: small random problems, and spaces like those of real transformers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from tpplan.planner.evaluate import Evaluation, evaluate
from tpplan.planner.problem import Assignment, Choice, Layer, Problem
from tpplan.planner.search import Candidate


def random_layer(rng: random.Random, kind: int) -> Layer:
    """A layer with one to three recomputation choices, once-a-step extras, a transfer and cut bytes."""
    f = rng.uniform(0.5, 3)
    b = f * rng.uniform(1.5, 2.2)
    saved, transient = rng.randint(5, 40), rng.randint(0, 20)
    once = [rng.choice([0, rng.uniform(0, 2)]) for _ in range(3)]
    static = rng.randint(1, 30)
    choices = [Choice("none", f, b, *once, static, saved, transient)]
    if rng.random() < 0.8:
        peak = transient + rng.randint(-3, 6) if transient > 3 else transient
        choices.append(Choice("full", f, b + f * rng.uniform(0.8, 1.1), *once, static, rng.randint(1, 5), peak))
    if rng.random() < 0.4:
        again = b + f * rng.uniform(0.1, 0.4)
        choices.append(Choice("selective", f, again, *once, static, max(1, saved // 2), transient))
    return Layer(kind, tuple(choices), True, rng.choice([0, rng.uniform(0, 0.5)]), rng.randint(0, 10))


def random_problem(rng: random.Random, max_layers: int = 6) -> Problem:
    """Three layers or more of mixed kinds on up to three stages, some cuts illegal, memory unlimited."""
    n = rng.randint(min(3, max_layers), max_layers)
    kinds = [random_layer(rng, kind) for kind in range(rng.randint(1, n))]
    order = [rng.randrange(len(kinds)) for _ in range(n)]
    if rng.random() < 0.6:
        order.sort()
    layers = [replace(kinds[k], cut_after=rng.random() >= 0.15) for k in order]
    return Problem(
        tuple(layers),
        stages=rng.choice([1, 2, 2, 3, 3]),
        microbatches=rng.randint(1, 6),
        schedule=rng.choice(["1f1b", "gpipe"]),
        memory_bytes=10**9,
        stage_fixed_bytes=rng.randint(0, 10),
        step_fixed_s=rng.choice([0, 0.3]),
    )


def deep_problem(rng: random.Random) -> Problem:
    """Five to seven layers with two choices each on three to five stages, up to 14 microbatches."""
    n = rng.randint(5, 7)
    kinds = [random_layer(rng, kind) for kind in range(3)]
    layers = [replace(kinds[rng.randrange(3)], cut_after=rng.random() > 0.05) for _ in range(n)]
    return Problem(
        tuple(replace(layer, choices=layer.choices[:2]) for layer in layers),
        stages=rng.randint(3, 5),
        microbatches=rng.randint(1, 14),
        schedule=rng.choice(["1f1b", "1f1b", "gpipe"]),
        memory_bytes=10**9,
        stage_fixed_bytes=3,
        step_fixed_s=rng.choice([0, 0.3]),
    )


def every(problem: Problem) -> Iterator[tuple[Assignment, Evaluation]]:
    """All assignments of a problem with their cost, ignoring memory."""
    n = len(problem.layers)
    cuts = [i + 1 for i in range(n - 1) if problem.layers[i].cut_after]
    ranges = [range(len(layer.choices)) for layer in problem.layers]
    for boundaries in itertools.combinations(cuts, problem.stages - 1):
        for choices in itertools.product(*ranges):
            assignment = Assignment((*boundaries, n), choices)
            yield assignment, evaluate(problem, assignment)


def random_limit(rng: random.Random, peaks: list[int]) -> int:
    """A memory limit among the sorted `peaks` of all assignments, mostly tight; sometimes below all of them."""
    if rng.random() < 0.15:
        return peaks[0] - rng.randint(1, 5)
    return peaks[int(len(peaks) * rng.random() ** 2)] if rng.random() < 0.8 else peaks[-1]


@dataclass(frozen=True)
class Transformer:
    """Dimensions of a decoder; `kv` is the ratio of kv heads to heads."""

    blocks: int
    hidden: int
    ffn: int
    vocab: int
    kv: float = 0.25


LLAMA_8B = Transformer(32, 4096, 14336, 128256)
LLAMA_70B = Transformer(80, 8192, 28672, 128256, 0.125)


@dataclass(frozen=True)
class Mesh:
    """One combination of degrees."""

    pp: int
    tp: int
    dp_replicate: int
    dp_shard: int
    microbatch_size: int
    microbatches: int
    schedule: str
    zero: int

    @property
    def key(self) -> tuple:
        return (
            self.pp,
            self.tp,
            self.dp_replicate,
            self.dp_shard,
            self.microbatch_size,
            self.schedule,
            self.zero,
        )


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def meshes(gpus: int, global_batch: int, max_pp: int) -> Iterator[Mesh]:
    """All power-of-two meshes of `gpus`."""
    for tp, pp in itertools.product(powers(8), powers(max_pp)):
        if gpus % (tp * pp):
            continue
        dp = gpus // (tp * pp)
        for shard, b in itertools.product(powers(dp), (1, 2, 4, 8, 16)):
            if dp % shard or global_batch % (dp * b):
                continue
            for schedule in ("1f1b", "gpipe")[: 2 if pp > 1 else 1]:
                for zero in (3, 2) if shard > 1 else (3,):
                    yield Mesh(pp, tp, dp // shard, shard, b, global_batch // (dp * b), schedule, zero)


def unit_layer(kind: int, model: Transformer, mesh: Mesh, params: float, seq: int, cut: bool) -> Layer:
    """Roofline-like numbers of one unit with `params` parameters: kind 0 embedding, 1 block, 2 head."""
    tokens = mesh.microbatch_size * seq
    block, rate = kind == 1, 600e12 * (1 - 0.06 * (mesh.tp - 1) ** 0.5)
    flops = 2 * params * tokens * (kind != 0) + block * 4 * seq * tokens * model.hidden * 0.5
    activation = 2 * tokens * model.hidden
    tp_comm = block * 4 * activation * (mesh.tp - 1) / mesh.tp / 280e9
    compute = flops / mesh.tp / rate + tokens * model.hidden * 20 / 2.5e12 / mesh.tp
    own, wire = params / mesh.tp, (200e9 if mesh.tp * mesh.dp_shard <= 8 else 40e9)
    gather = 2 * own * (mesh.dp_shard - 1) / mesh.dp_shard / wire
    exposed = max(0.0, gather - 0.8 * compute)
    every_time = exposed if mesh.zero == 3 else 0.0
    reduce = 2 * gather + (4 * own / mesh.dp_shard / 40e9 if mesh.dp_replicate > 1 else 0)
    static = 16 * own / mesh.dp_shard + (2 * own if mesh.zero == 2 else 0)
    logits = 6 * tokens * model.vocab / mesh.tp if kind == 2 else 0
    sizes = {"none": 34.0, "selective": 18.0, "full": 2.0} if block else {"none": 4.0 + 2 * (kind == 2)}
    again = {"none": 0.0, "selective": 0.25, "full": 1.0}
    choices = tuple(
        Choice(
            name,
            compute + tp_comm + every_time,
            (2 + again[name]) * compute + (1 + (name == "full")) * tp_comm + every_time,
            gather,
            max(0.0, reduce - compute),
            20 * own / mesh.dp_shard / 2.5e12,
            int(static),
            int(size * tokens * model.hidden / mesh.tp + logits),
            int(4 * own + (34 * tokens * model.hidden / mesh.tp if name == "full" else 0) + 0.5 * logits),
        )
        for name, size in sizes.items()
    )
    return Layer(kind, choices, cut, activation / mesh.tp / 45e9 + 1e-5, int(activation / mesh.tp))


def build_transformer(model: Transformer, mesh: Mesh, seq: int, memory_bytes: int) -> Problem:
    """Embedding, equal blocks, norm and head as one chain."""
    h = model.hidden
    block = h * h * (2 + 2 * model.kv) + 3 * h * model.ffn
    make = partial(unit_layer, model=model, mesh=mesh, seq=seq)
    body = make(1, params=block, cut=True)
    layers = (
        make(0, params=model.vocab * h, cut=False),
        *(body,) * model.blocks,
        make(2, params=model.vocab * h, cut=True),
    )
    fixed = int(2.5 * 2**30)
    return Problem(layers, mesh.pp, mesh.microbatches, mesh.schedule, memory_bytes, fixed, 1e-3)


def transformer_space(
    model: Transformer, gpus: int, *, global_batch: int = 256, seq: int = 4096, memory_bytes: int = 79 * 2**30
) -> list[Candidate]:
    """The candidates of one model on `gpus` GPUs."""
    return [
        Candidate(mesh.key, partial(build_transformer, model, mesh, seq, memory_bytes))
        for mesh in meshes(gpus, global_batch, min(16, model.blocks))
    ]
