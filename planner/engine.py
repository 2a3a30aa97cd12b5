"""Running a PuLP model: HiGHS with its true status and dual bound, or CBC as a second engine.

PuLP reports HiGHS's time limit as "Optimal" and keeps no dual bound, so both are read from highspy's own
object. Every call builds a fresh solver object: one that goes from LP through added rows to MIP was seen to end
in kSolveError.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any

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


def _run_interruptibly(highs: Any) -> None:
    """Run HiGHS so that Ctrl-C stops it soon instead of after the solve, and is raised then."""
    if threading.current_thread() is not threading.main_thread():
        highs.run()
        return
    pressed = []

    def stop(*_: object) -> None:
        pressed.append(True)
        highs.cancelSolve()

    # HiGHS asks this flag from time to time, through Python: that is when the handler gets its turn.
    highs.HandleUserInterrupt = True
    previous = signal.signal(signal.SIGINT, stop)
    try:
        highs.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


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
    solver: Any = pulp.HiGHS(
        mip=not relax,
        msg=False,
        threads=1,
        gapRel=gap,
        gapAbs=1e-7,
        timeLimit=time_limit_s,
        mip_feasibility_tolerance=1e-7,
        mip_allow_restart=False,  # restarts were seen to call a wrong point optimal (HiGHS 1.15.1), and save no time
    )
    solver.createAndConfigureSolver(model)
    solver.buildSolverModel(model)
    highs: Any = model.solverModel
    if relax:
        highs.run()
    else:
        _run_interruptibly(highs)
    status, info = highs.getModelStatus(), highs.getInfo()
    if status in (STATUS.kInfeasible, STATUS.kUnboundedOrInfeasible):
        return Outcome("infeasible", float("inf"), False)
    has_pick = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if has_pick:
        for variable, value in zip(model.variables(), highs.getSolution().col_value, strict=True):
            variable.varValue = value
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
    with warnings.catch_warnings():
        # PuLP 4 will ship CBC as an extra; until then this is its name.
        warnings.simplefilter("ignore", DeprecationWarning)
        solver = pulp.PULP_CBC_CMD(mip=not relax, msg=False, threads=1, gapRel=0.0, timeLimit=time_limit_s)
    status = model.solve(solver)
    if status == pulp.LpStatusInfeasible:
        return Outcome("infeasible", float("inf"), False)
    if status == pulp.LpStatusOptimal and model.sol_status == pulp.LpSolutionOptimal:
        value: Any = pulp.value(model.objective)
        return Outcome("optimal", float(value), True)
    if status == pulp.LpStatusOptimal:
        return Outcome("limit", -1e300, True)
    return Outcome("error", -1e300, False)


ENGINES = {"highs": run_highs, "cbc": run_cbc}


def remaining(deadline_s: float | None) -> float | None:
    """Seconds until `deadline_s` on `time.monotonic` (never below 0), None without a deadline."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
