"""Diffusers models from a config alone: construction with random weights, inputs of common denoisers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EnvironmentFailure, TargetError
from .inputs import Inputs, required_names
from .locate import did_you_mean

PROMPT_TOKENS = 77  # CLIP's text length, which the U-Nets are trained with


def constructor(data: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A call that constructs the diffusers model of a parsed config.json with random weights.

    Raises
    ------
    TargetError
        If diffusers has no such model, or an override is not in the config.
    EnvironmentFailure
        If diffusers is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import diffusers
    except ImportError:
        raise EnvironmentFailure(
            f"{path.name} configures a diffusers model, and diffusers is not installed.",
            "Type: pip install diffusers.",
        ) from None
    name = str(data["_class_name"])
    model_class: Any = getattr(diffusers, name, None)
    if not inspect.isclass(model_class) or not issubclass(model_class, nn.Module):
        known = [n for n in dir(diffusers) if n.endswith(("Model", "2D", "KL"))]
        raise TargetError(f"{path.name}: diffusers has no model {name!r}.", did_you_mean(name, known))
    unknown = [key for key in overrides if key not in inspect.signature(model_class.__init__).parameters]
    if unknown:
        raise TargetError(
            f"{name} has no setting {unknown[0]!r}.",
            did_you_mean(unknown[0], list(data)) or "--model-arg changes settings of the config.",
        )
    return lambda: model_class.from_config({**data, **overrides})  # type: ignore[attr-defined]


def dummy_inputs(model: nn.Module, batch: int, seq: int) -> Inputs:
    """Noise, time steps and, where the model attends to a prompt, its embeddings.

    `seq` is the side of the latents.

    Raises
    ------
    TargetError
        If the model needs anything else.
    """
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {}
    if "sample" in takes:
        kwargs["sample"] = torch.randn(batch, config.in_channels, seq, seq, device="cpu")
    if "hidden_states" in takes and hasattr(config, "patch_size"):
        kwargs["hidden_states"] = torch.randn(batch, config.in_channels, seq, seq, device="cpu")
    if "timestep" in takes:
        kwargs["timestep"] = torch.randint(0, 1000, (batch,), device="cpu")
    width = config.get("cross_attention_dim")
    if "encoder_hidden_states" in takes and isinstance(width, int):
        kwargs["encoder_hidden_states"] = torch.randn(batch, PROMPT_TOKENS, width, device="cpu")
    if "class_labels" in takes and config.get("num_embeds_ada_norm"):
        kwargs["class_labels"] = torch.randint(0, config.num_embeds_ada_norm, (batch,), device="cpu")
    missing = [name for name in required_names(model) if name not in kwargs]
    if missing or not kwargs:
        raise TargetError(
            f"No example inputs are known for {type(model).__name__} ({', '.join(missing)}).",
            'Describe all of them: --input "sample=float32[B,4,S,S]" and so on.',
        )
    return Inputs(kwargs=kwargs)


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether `model` is a diffusers model (without importing diffusers)."""
    return any(base.__module__ == "diffusers.models.modeling_utils" for base in type(model).__mro__)


def latent_side(model: nn.Module) -> int | None:
    """The side of the latents the config is made for."""
    size = getattr(model.config, "sample_size", None)
    return size if isinstance(size, int) else None
