"""What a plan says about itself in words: the searched space, what was assumed, and what a reader must know."""

from __future__ import annotations

from ..hardware_profiles.catalog import Profile
from ..units import gib
from .graph import ModelGraph
from .mesh import CHUNKS, LARGEST_MICROBATCH, LARGEST_TP, Space
from .request import Request
from .sharding import Sharding


def space_description(request: Request, space: Space, sharding: Sharding) -> list[str]:
    """What the searched space holds, what restricts it, and what it leaves out."""
    chunks = sorted(c for c, layouts in (space.layouts or {}).items() if layouts)
    said = [
        f"tp {', '.join(map(str, space.tp_degrees))} (what the model allows, up to {LARGEST_TP} or a node); pp up to "
        f"{space.stages} stages; dp_replicate x dp_shard: every way to split the rest",
        f"microbatch sizes: all divisors of a replica's samples up to {LARGEST_MICROBATCH}; at least pp microbatches",
        "schedules 1F1B and GPipe with boundaries at any legal cut; interleaved with near-equal chunks, "
        + (f"v {CHUNKS[0]} to {CHUNKS[-1]}" if chunks else "which this model's blocks do not allow"),
        "each unit: recompute none, selective or full; ZeRO-2 or 3; cut by tp as the model's layout says, or whole",
        "gradients reduced after every or the last microbatch (pipelines: the last); every order of the mesh axes",
        "sequence parallelism on or off"
        if space.sequence_degrees
        else f"sequence parallelism off ({sharding.sequence.reason or 'tp does not divide the tokens'})",
        "not searched: context and expert parallelism (degree 1), unequal interleaved chunks, other tensor-parallel "
        "layouts, schedules of changed order; zero-bubble only where it is pinned",
    ]
    return [*said, f"pinned: {request.pins.text()}"] if request.pins else said


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
