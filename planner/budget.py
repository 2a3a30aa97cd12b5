"""Stops a run early where a unit runs so many operators that it probably loops over time steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from .recording import RawOp, Recording

MOST_OPERATORS = 1_000  # forward operators of one unit, or of the modules around units
MOST_CALLS = 64  # calls of one unit's module


class TimeLoop(BaseException):
    """The unit `fqn` is over budget; no `Exception`, so that the model's own code lets it pass."""

    def __init__(self, fqn: str) -> None:
        super().__init__(fqn)
        self.fqn = fqn


class Reached(BaseException):
    """The unit that was to be counted is done; `ops` are its forward operators."""

    def __init__(self, ops: Sequence[RawOp]) -> None:
        super().__init__(len(ops))
        self.ops = ops


class _Watched(Protocol):
    recording: Recording

    @property
    def open_calls(self) -> Sequence[int]: ...


@dataclass(slots=True)
class Budget:
    """Counts the forward operators of units while they are recorded.

    Parameters
    ----------
    recorder : Recorder
    opened : collection of str
        FQNs of modules that are looked into: the outermost calls of others are units.
    until : str, optional
        Instead of keeping a budget, stop after the first call of this unit.
    """

    recorder: _Watched
    opened: Collection[str]
    until: str | None = None
    glue: int = 0
    counted: int = -1

    def operator(self) -> None:
        """One more forward operator was recorded.

        Raises
        ------
        TimeLoop
            If its unit is over budget.
        Reached
            If it is the first after the unit `until`.
        """
        calls = self.recorder.recording.calls
        ops = self.recorder.recording.ops
        unit = next((c for c in self.recorder.open_calls if calls[c].fqn not in self.opened), -1)
        if self.until is not None:
            if self.counted >= 0 and unit != self.counted:
                call = calls[self.counted]
                raise Reached(ops[call.start : call.end])
            if unit >= 0 and calls[unit].fqn == self.until:
                self.counted = unit
        elif unit < 0:
            self.glue += 1
            if self.glue > MOST_OPERATORS:
                raise TimeLoop("")
        elif len(ops) - calls[unit].start > MOST_OPERATORS or calls[unit].number >= MOST_CALLS:
            raise TimeLoop(calls[unit].fqn)


@dataclass(frozen=True, slots=True)
class Limits:
    """How a traced run treats loops over time steps.

    bounded : stop with `TimeLoop` where a unit is over budget
    until : stop with `Reached` after the first call of this unit
    looped : units called once a step: they and what runs between them are one unit
    batches : microbatch sizes to run (two give a line, which a third proves)
    """

    bounded: bool = False
    until: str | None = None
    looped: frozenset[str] = frozenset()
    batches: int = 3
