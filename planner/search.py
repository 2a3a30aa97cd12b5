"""The search over candidates: which mesh, and its best boundaries and choices, with a certificate.

    1. lb0 and the memory floor of all candidates
    2. in order of lb0, until lb0 alone proves the rest: lb1, lb2, and a greedy plan (simulated)
    3. for what survives, best bound first: the exact solve, with the best step so far as cut-off
    4. a winner that was only guessed, by the exact solve, to a tenth of the gap
    stop when min over candidates of the last proven bound >= best step x (1 - gap)

2 and 3 go in rounds of a fixed size: the tasks of a round share the best step known before it, and run in worker
processes. So the result does not depend on how many workers there are. Greedy plans give upper bounds only; a
candidate is given up by a proof, or solved. Interrupted at any point, the result is the best plan so far with the gap
that is proven so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from .bounds import lb0, memory_floor
from .candidate import Candidate, Found, Stopwatch, bound, solve_exactly
from .evaluate import Evaluation, evaluate
from .intervals import chain_arrays
from .problem import Assignment, Problem
from .relaxation import least_memory
from .solve import EXACT, solve
from .workers import Workers

__all__ = ["Candidate", "Progress", "Ranked", "SearchResult", "search"]

# Tasks of a round: the first is small, for a first plan; then bounds. Exact solves go by one, two, then four: the first
# plans that they find spare most of the others.
DIVE, BOUNDS, SOLVES = 8, 64, 4
# A finer gap than this is reached in two passes: most candidates need only be solved to this one.
COARSE = 0.005
# A winner that was guessed is solved to this part of the gap, but to no less than FINE unless the gap asks for that.
SETTLE, FINE = 0.1, 1e-4


@dataclass(frozen=True, slots=True)
class Progress:
    """A search on its way: best step and proven bound [s], gap, candidates closed, their total, and what it does."""

    incumbent_s: float
    bound_s: float
    gap: float
    done: int
    total: int
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate's best plan found."""

    key: tuple
    assignment: Assignment
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What the search found and proved.

    status : "optimal" (within the gap), "feasible" (limit or interrupt), "infeasible", "unknown" (stopped before
        any plan)
    ranking : the best candidates of different groups, best first, at most `top`; their order is proven within the gap
    lower_bound_s : bound over the whole space [s]; gap = (objective - bound) / objective
    pruned : candidates given up, by the name of the bound (lb0, lb1, lb2, fixed: see `candidate.Found`)
    solved : exact solves; infeasible : candidates proven not to fit
    bounds, proofs : the last proven bound of every candidate [s], and its name
    seconds : what the parts took, summed over workers: prices, bounds, ilps, simulation
    shortfall_* : if nothing fits, the least excess over the limit, where, and the problem's rank (-1: no
        candidate has enough places to cut)
    """

    status: str
    ranking: tuple[Ranked, ...]
    lower_bound_s: float
    gap: float
    candidates: int
    pruned: dict[str, int]
    solved: int
    infeasible: int
    bounds: dict[tuple, float]
    proofs: dict[tuple, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    shortfall_bytes: int = 0
    shortfall_key: tuple = ()
    shortfall_stage: int = -1

    @property
    def best(self) -> Ranked | None:
        """The best plan, None without any."""
        return self.ranking[0] if self.ranking else None


def search(
    candidates: Sequence[Candidate],
    *,
    gap: float = 0.005,
    time_limit_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    top: int = 1,
    group: Callable[[tuple], Hashable] | None = None,
    workers: int = 1,
) -> SearchResult:
    """Find the candidate and assignment with the least simulated step time.

    Parameters
    ----------
    candidates : sequence of Candidate
        With distinct keys; of equal step times the smaller key wins.
    gap : float
        Relative gap at which to stop.
    time_limit_s : float, optional
        Limit of the search [s]; the best so far is returned with its honest gap. So it is on KeyboardInterrupt.
    on_progress : callable, optional
        Called with a `Progress` now and then.
    top : int
        How many candidates to rank; the proof then covers the last of them.
    group : callable, optional
        Of candidates with an equal group only the best is ranked; by default every key is its own group.
    workers : int
        Processes for the tasks.
    """
    state = _Search(
        sorted(candidates, key=lambda c: c.key), max(gap, EXACT), top, group or (lambda key: key), on_progress
    )
    state.deadline_s = inf if time_limit_s is None else time.monotonic() + time_limit_s
    state.workers = Workers(state.candidates, workers)
    interrupted = False
    try:
        state.price()
        state.bound_all()
        state.solve_rest()
        state.settle()
        state.report("done")
    except (KeyboardInterrupt, _OutOfTime):
        interrupted = True
    finally:
        state.workers.stop()
    return state.result(interrupted)


class _OutOfTime(Exception):
    """The time limit has passed."""


@dataclass(slots=True)
class _Entry:
    """One candidate's state; `proof` names where its bound comes from, `closed` says that it was solved."""

    index: int
    candidate: Candidate
    excess_bytes: float = 0.0
    bound_s: float = 0.0
    proof: str = ""
    best: Ranked | None = None
    closed: bool = False

    @property
    def key(self) -> tuple:
        return self.candidate.key


