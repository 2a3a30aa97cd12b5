"""Instances for the planner's tests: small random problems, and spaces like those of real transformers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from brute_force import Answer, Plans, answer, every_plan, price_one, splits
from tpplan.costmodels.schedules import SCHEDULES
from tpplan.planner.evaluate import Evaluation, evaluate
from tpplan.planner.greedy import fill
from tpplan.planner.problem import Assignment, Choice, Layer, Problem
from tpplan.planner.search import Candidate


def random_layer(rng: random.Random, kind: int) -> Layer:
    """A layer with one to four choices, once-a-step extras, a transfer and cut bytes.

    The choices are recomputation, gathered weights that stay (less time, more memory), and whole weights on every
    tp rank (another forward and another transient).
    """
    f = rng.uniform(0.5, 3)
    b = f * rng.uniform(1.5, 2.2)
    w = f * rng.uniform(0.5, 1)
    saved, transient = rng.randint(5, 40), rng.randint(0, 20)
    once = [rng.choice([0, rng.uniform(0, 2)]) for _ in range(3)]
    static = rng.randint(1, 30)
    choices = [Choice("none", f, b, *once, static, saved, transient, w)]
    if rng.random() < 0.8:
        peak = transient + rng.randint(-3, 6) if transient > 3 else transient
        choices.append(Choice("full", f, b + f * rng.uniform(0.8, 1.1), *once, static, rng.randint(1, 5), peak, w))
    if rng.random() < 0.4:
        again = b + f * rng.uniform(0.1, 0.4)
        choices.append(Choice("selective", f, again, *once, static, max(1, saved // 2), transient, w))
    if rng.random() < 0.25:
        less = rng.uniform(0.05, 0.2) * f
        more = static + rng.randint(3, 25)
        choices.append(Choice("none", f - less, b - less, *once, more, saved, transient, w, zero_stage=2))
    elif rng.random() < 0.25:
        times = (f * rng.uniform(0.8, 1.3), b * rng.uniform(0.8, 1.3))
        sizes = (static + rng.randint(0, 20), saved + rng.randint(-4, 10), transient + rng.randint(0, 6))
        choices.append(Choice("none", *times, *once, *sizes, w * 0.9, sharding="replicate"))
    return Layer(kind, tuple(choices), True, rng.choice([0, rng.uniform(0, 0.5)]), rng.randint(0, 10))


def random_shape(rng: random.Random, schedule: str, layers: int, most: int = 3) -> dict[str, int]:
    """Stages, microbatches and chunks a rank that the schedule can have with so many layers."""
    if schedule != "interleaved":
        return {"stages": rng.choice([1, *range(2, most + 1)] * 2 + [2]), "microbatches": rng.randint(1, 6)}
    virtual = rng.choice([2, 2, 3] if layers >= 6 else [2])
    stages = rng.randint(1, max(1, min(most, layers // virtual)))
    counts = [m for m in range(1, 9) if m % max(1, m // stages) == 0]
    return {"stages": stages, "microbatches": rng.choice(counts), "virtual": virtual}


def with_skips(rng: random.Random, layers: Sequence[Layer]) -> list[Layer]:
    """Transfers and cut bytes of their own at every position, as skip connections make them."""
    return [replace(layer, send_s=rng.uniform(0, 1), cut_bytes=rng.randint(0, 25)) for layer in layers]


def with_kinds(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with equal kinds for equal numbers, and one object a kind, as the cost model gives them."""
    known: dict[Layer, Layer] = {}
    for layer in layers:
        known.setdefault(replace(layer, kind=0), replace(layer, kind=len(known)))
    return tuple(known[replace(layer, kind=0)] for layer in layers)


def random_problem(
    rng: random.Random, max_layers: int = 6, schedules: Sequence[str] = SCHEDULES, most_stages: int = 3
) -> Problem:
    """Three layers or more of mixed kinds on up to three stages, some cuts illegal, memory unlimited.

    Interleaved problems have their chunks given, at random legal cuts (none are given where there are too few).
    """
    schedule = rng.choice(schedules)
    n = rng.randint(min(3, max_layers), max_layers)
    kinds = [random_layer(rng, kind) for kind in range(rng.randint(1, n))]
    order = [rng.randrange(len(kinds)) for _ in range(n)]
    if rng.random() < 0.6:
        order.sort()
    layers = [replace(kinds[k], cut_after=rng.random() >= 0.15) for k in order]
    if rng.random() < 0.4:
        layers = with_skips(rng, layers)
    problem = Problem(
        with_kinds(layers),
        **random_shape(rng, schedule, n, most_stages),
        schedule=schedule,
        memory_bytes=10**9,
        stage_fixed_bytes=rng.randint(0, 10),
        step_fixed_s=rng.choice([0, 0.3]),
    )
    return with_ends(rng, problem) if schedule == "interleaved" else problem


def with_ends(rng: random.Random, problem: Problem) -> Problem:
    """The problem with its chunks given, at random legal cuts; unchanged where there are too few."""
    n = len(problem.layers)
    cuts = [i + 1 for i, layer in enumerate(problem.layers[:-1]) if layer.cut_after]
    if len(cuts) < problem.chunks - 1:
        return problem
    return replace(problem, ends=(*sorted(rng.sample(cuts, problem.chunks - 1)), n))


