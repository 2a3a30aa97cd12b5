"""Running a PuLP model: HiGHS with its true status and dual bound, or CBC as a second engine.

PuLP reports HiGHS's time limit as "Optimal" and keeps no dual bound, so both are read from highspy's own
object. Every call builds a fresh solver object: one that goes from LP through added rows to MIP was seen to end
in kSolveError.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import highspy
import pulp

STATUS = highspy.HighsModelStatus


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a solve ended with.

    status : "optimal" (within the gap asked for), "limit" (time), "infeasible", "error"
    bound : proven lower bound of the objective, in model units (-inf if none)
    has_pick : whether the model's variables hold a feasible point
    """

    status: str
    bound: float
    has_pick: bool


class _Highs(pulp.HiGHS):
    """PuLP's HiGHS, told to keep what it found when it stops early."""

    def actualSolve(self, lp: pulp.LpProblem, callback: object = None) -> int:
        self.createAndConfigureSolver(lp)
        self.buildSolverModel(lp)
        self.callSolver(lp)
        solver = lp.solverModel
        if len(solver.getSolution().col_value) == len(lp.variables()):
            self.findSolutionValues(lp)
        return pulp.LpStatusNotSolved


def run_highs(
    model: pulp.LpProblem, *, relax: bool = False, gap: float = 0.0, time_limit_s: float | None = None
) -> Outcome:
    """Solve with HiGHS, one thread.

    Parameters
    ----------
    relax : bool
        Drop integrality (a bound, not a plan).
    gap : float
        Relative gap at which a MIP may stop.
    time_limit_s : float, optional
        Limit of this call [s].
    """
    solver = _Highs(
        mip=not relax,
        msg=False,
        threads=1,
        gapRel=gap,
        gapAbs=1e-7,
        timeLimit=time_limit_s,
        mip_feasibility_tolerance=1e-7,
    )
    model.solve(solver)
    highs = model.solverModel
    status, info = highs.getModelStatus(), highs.getInfo()
    if status in (STATUS.kInfeasible, STATUS.kUnboundedOrInfeasible):
        return Outcome("infeasible", float("inf"), False)
    has_pick = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if relax:
        done = status == STATUS.kOptimal
        return Outcome("optimal" if done else "error", highs.getObjectiveValue() if done else -1e300, has_pick)
    if status == STATUS.kOptimal:
        return Outcome("optimal", info.mip_dual_bound, has_pick)
    if status in (STATUS.kTimeLimit, STATUS.kInterrupt, STATUS.kSolutionLimit):
        return Outcome("limit", info.mip_dual_bound, has_pick)
    return Outcome("error", -1e300, False)


def run_cbc(
    model: pulp.LpProblem, *, relax: bool = False, gap: float = 0.0, time_limit_s: float | None = None
) -> Outcome:
    """Solve with the CBC that PuLP brings; its bound is known only when it proves optimality (gap 0)."""
    del gap  # PuLP does not read CBC's dual bound, so every solve goes to the end
    status = model.solve(pulp.PULP_CBC_CMD(mip=not relax, msg=False, threads=1, gapRel=0.0, timeLimit=time_limit_s))
    if status == pulp.LpStatusInfeasible:
        return Outcome("infeasible", float("inf"), False)
    if status == pulp.LpStatusOptimal and model.sol_status == pulp.LpSolutionOptimal:
        return Outcome("optimal", float(pulp.value(model.objective)), True)
    if status == pulp.LpStatusOptimal:
        return Outcome("limit", -1e300, True)
    return Outcome("error", -1e300, False)


ENGINES = {"highs": run_highs, "cbc": run_cbc}


def remaining(deadline_s: float | None) -> float | None:
    """Seconds until `deadline_s` on `time.monotonic` (never below 0), None without a deadline."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
