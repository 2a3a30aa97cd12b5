"""What to feed a transformers model: a batch of random inputs, read from its config and the arguments of its forward.

Text is (batch, seq); images have side `seq` where they are all the model sees, else the side that the config names.
Where neither the config nor forward's arguments say what a required input is, the user describes it with --input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TargetError, UsageError
from .huggingface_labels import labels_for
from .inputs import Inputs, required_names

IMAGE_SIDE = 224  # where text comes with images whose size the config leaves open


@dataclass(frozen=True, slots=True)
class Request:
    """One question for inputs: of which model, what its forward takes, how many samples, how long."""

    model: nn.Module
    config: Any
    takes: frozenset[str]
    batch: int
    seq: int


def dummy_inputs(model: nn.Module, batch: int, seq: int) -> Inputs:
    """Random inputs and labels by the model's config and the arguments of its forward, as keyword arguments.

    Text: `input_ids` (batch, seq), the tokens that stand for an image first. Images: `pixel_values` (batch,
    channels, side, side), videos with frames before the channels. Spectrograms: `input_features` (batch, mel bins,
    frames the config asks for). Waveforms: `input_values` (batch, seq). Time series and trajectories by the lengths
    of the config.

    Raises
    ------
    TargetError
        If forward needs something that is not known here.
    """
    takes = frozenset(_declared(model))
    request = Request(model, model.config, takes, batch, seq)
    kwargs: dict[str, Any] = {}
    for name, make in _MAKERS.items():
        if name in takes:
            value = make(request)
            if value is not None:
                kwargs[name] = value
    if "pixel_values" in kwargs and "input_ids" in kwargs:
        _place_image_tokens(request, kwargs)
    missing = [name for name in required_names(model) if name not in kwargs]
    if missing or not kwargs:
        raise TargetError(
            f"What to feed {type(model).__name__} is unknown; it takes {', '.join(missing or sorted(takes))}.",
            'Describe all inputs: --input "name=dtype[B,S]<bound".',
        )
    kwargs.update(labels_for(model, takes, kwargs, batch, seq))
    return Inputs(kwargs=kwargs)


def is_image_model(model: nn.Module) -> bool:
    """Whether images or videos are all the model sees, so that its "sequence length" is their side."""
    takes = set(_declared(model))
    return "pixel_values" in takes and "input_ids" not in takes


def image_side(config: Any) -> int | None:
    """The side of the images a config is made for, None if it names none."""
    for part in (config, *(getattr(config, name, None) for name in ("vision_config", "image_config"))):
        size = getattr(part, "image_size", None)
        if isinstance(size, Mapping):
            size = size.get("height")
        if isinstance(size, tuple | list):
            size = size[0]
        if isinstance(size, int):
            return size
    return None


def _declared(model: nn.Module) -> list[str]:
    return [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]


def _integers(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    return torch.randint(0, bound, shape, device="cpu")


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of these settings that the config has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _input_ids(request: Request) -> torch.Tensor:
    batch, seq = request.batch, request.seq
    shape = (batch, 2, seq) if type(request.model).__name__.endswith("MultipleChoice") else (batch, seq)
    return _integers(shape, request.config.get_text_config().vocab_size)


def _vision(config: Any) -> Any:
    """The part of a config that describes the images."""
    return getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config


def _pixel_values(request: Request) -> torch.Tensor | None:
    config, vision = request.config, _vision(request.config)
    if "image_sizes" in request.takes and getattr(config, "image_grid_pinpoints", None) is not None:
        return None  # tiles of one image as the processor cuts them; text alone is a valid sample
    if "image_grid_thw" in request.takes:
        _, height, width = _grid(request)
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return _normal(request.batch * height * width, patch)
    alone = is_image_model(request.model)
    side = request.seq if alone else (image_side(config) or IMAGE_SIDE)
    image = (getattr(vision, "num_channels", None) or getattr(config, "num_channels", 3), side, side)
    frames = getattr(config, "num_frames", None)
    return _normal(request.batch, *((frames, *image) if frames and alone else image))


def _grid(request: Request) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of one image, where forward takes them as `image_grid_thw`."""
    vision = _vision(request.config)
    rows = (image_side(request.config) or IMAGE_SIDE) // vision.patch_size
    merge = vision.spatial_merge_size
    return 1, rows // merge * merge, rows // merge * merge


