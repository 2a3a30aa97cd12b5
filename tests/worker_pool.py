"""One pool of gloo worker processes that all numeric tests share.

Starting torch in four processes costs 10 to 30 s, so they are started once a session and given tasks. A
task is a top-level function of any file; every rank of the task's world loads that file by its path, joins
a process group of its own, calls ``function(rank, world, **kwargs)`` and sends back what it returns::

    def double(rank, world, x):
        return 2 * x + rank

    def test_double(pool):
        assert pool.run(double, world=2, x=5) == [10, 11]
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import ModuleType
from typing import Any


class WorkerError(AssertionError):
    """A task raised on some rank; the message is that rank's traceback."""


# gloo threads of process groups that torch never lets go wake up all the time: hundreds of them slow every test.
MOST_THREADS = 160


class WorkerPool:
    """Processes that run tasks; a task that fails on one rank costs only its own workers.

    Parameters
    ----------
    size : int
        Most ranks that a task may have; processes are started when a task first needs them.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._key = secrets.token_bytes(16)
        self._listener = Listener(("127.0.0.1", 0), backlog=size, authkey=self._key)
        self._workers: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}

    def run(self, function: Callable[..., Any], *, world: int = 4, timeout_s: float = 240, **kwargs: Any) -> list[Any]:
        """What `function` returned on each rank, in rank order.

        Raises
        ------
        WorkerError
            If a rank raised, died or did not finish; the other ranks are then stopped and replaced.
        """
        self._start(world)
        with tempfile.TemporaryDirectory(prefix="tpplan-pool-") as folder:
            where = (function.__code__.co_filename, function.__name__)
            for rank in range(world):
                self._workers[rank][1].send_bytes(pickle.dumps((where, rank, world, f"{folder}/store", kwargs)))
            return self._collect(world, timeout_s)

    def _start(self, world: int) -> None:
        """Start the workers that ranks 0 to world - 1 lack, and anew those that have gathered too many threads."""
        for rank, (process, _) in list(self._workers.items()):
            if _threads(process.pid) > MOST_THREADS:
                self._stop(rank)
        alive = {rank for rank, (process, _) in self._workers.items() if process.poll() is None}
        missing = sorted(set(range(world)) - alive)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["TPPLAN_POOL"] = self._key.hex()
        command = [sys.executable, __file__, str(self._listener.address[1])]
        processes = {rank: subprocess.Popen([*command, str(rank)], env=environment) for rank in missing}
        for _ in missing:
            connection = self._listener.accept()
            rank = connection.recv()
            self._workers[rank] = (processes[rank], connection)

    def _collect(self, world: int, timeout_s: float) -> list[Any]:
        """Wait for all ranks; after a first failure the others, which may hang in a collective, get 3 s."""
        deadline = time.monotonic() + timeout_s
        pending = {self._workers[rank][1]: rank for rank in range(world)}
        results: list[Any] = [None] * world
        failures: list[tuple[float, str]] = []
        while pending and time.monotonic() < deadline:
            for connection in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    kind, value, when = pickle.loads(connection.recv_bytes())
                except EOFError:
                    kind, value, when = "error", "the process died", time.time()
                if kind == "error":
                    failures.append((when, f"rank {rank}: {value}"))
                    deadline = min(deadline, time.monotonic() + 3)
                results[rank] = value
        if not failures and not pending:
            return results
        for rank in pending.values():
            self._stop(rank)
        silent = f"no answer in {timeout_s:.0f} s from ranks {sorted(pending.values())}"
        raise WorkerError(min(failures)[1] if failures else silent)

    def _stop(self, rank: int) -> None:
        process, connection = self._workers.pop(rank)
        connection.close()
        process.kill()
        process.wait()

    def close(self) -> None:
        """End all workers."""
        for rank in list(self._workers):
            self._stop(rank)
        self._listener.close()


def _threads(pid: int) -> int:
    """Threads of a process; 0 where the system does not tell."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _load(path: str, loaded: dict[str, ModuleType]) -> ModuleType:
    if path not in loaded:
        name = f"_pool_{len(loaded)}_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        loaded[path] = module
    return loaded[path]


def _task(message: tuple[Any, ...], loaded: dict[str, ModuleType]) -> tuple[str, Any, float]:
    """Run one task inside its own process group."""
    import torch
    import torch.distributed as dist

    (path, name), rank, world, store, kwargs = message
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        torch.manual_seed(0)
        value = getattr(_load(path, loaded), name)(rank, world, **kwargs)
        # The ranks leave together: a group torn down early is an error on those that still use it.
        dist.barrier()
        return "value", value, time.time()
    except BaseException:
        return "error", traceback.format_exc(), time.time()
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        _forget_meshes()
        # Models and their meshes lie in cycles; a group that lives on keeps threads that wake up all the time.
        gc.collect()


def _forget_meshes() -> None:
    """Clear DTensor's caches: they hold meshes, whose process groups are gone or bear the name of others now."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    for function in vars(_redistribute).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _serve(port: int, rank: int) -> None:
    """The worker's loop: receive a task, run it, answer; ends when the pool closes the connection."""
    import torch

    torch.set_num_threads(1)
    loaded: dict[str, ModuleType] = {}
    connection = Client(("127.0.0.1", port), authkey=bytes.fromhex(os.environ["TPPLAN_POOL"]))
    connection.send(rank)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            message = pickle.loads(connection.recv_bytes())
            # Plain pickle: a connection's own `send` would share tensors by file descriptors.
            connection.send_bytes(pickle.dumps(_task(message, loaded)))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
