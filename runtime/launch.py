"""`tpplan run`: starts torchrun for a plan and reports its end, or trains inside a torchrun that the user started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ..errors import EnvironmentFailure, TpplanError, UsageError
from ..planner.plan import Plan
from .failures import as_tpplan_error, read_failure
from .options import RunOptions

LOG_NAME = "torchrun.log"


def run_plan(
    plan: str | os.PathLike[str],
    *,
    steps: int = 10,
    device: str | None = None,
    seed: int = 0,
    lr: float = 1e-3,
    init_from: str | os.PathLike[str] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    compile_: bool | None = None,
    clip_grad_norm: float | None = None,
    master_port: int | None = None,
    debug: bool = False,
) -> int:
    """Train for `steps` steps under the plan in file `plan`; the exit code.

    Raises
    ------
    PlanFileError
        The file is no plan, or a plan for another model.
    EnvironmentFailure
        World size, port, missing GPUs.
    TpplanError
        What a worker reported.
    """
    loaded = Plan.load(plan)
    options = RunOptions(
        plan=str(plan),
        steps=steps,
        device=device,
        seed=seed,
        lr=lr,
        init_from=None if init_from is None else str(init_from),
        metrics=None if metrics is None else str(metrics),
        compiled=compile_,
        clip_grad_norm=clip_grad_norm,
        debug=debug,
    )
    check_paths(options)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return train_inside(loaded, options)
    if master_port is not None:
        check_port(master_port)
    return launch(loaded, options, master_port)


def launch(plan: Plan, options: RunOptions, master_port: int | None) -> int:
    """Run torchrun with one worker a GPU of the plan on this machine, and wait for it."""
    with tempfile.TemporaryDirectory(prefix="tpplan-run-") as name:
        folder = Path(name)
        options = replace(options, folder=name, launcher=os.getpid())
        options.save(folder / "options.json")
        command = torchrun_command(plan.mesh.world_size, folder / "options.json", master_port)
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if sys.platform == "linux":
            # All ranks are on this machine; its host name may resolve to an address that gloo cannot bind.
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with (folder / LOG_NAME).open("wb") as log:
            errors = None if options.debug else log
            process = subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
            try:
                code = process.wait()
            except KeyboardInterrupt:
                stop(process)
                return 130
        if code == 0:
            return 0
        raise read_failure(folder) or unexplained(code, folder / LOG_NAME)


def torchrun_command(world_size: int, options: Path, master_port: int | None) -> list[str]:
    """The command line of torchrun on one machine."""
    rendezvous = (
        ["--standalone"]
        if master_port is None
        else ["--nnodes=1", "--master-addr=127.0.0.1", f"--master-port={master_port}"]
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={world_size}"]
    return [*torchrun, "-m", "tpplan.runtime.worker", str(options)]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its workers; they also watch this process themselves."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train_inside(plan: Plan, options: RunOptions) -> int:
    """Train as one rank of a torchrun that the user started."""
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    try:
        if world_size != plan.mesh.world_size:
            raise EnvironmentFailure(
                f"The plan is for {plan.mesh.world_size} processes, but torchrun started {world_size}.",
                f"Start {plan.mesh.world_size}, or plan with --gpus {world_size}.",
            )
        from .train import train

        train(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            raise
        if rank != 0:
            # Rank 0 has the same to say if the cause is common, and torchrun then ends this process.
            time.sleep(3)
        raise as_tpplan_error(error, rank) from error
    return 0


def check_paths(options: RunOptions) -> None:
    """Raise UsageError for an --init-from or --metrics that cannot work."""
    if options.init_from is not None and not Path(options.init_from).is_dir():
        raise UsageError(f"--init-from {options.init_from} is no folder.", "Name a folder with model.safetensors.")
    if options.metrics is not None and not Path(options.metrics).resolve().parent.is_dir():
        raise UsageError(f"The folder of --metrics {options.metrics} does not exist.", "Make it first.")


def check_port(port: int) -> None:
    """Raise EnvironmentFailure if `port` cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise EnvironmentFailure(
                f"Port {port} cannot be used: {getattr(error, 'strerror', None) or error}.",
                "Choose another --master-port, or leave it out for a free one.",
            ) from None


def unexplained(code: int, log: Path) -> TpplanError:
    """An error for a torchrun that ended without a word from its workers."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    killed = next((line for line in reversed(lines) if "Signal" in line and "received by PID" in line), "")
    last = killed or (lines[-1] if lines else "no output")
    remedy = "A worker that the system kills has often run out of memory; add --debug for torchrun's own output."
    return EnvironmentFailure(f"torchrun ended with exit code {code}: {last[:200]}", remedy)
