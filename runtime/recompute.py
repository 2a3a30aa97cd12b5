"""Recomputation (activation checkpointing) and compilation of units, by wrapping their forward.

full: nothing but the unit's inputs is kept. selective: attention, every second matrix multiplication and all
collectives are kept, the rest runs again in backward.

On CUDA blocks are compiled: ``checkpoint(torch.compile(forward))`` for full (torch 2.13 refuses the other way
round); the selective policy must be inside the compiled function, as outside it would save nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .compat import allow_recompiles

_MATMULS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.linear.default}
)
_COLLECTIVES = ("_c10d_functional", "c10d_functional", "c10d")


def wrap_units(model: nn.Module, recompute: Mapping[str, str], compiled: frozenset[str]) -> None:
    """Wrap the forward of each unit that is recomputed or compiled.

    Parameters
    ----------
    recompute : mapping
        Unit FQN to "selective" or "full"; others keep all activations.
    compiled : frozenset of str
        FQNs of the units to compile.
    """
    if compiled:
        allow_recompiles(len(compiled))
    for fqn in sorted(compiled.union(recompute)):
        module = model.get_submodule(fqn)
        forward: Callable[..., Any] = module.forward
        mode = recompute.get(fqn, "none")
        if mode == "selective":
            forward = _checkpointed(forward, selective=True)
        if fqn in compiled:
            forward = torch.compile(forward)
        if mode == "full":
            forward = _checkpointed(forward, selective=False)
        module.forward = forward  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """`forward` under non-reentrant checkpointing."""
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = selective_contexts

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return wrapped


def selective_contexts() -> Any:
    """The pair of contexts (forward, recomputation) of one checkpointed call, each counting matmuls anew."""
    counts = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in _MATMULS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        else:
            keep = "attention" in operator.name() or operator.namespace in _COLLECTIVES
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
