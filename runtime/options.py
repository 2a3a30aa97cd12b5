"""What `tpplan run` was asked for, as the launcher hands it to the workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run.

    steps : int
        Training steps.
    device : str or None
        "cpu" or "cuda"; None takes CUDA if there is any.
    seed : int
        Of initial weights and samples.
    lr : float
        Learning rate of the plan's optimizer.
    init_from, metrics : str or None
        Folder with safetensors; file for one JSON object a step.
    compiled : bool or None
        torch.compile for repeated blocks; None means on CUDA only.
    clip_grad_norm : float or None
        Largest gradient norm; None does not clip.
    folder : str or None
        Where the workers leave their errors for the launcher; None inside a user's own torchrun.
    launcher : int
        Process that must be alive for the workers to go on; 0 for none.
    """

    plan: str
    steps: int = 10
    device: str | None = None
    seed: int = 0
    lr: float = 1e-3
    init_from: str | None = None
    metrics: str | None = None
    compiled: bool | None = None
    clip_grad_norm: float | None = None
    debug: bool = False
    folder: str | None = None
    launcher: int = 0

    def save(self, path: Path) -> None:
        """Write the options as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> RunOptions:
        """Options written by `save`."""
        return cls(**json.loads(path.read_text()))
