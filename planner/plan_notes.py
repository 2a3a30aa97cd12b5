"""What a plan says about itself in words: the searched space, what was assumed, and what a reader must know."""

from __future__ import annotations

from ..hardware_profiles.catalog import Profile
from ..units import gib
from .graph import ModelGraph
from .request import Request
from .sharding import Sharding


def space_description() -> list[str]:
    """What the searched space holds and leaves out."""
    return [
        "tp: divisors of one node that the model allows; pp: as many stages as it has legal cuts; "
        "dp_replicate x dp_shard: the rest",
        "microbatch sizes 1, 2, 4, ... 64; stage boundaries at any legal cut; 1F1B (GPipe where pinned)",
        "recompute none, selective or full for each block; ZeRO-2 and ZeRO-3; "
        "gradients reduced after every or the last microbatch",
        "not searched: interleaved and zero-bubble schedules, sequence, context and expert parallelism; "
        "the mesh order is fixed (tp innermost, pp outermost)",
    ]


def assumptions(
    request: Request, profile: Profile, why: str, length_from: str, default_batch: bool, default_limit: bool
) -> list[str]:
    """What was assumed, each with the flag that changes it; `length_from` says where a default length comes from."""
    length = f" ({length_from})" if length_from else ""
    batch = " (default)" if default_batch else ""
    limit = " (what the device offers)" if default_limit else ""
    return [
        f"hardware {profile.name} ({why}): --hardware",
        f"{request.gpus_per_node} GPUs a node: --gpus-per-node",
        f"sequence length {request.sequence_length}{length}: --seq-len",
        f"global batch {request.global_batch} samples{batch}: --global-batch",
        f"precision {request.precision}: --precision",
        f"optimizer {request.optimizer}: --optimizer",
        f"memory limit {gib(request.memory_limit_bytes):.1f} GiB a GPU{limit}: --memory-limit",
    ]


def notes(graph: ModelGraph, sharding: Sharding, weighting: str) -> list[str]:
    """Remarks that a reader of the plan must know."""
    said = []
    if weighting == "equal":
        said.append(
            "the loss is the model's own mean: every microbatch weighs the same, whatever its number of targets"
        )
    if graph.batch_norm:
        said.append("BatchNorm statistics are per microbatch and replica: the microbatch size changes them")
    if graph.unused:
        said.append(f"{len(graph.unused)} trainable parameter(s) are never used: {', '.join(graph.unused[:3])}")
    said += [f"tensor parallelism: {reason}" for reason in sharding.reasons]
    return said
