"""Worker processes for the tasks of a search: forked, so that they share what the parent has priced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# What the tasks of this process work on: set once, in each worker, before its first task.
_STATE: dict[str, Any] = {}


def default_workers() -> int:
    """As many as there are cores for this process, 8 at most; 1 where processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


class Workers:
    """Runs `task(state, *arguments)` for many arguments, in this process or in forked ones.

    Processes start with the first round that is worth them; results come in the order of the arguments, so nothing
    depends on the number of workers.
    """

    def __init__(self, state: Any, count: int) -> None:
        self.state = state
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._not_ours: list[Any] = []

    def run(self, task: Callable[..., Any], rounds: Sequence[tuple]) -> Iterator[Any]:
        """The results, in order."""
        if self._pool is None and self.count > 1 and len(rounds) > 1:
            self._not_ours = multiprocessing.active_children()
            self._pool = ProcessPoolExecutor(
                self.count, multiprocessing.get_context("fork"), initializer=_adopt, initargs=(self.state,)
            )
        if self._pool is None:
            for arguments in rounds:
                yield task(self.state, *arguments)
            return
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the workers touch nothing that a thread may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = [self._pool.submit(_call, task, arguments) for arguments in rounds]
        for future in futures:
            yield future.result()

    def stop(self) -> None:
        """End the processes, busy or not."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in self._not_ours:
                    process.terminate()
            self._pool = None


def _adopt(state: Any) -> None:
    """A worker's first act: keep the state, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _STATE["state"] = state


def _end_with_parent() -> None:
    """Leave when the parent has gone, also if it was killed: nobody else would end a worker that waits for tasks."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(task: Callable[..., Any], arguments: tuple) -> Any:
    return task(_STATE["state"], *arguments)
