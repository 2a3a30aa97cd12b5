"""Live progress of a command on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click


class progress:
    """Live progress on stderr while a block runs: a spinner on a terminal, plain lines elsewhere, or nothing."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.status: Any = None

    def __enter__(self) -> tuple[Callable[[str, str], None], Callable[[Any], None]]:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status("starting ...")
            self.status.start()
        return self.say, self.on_progress

    def say(self, _name: str, text: str) -> None:
        """A new part of the job starts."""
        if self.status is not None:
            self.status.update(text)
        elif self.enabled:
            click.echo(f"tpplan: {text}", err=True)

    def on_progress(self, event: Any) -> None:
        """The search moved on."""
        if self.status is not None:
            from ..units import format_seconds

            best = format_seconds(event.incumbent_s) if event.incumbent_s < float("inf") else "none yet"
            bound = format_seconds(event.bound_s)
            self.status.update(
                f"{event.phase}: best {best}, bound {bound}, gap {event.gap:.1%}, "
                f"{event.total - event.done} of {event.total} combinations left"
            )

    def __exit__(self, *_error: object) -> None:
        if self.status is not None:
            self.status.stop()
