"""What the user asked for, with every default made explicit: the input of the planner beside graph and profile."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .pins import NO_PINS, Pins


@dataclass(frozen=True, slots=True)
class Request:
    """One planning request.

    gpus, gpus_per_node : devices in all and in one node
    sequence_length : tokens a sample (the side of an image)
    global_batch : samples a step
    memory_limit_bytes : what one device may hold, everything included
    pins : what the plan must and must not have
    gap : stop when (objective - bound) / objective is at most this
    """

    gpus: int
    gpus_per_node: int
    sequence_length: int
    global_batch: int
    precision: str
    optimizer: str
    memory_limit_bytes: int
    pins: Pins = NO_PINS
    gap: float = 0.005
    time_limit_s: float | None = None

    @property
    def compute_dtype(self) -> str:
        """The dtype of matrix products."""
        return "bfloat16" if self.precision == "bf16" else "float32"

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus is {self.gpus}; a plan needs at least one GPU.", "Give --gpus 1 or more.")
        if self.gpus_per_node < 1:
            raise UsageError(f"--gpus-per-node is {self.gpus_per_node}.", "Give --gpus-per-node 1 or more.")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus - self.gpus % self.gpus_per_node
            raise UsageError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}.",
                f"Give --gpus {below} or {below + self.gpus_per_node}, or the node's size with --gpus-per-node.",
            )
        if self.global_batch < 1:
            raise UsageError(f"--global-batch is {self.global_batch}.", "Give --global-batch 1 or more.")
        if self.sequence_length < 1:
            raise UsageError(f"--seq-len is {self.sequence_length}.", "Give --seq-len 1 or more.")
        if self.memory_limit_bytes <= 0:
            raise UsageError("--memory-limit must be above 0 GiB.", "Give the GiB of one GPU, for example 80.")
