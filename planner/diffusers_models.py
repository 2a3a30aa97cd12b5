"""Diffusers models from a config alone: construction with random weights, inputs of common denoisers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EnvironmentFailure, TargetError
from .inputs import Inputs, required_names
from .locate import did_you_mean

PROMPT_TOKENS = 77  # CLIP's text length, which the U-Nets are trained with
VIDEO_FRAMES = 8  # of the latents of a video
PACKED_SIDE = 64  # patches along one side of the images of 1024 pixels that packed latents are trained on
_PROMPT_WIDTHS = (  # what configs call the width of their prompt's embeddings
    *("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim"),
    "cross_attention_dim",
)


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

    `seq` is the side of the latents (in patches, where the model takes its latents already cut into them).

    Raises
    ------
    TargetError
        If the model needs anything else.
    """
    config: Any = model.config
    takes = set(inspect.signature(model.forward).parameters)
    kwargs: dict[str, Any] = {}
    if "sample" in takes:
        kwargs["sample"] = _normal(batch, config.in_channels, seq, seq)
    if "hidden_states" in takes and "img_ids" in takes:
        kwargs |= _packed_latents(config, batch, seq)
    elif "hidden_states" in takes and hasattr(config, "patch_size"):
        frames = (VIDEO_FRAMES,) if isinstance(config.patch_size, tuple | list) and len(config.patch_size) == 3 else ()
        kwargs["hidden_states"] = _normal(batch, config.in_channels, *frames, seq, seq)
    if "timestep" in takes:
        kwargs["timestep"] = torch.randint(0, 1000, (batch,), device="cpu")
    if "guidance" in takes and config.get("guidance_embeds"):
        kwargs["guidance"] = torch.rand(batch, device="cpu")
    kwargs |= _prompt(config, takes, batch, required_names(model))
    kwargs |= _classes(config, takes, batch)
    missing = [name for name in required_names(model) if name not in kwargs]
    if missing or not kwargs:
        raise TargetError(
            f"No example inputs are known for {type(model).__name__} ({', '.join(missing)}).",
            'Describe all of them: --input "sample=float32[B,4,S,S]" and so on.',
        )
    return Inputs(kwargs=kwargs)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")


def _packed_latents(config: Any, batch: int, side: int) -> dict[str, torch.Tensor]:
    """Latents as a sequence of patches, with a place for each patch and each prompt token."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device="cpu").float(),) * 2, indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(1, side * side, 3)
    return {
        "hidden_states": _normal(batch, side * side, config.in_channels),
        "img_ids": places.repeat(batch, 1, 1),
        "txt_ids": torch.zeros(batch, PROMPT_TOKENS, 3, device="cpu"),
    }


def _prompt(config: Any, takes: Collection[str], batch: int, required: Collection[str]) -> dict[str, Any]:
    """Embeddings of a prompt, as wide as the config says, by token and pooled."""
    found: dict[str, Any] = {}
    width = next((config.get(name) for name in _PROMPT_WIDTHS if isinstance(config.get(name), int)), None)
    if "encoder_hidden_states" in takes and width is not None:
        found["encoder_hidden_states"] = _normal(batch, PROMPT_TOKENS, width)
        if "encoder_attention_mask" in required:
            found["encoder_attention_mask"] = torch.ones(batch, PROMPT_TOKENS, dtype=torch.long, device="cpu")
    if "pooled_projections" in takes:
        found["pooled_projections"] = _normal(batch, config.pooled_projection_dim)
    return found


def _classes(config: Any, takes: Collection[str], batch: int) -> dict[str, Any]:
    """Class labels, and what SDXL and PixArt add to the time embedding."""
    found: dict[str, Any] = {}
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if "class_labels" in takes and classes:
        found["class_labels"] = torch.randint(0, classes, (batch,), device="cpu")
    if "added_cond_kwargs" in takes and config.get("addition_embed_type") == "text_time":
        sizes = 6  # original size, crop and target size of the image
        width = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {"text_embeds": _normal(batch, width), "time_ids": _normal(batch, sizes)}
    elif "added_cond_kwargs" in takes and config.get("use_additional_conditions"):
        shape = {"resolution": _normal(batch, 2), "aspect_ratio": _normal(batch, 1)}
        found["added_cond_kwargs"] = shape
    return found


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether `model` is a diffusers model (without importing diffusers)."""
    return any(base.__module__ == "diffusers.models.modeling_utils" for base in type(model).__mro__)


def latent_side(model: nn.Module) -> int | None:
    """The side of the latents the config is made for."""
    size = getattr(model.config, "sample_size", None)
    if size is None and "img_ids" in inspect.signature(model.forward).parameters:
        return PACKED_SIDE
    return size if isinstance(size, int) else None