def _bound_task(candidates: Sequence[Candidate], index: int, bound_s: float, limit_s: float) -> Found:
    return bound(candidates[index], bound_s, limit_s)


def _solve_task(
    candidates: Sequence[Candidate],
    index: int,
    bound_s: float,
    limit_s: float,
    gap: float,
    left_s: float | None,
    cutoff_gap: float,
) -> Found:
    return solve_exactly(candidates[index], bound_s, limit_s, gap, left_s, cutoff_gap=cutoff_gap)


def _settle_task(
    candidates: Sequence[Candidate], index: int, bound_s: float, limit_s: float, gap: float, left_s: float | None
) -> Found:
    return solve_exactly(candidates[index], bound_s, limit_s, gap, left_s, quickly=True)


@dataclass(slots=True)
class _Search:
    """The open candidates and the best plans."""

    candidates: Sequence[Candidate]
    gap: float
    top: int
    group: Callable[[tuple], Hashable]
    on_progress: Callable[[Progress], None] | None
    deadline_s: float = inf
    workers: Workers = field(init=False)
    entries: list[_Entry] = field(default_factory=list)
    ranking: list[Ranked] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    solved: int = 0

    def __post_init__(self) -> None:
        self.entries = [_Entry(i, c) for i, c in enumerate(self.candidates)]

    def price(self) -> None:
        """lb0 and the memory floor of every candidate that does not bring them."""
        watch = Stopwatch()
        for entry in self.entries:
            self.check_time()
            c = entry.candidate
            if c.bound_s is not None and c.excess_bytes is not None:
                entry.excess_bytes, entry.bound_s = c.excess_bytes, c.bound_s
            else:
                problem = c.build()
                entry.excess_bytes, entry.bound_s = memory_floor(problem) - problem.memory_bytes, lb0(problem)
            entry.proof = "lb0"
            if entry.excess_bytes > 0 or entry.bound_s == inf:
                entry.bound_s, entry.proof = inf, "memory"
        watch.lap("prices")
        self.add_seconds(watch.seconds)

    def bound_all(self) -> None:
        """lb1, lb2 and a greedy plan, in order of lb0, until lb0 proves the rest."""
        waiting = iter(sorted(self.entries, key=lambda e: (e.bound_s, e.key)))
        size = DIVE
        while some := list(islice(waiting, size)):
            some = [e for e in some if e.bound_s < self.target_s]
            if not some:
                break
            self.round(some, _bound_task, [(e.index, e.bound_s, self.limit_s) for e in some])
            self.report("bounds")
            size = BOUNDS

    def solve_rest(self) -> None:
        """Exact solves, least bound first, until all open bounds reach the target: coarsely at first."""
        size = 1
        for gap in (COARSE, self.gap) if self.gap < COARSE else (self.gap,):
            seen: set[int] = set()  # what a coarse solve leaves open, the fine one takes up
            while some := [e for e in self.open(gap) if e.index not in seen]:
                some = sorted(some, key=lambda e: (e.bound_s, e.key))[:size]
                limits = (self.limit_s, gap, self.left_s(), self.gap)
                self.round(some, _solve_task, [(e.index, e.bound_s, *limits) for e in some])
                seen |= {e.index for e in some}
                for entry in some:
                    entry.closed = entry.closed and (gap == self.gap or entry.bound_s == inf)
                self.report("exact solves")
                size = min(2 * size, SOLVES)

    def open(self, gap: float) -> list[_Entry]:
        """What is neither solved nor proven to be no better than the best plan within a gap."""
        target_s = self.limit_s * (1 - gap)
        return [e for e in self.entries if not e.closed and e.bound_s < target_s]

    def settle(self) -> None:
        """A winner that was only guessed, solved to a fraction of the gap where it is not proven to that.

        The cut-off lies just above the plan in hand, so the solve may find it again.
        """
        if self.ranking:
            best = self.ranking[0]
            step_s = best.evaluation.step_time_s
            entry = next(e for e in self.entries if e.key == best.key)
            gap = max(self.gap * SETTLE, min(self.gap, FINE))
            if not entry.closed and entry.bound_s < step_s * (1 - gap):
                limit_s = step_s * (1 + 1e-7) / (1 - gap)
                self.round([entry], _settle_task, [(entry.index, entry.bound_s, limit_s, gap, self.left_s())])

    def round(self, entries: Sequence[_Entry], task: Callable[..., Found], arguments: Sequence[tuple]) -> None:
        """Run one task for each entry, and take in what they found."""
        self.check_time()
        for entry, found in zip(entries, self.workers.run(task, arguments), strict=True):
            if found.bound_s >= entry.bound_s:
                entry.bound_s = found.bound_s
                entry.proof = found.proof if found.proof != "lb0" else entry.proof
            entry.closed = entry.closed or found.closed
            self.solved += found.solves
            self.add_seconds(found.seconds)
            if found.assignment is not None and found.step_s < inf:
                self.offer(entry, found.assignment, found.step_s)
            if found.proof == "limit":
                entry.proof = "limit"
        self.check_time()

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add up what the parts took."""
        for part, value in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value

    def offer(self, entry: _Entry, assignment: Assignment, step_s: float) -> None:
        """Rank a plan, simulated here again."""
        if entry.best is not None and step_s >= entry.best.evaluation.step_time_s:
            return
        if len(self.ranking) == self.top and step_s > self.limit_s:
            return
        evaluation = evaluate(entry.candidate.build(), assignment)
        if not evaluation.fits:
            return
        entry.best = Ranked(entry.key, assignment, evaluation)
        best: dict[Hashable, Ranked] = {}
        others = [ranked for ranked in self.ranking if ranked.key != entry.key]
        for ranked in sorted([*others, entry.best], key=lambda r: (r.evaluation.step_time_s, r.key)):
            best.setdefault(self.group(ranked.key), ranked)
        self.ranking = list(best.values())[: self.top]

    @property
    def limit_s(self) -> float:
        """The step time to beat: the last of the ranking, inf until it is full."""
        return self.ranking[-1].evaluation.step_time_s if len(self.ranking) == self.top else inf

    @property
    def target_s(self) -> float:
        """A bound at this height closes a candidate."""
        return self.limit_s * (1 - self.gap)

    def left_s(self) -> float | None:
        """Seconds until the limit."""
        return None if self.deadline_s == inf else max(0.0, self.deadline_s - time.monotonic())

    def check_time(self) -> None:
        if time.monotonic() > self.deadline_s:
            raise _OutOfTime

    def report(self, phase: str) -> None:
        """Tell the caller where the search stands."""
        if self.on_progress is not None:
            target_s = self.target_s
            bound_s = min(e.bound_s for e in self.entries)
            done = sum(e.closed or e.bound_s >= target_s for e in self.entries)
            best = self.ranking[0].evaluation.step_time_s if self.ranking else inf
            self.on_progress(Progress(best, bound_s, _gap(best, bound_s), done, len(self.entries), phase))

    def result(self, interrupted: bool) -> SearchResult:
        """The certificate."""
        bound_s = min((e.bound_s for e in self.entries), default=inf)
        names = [e.proof for e in self.entries]
        target_s = self.target_s
        closed = [e.proof for e in self.entries if e.bound_s >= target_s]
        best = self.ranking[0].evaluation.step_time_s if self.ranking else inf
        if self.ranking:
            left = [e for e in self.entries if e.proof == "limit" and e.bound_s < target_s]
            status = "feasible" if interrupted or left else "optimal"
        else:
            status = "unknown" if interrupted else "infeasible"
        short = self.shortfall() if status == "infeasible" else (0, (), -1)
        return SearchResult(
            status=status,
            ranking=tuple(self.ranking),
            lower_bound_s=min(bound_s, best),
            gap=_gap(best, bound_s),
            candidates=len(self.entries),
            pruned={name: closed.count(name) for name in ("lb0", "lb1", "lb2", "fixed")},
            solved=self.solved,
            infeasible=names.count("memory"),
            bounds={e.key: e.bound_s for e in self.entries},
            proofs={e.key: e.proof for e in self.entries},
            seconds=dict(self.seconds),
            shortfall_bytes=short[0],
            shortfall_key=short[1],
            shortfall_stage=short[2],
        )

    def shortfall(self) -> tuple[int, tuple, int]:
        """The least excess over the limit of all candidates: bytes, key, rank."""
        least: tuple[int, tuple, int] | None = None
        for entry in sorted(self.entries, key=lambda e: (e.excess_bytes, e.key)):
            if least is not None and entry.excess_bytes > least[0]:
                break
            needed = _least_excess(entry.candidate.build())
            if needed is not None:
                excess = (needed[0], entry.key, needed[1])
                least = excess if least is None else min(least, excess)
        return least if least is not None else (0, (), -1)


def _least_excess(problem: Problem) -> tuple[int, int] | None:
    """Bytes above the limit that a problem needs at least, and the rank; None with too few places to cut."""
    if any(not layer.choices for layer in problem.layers):
        return None
    if problem.ends is not None:
        solution = solve(problem, gap=1.0)
        return (solution.shortfall_bytes, solution.shortfall_stage) if solution.shortfall_stage >= 0 else None
    chain = chain_arrays(problem.layers)
    if len(chain.positions) <= problem.stages:
        return None
    needed, rank = least_memory(problem, chain)
    return needed - problem.memory_bytes, rank


def _gap(best_s: float, bound_s: float) -> float:
    """(objective - bound) / objective; inf without a plan."""
    return max(0.0, (best_s - bound_s) / best_s) if best_s < inf else inf
