"""The certificate checked again: pruned combinations are solved by the integer programme alone, without their bounds.

The claim of a certificate is that no plan of the space is faster than `lower_bound_s`. A search gives up most
combinations by bounds of its own (lb0, lb1, lb2, memory floors, windows). Here each of them is given to the integer
programme with that bound as cut-off, over all boundaries: it must find nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TpplanError, UsageError
from ..units import format_seconds
from .ilp import write_lp
from .mesh import Mesh
from .planning import Solved
from .problem import Problem
from .solve import EXACT, solve, solved_programme
from .workers import Workers, default_workers

# All pruned combinations are solved again if there are no more than that, else as many: half of them those with the
# least bounds, half at random.
SAMPLE = 500
SOLVE_S = 30.0
SEED = 0


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    pruned : combinations that the search gave up without an exact solve
    checked : of these, how many were solved again
    undecided : of these, how many took longer than `SOLVE_S`
    violation : the first combination that beats the bound, with its step time; "" if there is none
    """

    pruned: int
    checked: int
    undecided: int
    violation: str
    seconds: float

    def text(self) -> str:
        """A sentence for the plan."""
        which = "all" if self.checked == self.pruned else "those with the least bounds, and others at random"
        late = f"; {self.undecided} took too long to decide" if self.undecided else ""
        return (
            f"audit: {self.checked} of {self.pruned} pruned combinations ({which}) solved again without bounds, "
            f"none beats the proven bound{late} ({self.seconds:.1f} s)"
        )


def audit(solved: Solved, workers: int = 0, say: Callable[[str, str], None] | None = None) -> Audit:
    """Solve pruned combinations again, and look for one that beats the proven bound.

    Parameters
    ----------
    solved : Solved
        A finished search.
    workers : int
        Processes; 0 is one for each core.
    say : callable, optional
        Told how far it is.
    """
    begin = time.perf_counter()
    keys = pruned_keys(solved)
    chosen = sample(keys)
    pool = Workers((solved, [Mesh(*key) for key in chosen]), workers or default_workers())
    undecided, violation, done = 0, "", 0
    try:
        limit_s = solved.result.lower_bound_s
        while done < len(chosen) and not violation:
            some = [(i, limit_s) for i in range(done, min(done + 8, len(chosen)))]
            for key, (status, step_s) in zip(chosen[done:], pool.run(_check, some), strict=False):
                undecided += status == "late"
                if status == "better" and not violation:
                    mesh = Mesh(*key)
                    violation = f"{mesh} ({mesh.describe()}) reaches {format_seconds(step_s)}"
            done += len(some)
            if say is not None:
                say("audit", f"audit: {done} of {len(chosen)} pruned combinations solved again")
    finally:
        pool.stop()
    return Audit(len(keys), done, undecided, violation, time.perf_counter() - begin)


def demand(found: Audit, solved: Solved) -> None:
    """Raise `TpplanError` where an audit found a violation."""
    if found.violation:
        raise TpplanError(
            f"Audit: {found.violation}, below the proven bound of {format_seconds(solved.result.lower_bound_s)}.",
            "This is a defect of tpplan: please report it with the command.",
        )


def pruned_keys(solved: Solved) -> list[tuple]:
    """Combinations that were given up by a bound, not by an exact solve, in order of their bounds."""
    proofs = solved.result.proofs
    pruned = [key for key, proof in proofs.items() if proof not in ("exact", "limit")]
    return sorted(pruned, key=lambda key: (solved.result.bounds[key], key))


def sample(keys: Sequence[tuple]) -> list[tuple]:
    """Of keys by rising bounds all, or the first `SAMPLE` / 2 and as many at random (always the same)."""
    if len(keys) <= SAMPLE:
        return list(keys)
    tight, rest = list(keys[: SAMPLE // 2]), list(keys[SAMPLE // 2 :])
    others = random.Random(SEED).sample(range(len(rest)), SAMPLE - len(tight))
    return tight + [rest[i] for i in sorted(others)]


def _check(state: tuple[Solved, Sequence[Mesh]], index: int, limit_s: float) -> tuple[str, float]:
    """Whether a combination has a plan below `limit_s`: "no", "better" (with its step time) or "late"."""
    solved, meshes = state
    problem = solved.model.problem(meshes[index])
    if not all(layer.choices for layer in problem.layers):
        return "no", 0.0
    answer = solve(problem, limit_s, EXACT, SOLVE_S)
    if answer.assignment is not None and answer.objective_s < limit_s * (1 - EXACT):
        return "better", answer.objective_s
    return ("late" if answer.status == "feasible" else "no"), 0.0


def dump_lp(problem: Problem, path: Path, gap: float) -> None:
    """Write the integer programme of a problem, with the paths that its solution needed, as a CPLEX LP file.

    Raises
    ------
    UsageError
        If the file cannot be written.
    """
    programme = solved_programme(problem, gap)
    try:
        write_lp(programme, str(path))
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.", "Name another file with --dump-lp.") from error
