"""Says in one line which line of the user's own code raised an exception."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_LONGEST = 300
_TORCH = os.path.join(sysconfig.get_path("purelib"), "torch", "")


def blame(error: BaseException, folder: str | os.PathLike[str] | None = None) -> str:
    """``file, line N: Type: message [the line]`` for an exception out of user code.

    The line is the innermost frame inside `folder`; without one, the innermost frame that belongs neither to
    tpplan nor to an installed package; without one, the innermost frame of all.

    Parameters
    ----------
    error : BaseException
        The exception as it was caught.
    folder : path, optional
        Where the user's model lives.
    """
    cause = describe(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}, line {error.lineno}: {cause}"
    frame = _guilty_frame(traceback.extract_tb(error.__traceback__), folder)
    if frame is None:
        return cause
    source = (linecache.getline(frame.filename, frame.lineno or 0)).strip()
    shown = f" [{source[:100]}]" if source else ""
    return f"{_short(frame.filename)}, line {frame.lineno}: {cause}{shown}"


def describe(error: BaseException) -> str:
    """``Type: message`` on one line, cut at 300 characters.

    >>> describe(ValueError("first\\n  second"))
    'ValueError: first second'
    """
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def running_line(folder: str | os.PathLike[str] | None = None) -> str:
    """``file.py, line N`` of the model's code that runs now.

    The innermost frame in `folder`, else the innermost outside torch and tpplan.
    """
    inside = os.path.join(os.path.abspath(folder), "") if folder is not None else None
    outside = ""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(("<", _TORCH)) and not _is_tpplan(name):
            shown = f"{os.path.basename(name)}, line {frame.f_lineno}"
            if inside is None or os.path.abspath(name).startswith(inside):
                return shown
            outside = outside or shown
        frame = frame.f_back
    return outside or "the model's code"


def _guilty_frame(
    frames: traceback.StackSummary, folder: str | os.PathLike[str] | None
) -> traceback.FrameSummary | None:
    if not frames:
        return None
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

    def is_library(frame: traceback.FrameSummary) -> bool:
        return frame.filename.startswith((*installed, "<frozen"))

    if folder is not None:
        inside = os.path.join(os.path.abspath(folder), "")
        own = [f for f in frames if os.path.abspath(f.filename).startswith(inside) and not is_library(f)]
        if own:
            return own[-1]
    others = [f for f in frames if not is_library(f) and not _is_tpplan(f.filename)]
    return others[-1] if others else frames[-1]


def _is_tpplan(filename: str) -> bool:
    """Whether a frame is tpplan's own; its examples are user code."""
    try:
        inside = Path(filename).resolve().relative_to(_PACKAGE)
    except ValueError:
        return False
    return inside.parts[0] in {"planner", "costmodels", "hardware_profiles", "runtime"} or len(inside.parts) == 1


def _short(filename: str) -> str:
    """The path as a user would type it from here."""
    relative = os.path.relpath(filename)
    return filename if relative.startswith("..") else relative