def _image_tokens(request: Request) -> int | None:
    """How many tokens of the text stand for one image; None if images enter in another way."""
    config, vision = request.config, _vision(request.config)
    if _first(config, ("image_token_id", "image_token_index")) is None:
        return None
    if "image_grid_thw" in request.takes:
        _, height, width = _grid(request)
        return height * width // vision.spatial_merge_size**2
    stated = _first(config, ("image_seq_length", "mm_tokens_per_image", "num_query_tokens"))
    side, patch = image_side(config), getattr(vision, "patch_size", None)
    by_patches = (side // patch) ** 2 if side and isinstance(patch, int) else None
    if getattr(config, "vision_feature_select_strategy", None) is not None and by_patches:
        return by_patches + (config.vision_feature_select_strategy == "full")
    return by_patches if stated is None or hasattr(config, "projection_dim") else stated


def _place_image_tokens(request: Request, kwargs: dict[str, Any]) -> None:
    """Put the tokens that stand for an image before each text, and none within it."""
    count = _image_tokens(request)
    if count is None:
        return
    if count >= request.seq:
        raise UsageError(
            f"An image of {type(request.model).__name__} takes {count} tokens, the sequence has {request.seq}.",
            f"Choose a sequence length above {count}.",
        )
    token = _first(request.config, ("image_token_id", "image_token_index"))
    ids = kwargs["input_ids"]
    bound = request.config.get_text_config().vocab_size
    specials = [v for k, v in vars(request.config).items() if k.endswith("_token_id") and isinstance(v, int)]
    plain = next(k for k in range(bound) if k != token and k not in specials)
    for special in {token, *specials}:
        ids[ids == special] = plain
    ids[:, :count] = token
    is_image = ids == token
    if "mm_token_type_ids" in request.takes:
        kwargs["mm_token_type_ids"] = is_image.long()
    if "token_type_ids" in request.takes:
        kwargs["token_type_ids"] = (~is_image).long()


def _image_grid(request: Request) -> torch.Tensor | None:
    if not hasattr(_vision(request.config), "spatial_merge_size"):
        return None
    return torch.tensor([_grid(request)] * request.batch, device="cpu")


def _masked_patches(request: Request) -> torch.Tensor | None:
    """Which patches are hidden, the same number in each sample; only where forward cannot do without."""
    model, config = request.model, request.config
    required = "bool_masked_pos" in required_names(model)
    if not required and not type(model).__name__.endswith("ForMaskedImageModeling"):
        return None
    patches = (request.seq // config.patch_size) ** 2
    if getattr(config, "num_frames", None) is not None:
        patches *= config.num_frames // config.tubelet_size
    order = torch.rand(request.batch, patches, device="cpu").argsort(dim=1)
    return order < patches // 2


def _patch_noise(request: Request) -> torch.Tensor | None:
    """A number for every patch, by whose order a masked autoencoder hides patches; drawn by forward otherwise."""
    config = request.config
    return (
        torch.rand(request.batch, (request.seq // config.patch_size) ** 2, device="cpu")
        if hasattr(config, "mask_ratio")
        else None
    )


def _input_features(request: Request) -> torch.Tensor | None:
    if "input_ids" in request.takes:
        return None
    batch, config = request.batch, request.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper's encoder accepts one length only: two frames a position
        return _normal(batch, config.num_mel_bins, 2 * config.max_source_positions)
    bins = _first(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim"))
    return None if bins is None else _normal(batch, request.seq, bins)


def _input_values(request: Request) -> torch.Tensor | None:
    if "input_ids" in request.takes:
        return None
    batch, config = request.batch, request.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _normal(batch, config.max_length, config.num_mel_bins)
    if hasattr(config, "audio_channels"):
        return _normal(batch, config.audio_channels, request.seq)
    return _normal(batch, request.seq)


def _points(request: Request) -> torch.Tensor:
    return torch.rand(request.batch, 1, 2, 2, device="cpu") * request.seq


def _point_labels(request: Request) -> torch.Tensor:
    return torch.tensor([0, 1], device="cpu").expand(request.batch, 1, 2).clone()  # background, foreground


def _boxes(request: Request) -> torch.Tensor | None:
    if "input_points" not in request.takes:
        return None
    corners = torch.rand(request.batch, 1, 2, 2, device="cpu") * (request.seq / 2)
    return torch.cat([corners[:, :, 0], corners[:, :, 0] + corners[:, :, 1]], dim=-1)


def _text_boxes(request: Request) -> torch.Tensor:
    """Left, top, right and bottom of every token on its page, from 0 to 1000."""
    corner, size = (_integers((request.batch, request.seq, 2), 500) for _ in range(2))
    return torch.cat([corner, corner + size], dim=-1)


def _series_past(request: Request) -> int:
    config = request.config
    return config.context_length + max(getattr(config, "lags_sequence", None) or [0])


def _series(request: Request, length: int) -> torch.Tensor:
    """A series of `length` steps, with a channel dimension where the config counts more than one input."""
    config = request.config
    channels = getattr(config, "num_input_channels", None)
    if channels is not None:
        return _normal(request.batch, length, channels)
    size = getattr(config, "input_size", 1)
    return _normal(request.batch, length, size) if size > 1 else _normal(request.batch, length)


def _observed(request: Request) -> torch.Tensor:
    return torch.ones_like(_series(request, _series_past(request)))


def _time_features(request: Request, length: int) -> torch.Tensor:
    return _normal(request.batch, length, request.config.num_time_features)


def _static_categories(request: Request) -> torch.Tensor | None:
    config = request.config
    if not config.num_static_categorical_features:
        return None
    columns = [_integers((request.batch, 1), bound) for bound in config.cardinality]
    return torch.cat(columns, dim=1)


def _static_reals(request: Request) -> torch.Tensor | None:
    count = request.config.num_static_real_features
    return _normal(request.batch, count) if count else None


def _timesteps(request: Request) -> torch.Tensor | None:
    bound = getattr(request.config, "max_ep_len", None)
    return None if bound is None else _integers((request.batch, request.seq), bound)


def _trajectory(name: str) -> Callable[[Request], torch.Tensor | None]:
    """Steps of a trajectory with the width that the config gives them (`name`; one number where it is "")."""

    def make(request: Request) -> torch.Tensor | None:
        width = getattr(request.config, name, None) if name else 1
        return None if width is None else _normal(request.batch, request.seq, width)

    return make


def _return_loss(request: Request) -> bool:
    return True


# in the order in which they are drawn; a maker answers None where its input is better left out
_MAKERS: Mapping[str, Callable[[Request], Any]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "image_grid_thw": _image_grid,
    "bool_masked_pos": _masked_patches,
    "noise": _patch_noise,
    "input_features": _input_features,
    "input_values": _input_values,
    "input_points": _points,
    "input_labels": _point_labels,
    "input_boxes": _boxes,
    "bbox": _text_boxes,
    "past_values": lambda r: _series(r, _series_past(r)),
    "past_time_features": lambda r: _time_features(r, _series_past(r)),
    "past_observed_mask": _observed,
    "future_values": lambda r: _series(r, r.config.prediction_length),
    "future_time_features": lambda r: _time_features(r, r.config.prediction_length),
    "static_categorical_features": _static_categories,
    "static_real_features": _static_reals,
    "states": _trajectory("state_dim"),
    "actions": _trajectory("act_dim"),
    "rewards": _trajectory(""),
    "returns_to_go": _trajectory(""),
    "timesteps": _timesteps,
    "return_loss": _return_loss,
}
