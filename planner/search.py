"""The search over candidates: which mesh, and its best boundaries and recomputation, with a certificate.

    1. build all candidates; lb0 for all
    2. in order of lb0, until lb0 alone proves the rest: lb1, lb2, and a greedy plan (simulated)
    3. for what survives, best bound first: the exact solve, with the best step so far as cut-off
    4. the winner by the exact solve, to a tenth of the gap
    stop when min over candidates of the last proven bound >= best step x (1 - gap)

Greedy plans give upper bounds only; a candidate is given up by a proof, or solved. Interrupted at any point, the
result is the best plan so far with the gap that is proven so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from .bounds import lb0, memory_floor
from .evaluate import Evaluation, evaluate
from .greedy import fill
from .intervals import Chain, chain_arrays
from .problem import Assignment, Problem
from .relaxation import Relaxation, least_memory, relax
from .solve import EXACT, solve


@dataclass(frozen=True, slots=True)
class Candidate:
    """One mesh: a sortable key, and a function that prices it."""

    key: tuple
    build: Callable[[], Problem]


@dataclass(frozen=True, slots=True)
class Progress:
    """A search on its way: best step and proven bound [s], gap, candidates closed, and their total."""

    incumbent_s: float
    bound_s: float
    gap: float
    done: int
    total: int


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
    ranking : the best candidates, best first, at most `top`; their order is proven within the gap
    lower_bound_s : bound over the whole space [s]; gap = (objective - bound) / objective
    pruned : candidates given up, by the name of the bound (lb0, lb1, lb2)
    solved : exact solves; infeasible : candidates proven not to fit
    bounds : the last proven bound of every candidate [s]
    shortfall_* : if nothing fits, the least excess over the limit, where, and the problem's stage (-1: no
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
    """
    state = _Search(sorted(candidates, key=lambda c: c.key), max(gap, EXACT), top, on_progress)
    state.deadline_s = inf if time_limit_s is None else time.monotonic() + time_limit_s
    interrupted = False
    try:
        state.price()
        state.relax_all()
        state.solve_rest()
        state.settle()
        state.report()
    except (KeyboardInterrupt, _OutOfTime):
        interrupted = True
    return state.result(interrupted)


# The winner is solved to this part of the gap.
SETTLE = 0.1


class _OutOfTime(Exception):
    """The time limit has passed."""


@dataclass(slots=True)
class _Entry:
    """One candidate's state; `proof` names where its bound comes from, `closed` says that it was solved."""

    key: tuple
    build: Callable[[], Problem]
    problem: Problem | None = None
    floor_bytes: float = 0.0
    bound_s: float = 0.0
    proof: str = ""
    best: Ranked | None = None
    closed: bool = False


