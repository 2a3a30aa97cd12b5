"""The planning problem of one mesh as numbers only: what the ILP and the simulator are given.

A tuple t = (pp, tp, dp_replicate, dp_shard, microbatch size, schedule, ZeRO level) fixes the mesh; everything
that remains (stage boundaries, recomputation of each layer) is decided inside a `Problem`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run one layer under a given mesh. Times are per microbatch unless they say "once".

    name : none | selective | full (recomputation)
    zero_stage : 3 lets gathered weights go after forward, 2 keeps them until backward
    sharding : "tp" as the model's tensor-parallel layout says, "replicate" whole on every tp rank
    weight_s : the part of backward_s that only makes gradients of weights (what zero-bubble schedules move)
    forward_s, backward_s : exposed time on the stage's critical stream (compute, exposed tp and dp
        communication, recomputation in backward)
    first_forward_extra_s : once a step, added to the stage's first forward (exposed parameter gather)
    last_backward_extra_s : once a step, added to the stage's last backward (exposed gradient reduction)
    tail_s : once a step, after the stage's last backward (optimizer and what cannot hide)
    static_bytes : parameters, gradients, optimizer state, gathered weights that stay
    saved_bytes : kept from forward to backward by each in-flight microbatch
    transient_bytes : peak above static and saved while this layer runs (the stage pays the largest)
    """

    name: str
    forward_s: float
    backward_s: float
    first_forward_extra_s: float = 0.0
    last_backward_extra_s: float = 0.0
    tail_s: float = 0.0
    static_bytes: int = 0
    saved_bytes: int = 0
    transient_bytes: int = 0
    weight_s: float = 0.0
    zero_stage: int = 3
    sharding: str = "tp"


@dataclass(frozen=True, slots=True)
class Layer:
    """One unit on the chain: its choices, and what a pipeline cut right after it costs.

    `kind` is equal for layers with identical numbers (folding). `cut_after` tells whether a stage may end here;
    `send_s` is the time of one forward (or backward) transfer over that cut. `cut_bytes` are the bytes
    of received activations kept per in-flight microbatch by the stage that starts after it.
    """

    kind: int
    choices: tuple[Choice, ...]
    cut_after: bool = True
    send_s: float = 0.0
    cut_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Minimise the simulated step time over stage boundaries and per-layer choices.

    stages : pp, ranks of the pipeline (>= 1)
    virtual : v, chunks a rank; chunk c of pp x v runs on rank c mod pp (1 but for interleaved)
    microbatches : M, microbatches per step and replica
    schedule : "1f1b" (with one stage: plain accumulation), "gpipe", "interleaved" or "zb"
    memory_bytes : limit per rank for static + in-flight saved + transient + stage_fixed_bytes
    stage_fixed_bytes : bytes on every rank whatever it holds (context, NCCL, reserve)
    step_fixed_s : seconds added once to every step (gradient-norm all-reduce, host)
    ends : where each chunk ends, if that is given (interleaved); None leaves the boundaries open
    """

    layers: tuple[Layer, ...]
    stages: int
    microbatches: int
    schedule: str
    memory_bytes: int
    stage_fixed_bytes: int = 0
    step_fixed_s: float = 0.0
    virtual: int = 1
    ends: tuple[int, ...] | None = None

    @property
    def chunks(self) -> int:
        """pp x v, pieces that the layers are cut into."""
        return self.stages * self.virtual


@dataclass(frozen=True, slots=True)
class Assignment:
    """A solution: `boundaries[c]` is the position after the last layer of chunk c (the last equals the number
    of layers); `choices[i]` the index of the choice of layer i."""

    boundaries: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solve returns for one problem.

    status : "optimal" (within the gap), "feasible" (a limit came first; `assignment` may be None),
        "infeasible" (memory; the least shortfall and its stage), "cutoff" (nothing better than the step time
        in hand exists)
    """

    status: str
    assignment: Assignment | None
    objective_s: float
    lower_bound_s: float
    shortfall_bytes: int = 0
    shortfall_stage: int = -1
