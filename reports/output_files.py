"""Writes a report to a file: whole or not at all, and never over a file that is no such report."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import UsageError

_HEAD = 1000  # characters of an existing file that are looked at


def check_output(path: Path, mark: str, flag: str) -> None:
    """Refuse, before any work, a destination that cannot or must not be written.

    Parameters
    ----------
    path : Path
        Where the report goes.
    mark : str
        Text that every report of this kind has near its beginning; a file without it is left as it is.
    flag : str
        Option that named the path.

    Raises
    ------
    UsageError
        If the path is a folder, lies in none, or holds something else.
    """
    remedy = f"Choose another file with {flag}."
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", remedy)
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}.", remedy)
    if path.exists():
        try:
            head = path.read_bytes()[:_HEAD].decode("utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror}.", remedy) from error
        if head.strip() and mark not in head:
            raise UsageError(f"{path} exists and was not written by {flag}; it is left as it is.", remedy)


def write_whole(path: Path, text: str, flag: str) -> None:
    """Write a file in one step: a reader sees the old text or the new one, and an error leaves the old one.

    Raises
    ------
    UsageError
        If the folder refuses it.
    """
    remedy = f"Choose another file with {flag}."
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UsageError(f"Cannot write {path}: {error.strerror}.", remedy) from error
