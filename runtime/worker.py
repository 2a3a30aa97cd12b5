"""One process of a run that `tpplan run` launched: `python -m tpplan.runtime.worker OPTIONS.json` under torchrun."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from .failures import write_failure
from .options import RunOptions


def main(arguments: list[str]) -> int:
    """Train as the options say; the exit code of the first error, which is left for the launcher."""
    options = RunOptions.load(Path(arguments[0]))
    rank = int(os.environ.get("RANK", "0"))
    assert options.folder is not None
    watch(options.launcher)
    if rank != 0:
        # What every rank's model prints is shown once.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        from .train import train

        train(options)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        code = write_failure(Path(options.folder), rank, error)
        traceback.print_exc()
        return code
    return 0


def watch(launcher: int) -> None:
    """End this process at once when process `launcher` is gone."""

    def loop() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os._exit(130)
            except PermissionError:
                return

    if launcher:
        threading.Thread(target=loop, daemon=True).start()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # No teardown of process groups: other ranks may have ended before.
    os._exit(code)
