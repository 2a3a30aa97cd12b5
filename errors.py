"""The errors that tpplan raises, and the exit code of each.

    TpplanError                 1   anything tpplan reports itself
    ├── UsageError              2   a wrong flag, name, number or file
    │   ├── TargetError         2   the model target cannot be found or built as asked
    │   ├── HardwareError       2   unknown or malformed hardware profile
    │   └── PlanFileError       2   a file that is no plan, a newer or damaged plan, a plan for another model
    ├── InfeasibleError         3   no plan exists within the limits (memory, pins)
    ├── ModelError              4   the user's own model code failed
    └── EnvironmentFailure      6   this machine cannot do it (world size, port, missing GPU)

Exit code 130 is an interrupt (Ctrl-C); 5 is reserved for exports that refuse. Every message is one or two
lines: what is wrong, the number, the remedy.
"""

from __future__ import annotations


class TpplanError(Exception):
    """Base of every error that tpplan reports to a user.

    Parameters
    ----------
    message : str
        What is wrong, with the number or name.
    remedy : str, optional
        What to type or change; printed on a second line.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(TpplanError):
    """A wrong flag, name, number or file: the user mends the command line."""

    exit_code = 2


class TargetError(UsageError):
    """The model target cannot be found, is ambiguous, or lacks arguments."""


class HardwareError(UsageError):
    """An unknown hardware name or a malformed profile."""


class PlanFileError(UsageError):
    """A file that is no plan, is damaged, is newer than this tpplan, or is for another model."""


class InfeasibleError(TpplanError):
    """No plan satisfies the memory limit and the pins."""

    exit_code = 3


class ModelError(TpplanError):
    """The user's model code raised an error; its cause is shown."""

    exit_code = 4


class EnvironmentFailure(TpplanError):
    """The machine cannot do what was asked: world size, port, missing device."""

    exit_code = 6
