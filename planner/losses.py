"""Finds the loss in what a model returned, and says how it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ModelError

GLOBAL_COUNT = "num_items_in_batch"
LOSS_FORMS = "Define loss_fn(output, inputs) in the model's file, or return the loss from forward."


def takes_global_count(loss_fn: Callable[..., Any]) -> bool:
    """Whether a `loss_fn` has a third parameter called `num_items_in_batch`."""
    try:
        return GLOBAL_COUNT in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        return False


def find_loss(output: Any) -> tuple[torch.Tensor, str]:
    """The loss in a model's output, and where it was.

    In this order: `.loss` or ``["loss"]``; a 0-dim tensor, alone or in a tuple or mapping; else the sum of the mean
    squares of all floating-point tensors that depend on a parameter (of the first one, where none does), in float32
    at least, so that whatever the model computes gets a gradient.

    Returns
    -------
    loss : torch.Tensor
        0-dim.
    source : str
        For the user: where the loss came from.

    Raises
    ------
    ModelError
        If the output holds no floating-point tensor.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, torch.Tensor):
        return as_scalar(named, "the output's loss"), "the model's own loss (output.loss)"
    if isinstance(output, torch.Tensor) and output.ndim == 0 and output.is_floating_point():
        return output, "the model's own loss (a 0-dim output)"
    leaves = _tensors(output)
    for leaf in leaves:
        if leaf.ndim == 0 and leaf.is_floating_point():
            return leaf, "the model's own loss (the 0-dim tensor in its output)"
    floats = list({id(leaf): leaf for leaf in leaves if leaf.is_floating_point()}.values())
    trained = [leaf for leaf in floats if leaf.requires_grad] or floats[:1]
    if trained:
        loss = sum((_mean_square(leaf) for leaf in trained[1:]), _mean_square(trained[0]))
        what = "the floating-point output" if len(trained) == 1 else f"each of {len(trained)} floating-point outputs"
        return loss, f"stand-in: the mean of squares of {what}"
    raise ModelError(f"The model's output ({type(output).__name__}) has no floating-point tensor.", LOSS_FORMS)


def as_scalar(value: Any, what: str) -> torch.Tensor:
    """`value` as a 0-dim tensor.

    Raises
    ------
    ModelError
        If it is no tensor of one element.
    """
    if not isinstance(value, torch.Tensor):
        raise ModelError(f"{what} is a {type(value).__name__}, not a tensor.", "Return one 0-dim tensor.")
    if value.numel() != 1:
        raise ModelError(f"{what} has shape {tuple(value.shape)}, not one value.", "Average it: .mean().")
    return value if value.ndim == 0 else value.reshape(())


def _mean_square(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.square().mean()


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in a nest of tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _tensors(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _tensors(item)]
    return []