def deep_problem(rng: random.Random, schedules: Sequence[str] = SCHEDULES) -> Problem:
    """Five to seven layers with two choices each on three to five ranks, up to 14 microbatches."""
    n, schedule = rng.randint(5, 7), rng.choice(schedules)
    kinds = [random_layer(rng, kind) for kind in range(3)]
    layers = [replace(kinds[rng.randrange(3)], cut_after=rng.random() > 0.05) for _ in range(n)]
    shape = {"stages": rng.randint(3, 5), "microbatches": rng.randint(1, 14)}
    if schedule == "interleaved":
        stages = n // 2
        counts = [m for m in range(1, 15) if m % max(1, m // stages) == 0]
        shape = {"stages": stages, "microbatches": rng.choice(counts), "virtual": 2}
    problem = Problem(
        with_kinds([replace(layer, choices=layer.choices[:2]) for layer in layers]),
        **shape,
        schedule=schedule,
        memory_bytes=10**9,
        stage_fixed_bytes=3,
        step_fixed_s=rng.choice([0, 0.3]),
    )
    return with_ends(rng, problem) if schedule == "interleaved" else problem


def every(problem: Problem) -> Iterator[tuple[Assignment, Evaluation]]:
    """All assignments of a problem with their cost, ignoring memory."""
    ranges = [range(len(layer.choices)) for layer in problem.layers]
    for boundaries in splits(problem):
        for choices in itertools.product(*ranges):
            assignment = Assignment(boundaries, choices)
            yield assignment, evaluate(problem, assignment)


def random_limit(rng: random.Random, peaks: list[int]) -> int:
    """A memory limit among the sorted `peaks` of all assignments, mostly tight; sometimes below all of them."""
    if rng.random() < 0.15:
        return peaks[0] - rng.randint(1, 5)
    return peaks[int(len(peaks) * rng.random() ** 2)] if rng.random() < 0.8 else peaks[-1]


def near_tie(seed: int, grain: int) -> Known:
    """An instance with the bytes of real models, whose limit is one of its faster plans' peak or up to 3 grains less.

    Sizes are gigabytes and a few grains, so many plans lie within some grains of the limit.
    """
    rng = random.Random(seed)
    plans: list[Plans] = []
    problem = random_problem(rng, 5)
    while not plans:
        problem = _with_gigabytes(rng, random_problem(rng, 5), grain)
        plans = list(every_plan(problem))
    by_speed = sorted((float(s), int(b)) for p in plans for s, b in zip(p.step_s, p.peak_bytes.max(0), strict=True))
    _, peak = rng.choice(by_speed[: max(1, len(by_speed) // 4)])
    problem = replace(problem, memory_bytes=peak - grain * rng.choice([0, 0, 1, 2, 3]))
    return Known(problem, plans, answer(problem, plans))


def _with_gigabytes(rng: random.Random, problem: Problem, grain: int) -> Problem:
    """The problem with every byte a gigabyte and some grains; layers of equal choices keep equal choices."""

    def large(size: int) -> int:
        return size * 10**9 + grain * rng.randint(0, 3) * (size > 0)

    known: dict[tuple[Choice, ...], tuple[Choice, ...]] = {}
    layers = []
    for layer in problem.layers:
        if layer.choices not in known:
            known[layer.choices] = tuple(
                replace(
                    c,
                    static_bytes=large(c.static_bytes),
                    saved_bytes=large(c.saved_bytes),
                    transient_bytes=large(c.transient_bytes),
                )
                for c in layer.choices
            )
        layers.append(replace(layer, choices=known[layer.choices], cut_bytes=large(layer.cut_bytes)))
    return replace(problem, layers=with_kinds(layers))


@dataclass(frozen=True)
class Known:
    """A problem under a memory limit with all its plans, and the answer that brute force gives."""

    problem: Problem
    plans: list[Plans]
    answer: Answer

    @property
    def feasible(self) -> bool:
        """Whether a plan fits."""
        return self.answer.optimum_s < inf

    @property
    def memory_bound(self) -> bool:
        """Whether a plan fits, but the fastest one does not."""
        return self.feasible and self.answer.optimum_s > self.answer.unlimited_s * (1 + 1e-9)

    @property
    def greedy_wrong(self) -> bool:
        """Whether a plan fits, but layers counted out evenly and filled greedily miss the best one."""
        return self.feasible and greedy_s(self.problem) > self.answer.optimum_s * (1 + 1e-9)


def known(seed: int, schedules: Sequence[str], max_layers: int = 6) -> Known:
    """The instance of one seed, enumerated; draws without a legal split are drawn again."""
    rng = random.Random(seed)
    plans: list[Plans] = []
    problem = random_problem(rng, max_layers, schedules)
    while not plans:
        problem = random_problem(rng, max_layers, schedules) if seed % 10 else deep_problem(rng, schedules)
        plans = list(every_plan(problem))
    peaks = sorted(int(peak) for p in plans for peak in p.peak_bytes.max(0))
    problem = replace(problem, memory_bytes=random_limit(rng, peaks))
    return Known(problem, plans, answer(problem, plans))


def greedy_s(problem: Problem) -> float:
    """Step time of a planner's baseline [s]: an even split, each layer's choice by seconds per byte; inf if none."""
    n, chunks = len(problem.layers), problem.chunks
    even = problem.ends or tuple(round((c + 1) * n / chunks) for c in range(chunks))
    if even not in splits(problem):
        return inf
    assignment = fill(problem, even)
    if assignment is None:
        return inf
    step_s, peaks = price_one(problem, assignment)
    return step_s if max(peaks) <= problem.memory_bytes else inf


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
