"""The sequence length of a model when the user gives none: its own limit, or the side of its images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .diffusers_models import is_diffusers_model, latent_side
from .huggingface import is_hf_model
from .huggingface_inputs import image_side, is_image_model

LONGEST_DEFAULT = 4096
DEFAULT_IMAGE_SIDE = 224
# what configs and models call the longest sequence they can take
_LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_len",
    "seq_length",
    "context_length",
    "n_ctx",
    "max_target_positions",
)


@dataclass(frozen=True, slots=True)
class SequenceDefault:
    """The sequence length taken when the user gives none.

    `meaning` is "tokens" or "side" (of images); `source` says in words where it comes from.
    """

    length: int
    meaning: str
    source: str


def sequence_default(model: nn.Module, example_inputs: Callable[..., Any] | None = None) -> SequenceDefault:
    """min(4096, the model's maximum) for sequences; for images their side, 224 unless the config says.

    A default that the file gives the `seq` argument of its `example_inputs` comes first.
    """
    latents = latent_side(model) if is_diffusers_model(model) else None
    images = is_image_model(model) if is_hf_model(model) else latents is not None or _looks_like_images(model)
    meaning = "side" if images else "tokens"
    stated = _default_of(example_inputs)
    if stated is not None:
        return SequenceDefault(stated, meaning, "the default of example_inputs")
    if images:
        side = latents or image_side(getattr(model, "config", None))
        source = "the config's image size" if side else "the usual side of images"
        return SequenceDefault(side or DEFAULT_IMAGE_SIDE, meaning, source)
    found = _longest_sequence(model)
    if found is None:
        return SequenceDefault(LONGEST_DEFAULT, meaning, "the model names no maximum")
    name, longest = found
    return SequenceDefault(min(LONGEST_DEFAULT, longest), meaning, f"min({LONGEST_DEFAULT}, {name} = {longest})")


def _default_of(example_inputs: Callable[..., Any] | None) -> int | None:
    """The default that a file gives the `seq` argument of its `example_inputs`."""
    if example_inputs is None:
        return None
    parameters = list(inspect.signature(example_inputs).parameters.values())
    default = parameters[1].default if len(parameters) > 1 else None
    return default if isinstance(default, int) and default > 0 else None


def _looks_like_images(model: nn.Module) -> bool:
    kinds = [type(module) for module in model.modules()]
    return nn.Conv2d in kinds and nn.Embedding not in kinds


def _longest_sequence(model: nn.Module) -> tuple[str, int] | None:
    """Name and value of the model's own limit on its sequence length."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (text, config, model, getattr(model, "cfg", None), getattr(model, "args", None)):
        for name in _LENGTH_NAMES:
            value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value - _reserved_positions(model)
    return None


def _reserved_positions(model: nn.Module) -> int:
    """Rows of a position table that no position uses (RoBERTa numbers positions from padding_idx + 1)."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return padding + 1
    return 0
