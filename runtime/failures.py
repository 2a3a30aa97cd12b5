"""How an error gets from a worker to the user: one small file a rank, of which the first real cause is shown."""

from __future__ import annotations

import json
import time
from pathlib import Path

from .. import errors
from ..errors import EnvironmentFailure, ModelError, TpplanError


def as_tpplan_error(error: BaseException, rank: int) -> TpplanError:
    """Any exception as one that a user can read."""
    if isinstance(error, TpplanError):
        return error
    while error.__cause__ is not None:  # torch's pipeline wraps what a stage raised
        error = error.__cause__
    if isinstance(error, TpplanError):
        return error
    first = (str(error).strip().splitlines() or ["no message"])[0]
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return EnvironmentFailure(
            f"Rank {rank} ran out of GPU memory: {first}",
            "Plan again with a smaller --memory-limit, or let nothing else use the GPU.",
        )
    if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
        return EnvironmentFailure(f"The rendezvous port is in use: {first}", "Choose another with --master-port.")
    return ModelError(f"Rank {rank} failed: {kind}: {first}", "Add --debug for the traceback.")


def write_failure(folder: Path, rank: int, error: BaseException) -> int:
    """Leave `error` for the launcher; its exit code."""
    known = as_tpplan_error(error, rank)
    record = {
        "kind": type(known).__name__,
        "message": known.message,
        "remedy": known.remedy,
        # A connection that breaks is the consequence of another rank's failure.
        "consequence": isinstance(known, ModelError) and _is_broken_connection(error),
        "time": time.time(),
    }
    (folder / f"error-{rank}.json").write_text(json.dumps(record))
    return known.exit_code


def read_failure(folder: Path) -> TpplanError | None:
    """The error that came first, causes before consequences; None if no worker left any."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("error-*.json"))]
    if not records:
        return None
    first = min(records, key=lambda record: (record["consequence"], record["time"]))
    kind = getattr(errors, first["kind"], TpplanError)
    return kind(first["message"], first["remedy"])


def _is_broken_connection(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(mark in text for mark in ("connection", "peer", "socket", "timed out", "distbackenderror"))