@dataclass(slots=True)
class _Search:
    """The open candidates, the best plans and the chains shared between candidates."""

    candidates: Sequence[Candidate]
    gap: float
    top: int
    on_progress: Callable[[Progress], None] | None
    deadline_s: float = inf
    entries: list[_Entry] = field(default_factory=list)
    ranking: list[Ranked] = field(default_factory=list)
    chains: dict[int, Chain] = field(default_factory=dict)
    solved: int = 0

    def __post_init__(self) -> None:
        self.entries = [_Entry(c.key, c.build) for c in self.candidates]

    def price(self) -> None:
        """Build every problem and take its lb0."""
        for entry in self.entries:
            self.check_time()
            entry.problem = entry.build()
            entry.floor_bytes = memory_floor(entry.problem)
            if entry.floor_bytes > entry.problem.memory_bytes:
                entry.bound_s, entry.proof = inf, "memory"
            else:
                entry.bound_s, entry.proof = lb0(entry.problem), "lb0"

    def relax_all(self) -> None:
        """lb1, lb2 and a greedy plan, in order of lb0, until lb0 proves the rest."""
        for done, entry in enumerate(sorted(self.entries, key=lambda e: (e.bound_s, e.key))):
            if entry.bound_s >= self.target_s or entry.bound_s == inf:
                break
            self.check_time()
            relaxation = self.relaxation(entry)
            for name, bound_s in (("lb1", relaxation.lb1_s), ("lb2", relaxation.lb2_s)):
                if bound_s > entry.bound_s:
                    entry.bound_s, entry.proof = bound_s, "memory" if bound_s == inf else name
            if entry.bound_s < self.limit_s:
                self.greedy(entry, relaxation)
            if done % 16 == 0:
                self.report()

    def greedy(self, entry: _Entry, relaxation: Relaxation) -> None:
        """A greedy plan on the split that the relaxation suggests."""
        assert entry.problem is not None
        for slack in (0.0, 0.01):
            assignment = fill(entry.problem, relaxation.boundaries(slack))
            if assignment is not None:
                self.offer(entry, assignment)

    def solve_rest(self) -> None:
        """Exact solves, least bound first, until all open bounds reach the target."""
        while entries := [e for e in self.entries if not e.closed and e.bound_s < self.target_s]:
            entry = min(entries, key=lambda e: (e.bound_s, e.key))
            self.check_time()
            self.solve_exactly(entry, self.limit_s, self.gap)
            self.report()

    def settle(self) -> None:
        """The winner by the integer programme, to a fraction of the gap, however it was found.

        The cut-off lies just above the plan in hand, so the programme has to find a plan of its own.
        """
        if self.ranking:
            best = self.ranking[0]
            entry = next(e for e in self.entries if e.key == best.key)
            gap = max(self.gap * SETTLE, EXACT)
            self.solve_exactly(entry, best.evaluation.step_time_s * (1 + 1e-7) / (1 - gap), gap)

    def solve_exactly(self, entry: _Entry, limit_s: float, gap: float) -> None:
        """One exact solve below limit_s (1 - gap); its bound replaces the entry's."""
        assert entry.problem is not None
        target_s = limit_s * (1 - gap)
        windows = self.relaxation(entry).windows(target_s)
        if not windows:
            entry.closed = True
            if target_s > entry.bound_s:
                entry.bound_s, entry.proof = target_s, "lb2"
            return
        left = None if self.deadline_s == inf else max(0.0, self.deadline_s - time.monotonic())
        solution = solve(entry.problem, limit_s, gap, left, windows=windows)
        self.solved += 1
        entry.bound_s, entry.proof = max(entry.bound_s, solution.lower_bound_s), "exact"
        if solution.status == "infeasible":
            entry.bound_s, entry.proof = inf, "memory"
        if solution.assignment is not None:
            self.offer(entry, solution.assignment)
        entry.closed = True
        if solution.status == "feasible":
            entry.proof = "limit"
            self.check_time()

    def offer(self, entry: _Entry, assignment: Assignment) -> None:
        """Simulate a plan and rank it if it fits."""
        assert entry.problem is not None
        evaluation = evaluate(entry.problem, assignment)
        if not evaluation.fits:
            return
        if entry.best is None or evaluation.step_time_s < entry.best.evaluation.step_time_s:
            entry.best = Ranked(entry.key, assignment, evaluation)
            others = [ranked for ranked in self.ranking if ranked.key != entry.key]
            order = sorted([*others, entry.best], key=lambda r: (r.evaluation.step_time_s, r.key))
            self.ranking = order[: self.top]

    def relaxation(self, entry: _Entry) -> Relaxation:
        """The relaxation of an entry."""
        assert entry.problem is not None
        return relax(entry.problem, self.chain(entry.problem))

    def chain(self, problem: Problem) -> Chain:
        """The problem's arrays, shared by identity of the layers (which the entries keep alive)."""
        chain = self.chains.get(id(problem.layers))
        if chain is None:
            chain = self.chains[id(problem.layers)] = chain_arrays(problem.layers)
        return chain

    @property
    def limit_s(self) -> float:
        """The step time to beat: the last of the ranking, inf until it is full."""
        return self.ranking[-1].evaluation.step_time_s if len(self.ranking) == self.top else inf

    @property
    def target_s(self) -> float:
        """A bound at this height closes a candidate."""
        return self.limit_s * (1 - self.gap)

    def check_time(self) -> None:
        if time.monotonic() > self.deadline_s:
            raise _OutOfTime

    def report(self) -> None:
        """Tell the caller where the search stands."""
        if self.on_progress is not None:
            bound = min(e.bound_s for e in self.entries)
            done = sum(e.closed or e.bound_s >= self.target_s for e in self.entries)
            best = self.ranking[0].evaluation.step_time_s if self.ranking else inf
            self.on_progress(Progress(best, bound, _gap(best, bound), done, len(self.entries)))

    def result(self, interrupted: bool) -> SearchResult:
        """The certificate."""
        bound = min((e.bound_s for e in self.entries), default=inf)
        names = [e.proof for e in self.entries]
        closed = [e.proof for e in self.entries if e.bound_s >= self.target_s]
        best = self.ranking[0].evaluation.step_time_s if self.ranking else inf
        if self.ranking:
            left = [e for e in self.entries if e.proof == "limit" and e.bound_s < self.target_s]
            status = "feasible" if interrupted or left else "optimal"
        else:
            status = "unknown" if interrupted else "infeasible"
        short = self.shortfall() if status == "infeasible" else (0, (), -1)
        return SearchResult(
            status=status,
            ranking=tuple(self.ranking),
            lower_bound_s=min(bound, best),
            gap=_gap(best, bound),
            candidates=len(self.entries),
            pruned={name: closed.count(name) for name in ("lb0", "lb1", "lb2")},
            solved=self.solved,
            infeasible=names.count("memory"),
            bounds={e.key: e.bound_s for e in self.entries},
            shortfall_bytes=short[0],
            shortfall_key=short[1],
            shortfall_stage=short[2],
        )

    def shortfall(self) -> tuple[int, tuple, int]:
        """The least excess over the limit of all candidates: bytes, key, stage."""
        least: tuple[int, tuple, int] | None = None

        def floor(entry: _Entry) -> float:
            assert entry.problem is not None
            return entry.floor_bytes - entry.problem.memory_bytes

        for entry in sorted(self.entries, key=lambda e: (floor(e), e.key)):
            if least is not None and floor(entry) > least[0]:
                break
            problem = entry.problem
            assert problem is not None
            chain = self.chain(problem)
            if len(chain.positions) <= problem.stages:
                continue
            needed, stage = least_memory(problem, chain)
            excess = (needed - problem.memory_bytes, entry.key, stage)
            least = excess if least is None else min(least, excess)
        return least if least is not None else (0, (), -1)


def _gap(best_s: float, bound_s: float) -> float:
    """(objective - bound) / objective; inf without a plan."""
    return max(0.0, (best_s - bound_s) / best_s) if best_s < inf else inf
