"""Hugging Face models from a config alone: construction with random weights, dummy inputs, kind of loss."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EnvironmentFailure, TargetError
from .blame import describe
from .inputs import Inputs, forward_names
from .locate import did_you_mean

# tried in this order for a config that names no architecture
_AUTO_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
# losses that are a sum over targets divided by num_items_in_batch, if they are given it
_SHIFTED_LOSSES = {"ForCausalLMLoss"}
_TOKEN_LOSSES = {"ForMaskedLMLoss", "ForTokenClassification", *_SHIFTED_LOSSES}


def read_hf_config(
    data: dict[str, Any], path: Path, overrides: Mapping[str, Any], notes: list[str]
) -> tuple[Any, type]:
    """Config object and model class for a parsed config.json; remarks go to `notes`, nothing is downloaded.

    Raises
    ------
    TargetError
        If this transformers does not know the model, or an override is no attribute of its config.
    EnvironmentFailure
        If transformers is not installed.
    """
    transformers = _transformers()
    data = copy.deepcopy(data)
    if data.pop("quantization_config", None) is not None:
        notes.append("The config's quantization is left out: training starts from unquantised random weights.")
    model_type = data.pop("model_type", None)
    architectures = data.get("architectures") or []
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if model_type is None:
        model_class = _architecture(transformers, architectures[0] if architectures else "", path)
        model_type = getattr(model_class.config_class, "model_type", None)
    if model_type not in known:
        remote = "auto_map" in data
        raise TargetError(
            f"{path.name}: transformers {transformers.__version__} has no model type {model_type!r}.",
            "Its code lies with the weights and is never run; build it in a model.py."
            if remote
            else did_you_mean(str(model_type), known) or "Install a newer transformers, or build it in a model.py.",
        )
    try:
        config = transformers.AutoConfig.for_model(model_type, **data)
    except Exception as error:
        raise TargetError(
            f"{path.name}: transformers refuses this {model_type} config: {describe(error)}.",
            "Correct the config.",
        ) from error
    for key, value in overrides.items():
        _override(config, key, value)
    if architectures and architectures[0].endswith("ForSequenceClassification"):
        _give_padding_token(config, notes)
    if architectures:
        return config, _architecture(transformers, architectures[0], path)
    model_class = _auto_class(transformers, config)
    notes.append(f"The config names no architecture; {model_class.__name__} was taken.")
    return config, model_class


def constructor(config: Any, model_class: Any) -> Callable[[], nn.Module]:
    """A call that constructs the model: random float32 weights, SDPA attention where it has that, no cache."""

    def construct() -> nn.Module:
        # a constructor may change its config, and every build must be like the first
        own = copy.deepcopy(config)
        for part in (own, own.get_text_config()):
            if hasattr(part, "use_cache"):
                part.use_cache = False
        attention = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
        return model_class._from_config(own, dtype=torch.float32, attn_implementation=attention)

    return construct


def is_hf_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (without importing transformers)."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def dummy_inputs(model: nn.Module, batch: int, seq: int) -> Inputs:
    """Random inputs and labels by the model's config and the arguments of its forward, as keyword arguments.

    Text: `input_ids` (batch, seq). Images: `pixel_values` (batch, channels, seq, seq). Spectrograms:
    `input_features` (batch, mel bins, frames the config asks for). Waveforms: `input_values` (batch, seq).

    Raises
    ------
    TargetError
        If forward takes none of these.
    """
    config: Any = model.config
    takes = set(_declared(model))
    kwargs: dict[str, Any] = {}
    if "input_ids" in takes:
        shape = (batch, 2, seq) if type(model).__name__.endswith("MultipleChoice") else (batch, seq)
        kwargs["input_ids"] = _integers(shape, config.get_text_config().vocab_size)
    if "pixel_values" in takes and _needs_pixels(model):
        kwargs["pixel_values"] = torch.randn(_image_shape(config, batch, seq, "input_ids" in takes), device="cpu")
    if "input_features" in takes and "input_ids" not in takes:
        kwargs["input_features"] = torch.randn(_spectrogram_shape(config, batch, seq), device="cpu")
    if "input_values" in takes and "input_ids" not in takes:
        kwargs["input_values"] = torch.randn(batch, seq, device="cpu")
    if not kwargs:
        raise TargetError(
            f"What to feed {type(model).__name__} is unknown; it takes {', '.join(sorted(takes))}.",
            'Describe them: --input "name=dtype[B,S]<bound".',
        )
    _add_labels(model, config, takes, kwargs, batch, seq)
    return Inputs(kwargs=kwargs)


def is_image_model(model: nn.Module) -> bool:
    """Whether the model's only input is images, so that its "sequence length" is their side."""
    takes = set(_declared(model))
    return "pixel_values" in takes and "input_ids" not in takes


def counts_tokens(model: nn.Module) -> bool:
    """Whether the model's loss is a sum over targets divided by a `num_items_in_batch` given to forward.

    Read from the source of forward: it must hand its keyword arguments on to ``self.loss_function``.
    """
    if getattr(model.config, "output_router_logits", False):
        return False  # a load-balancing term is added, which is no sum over targets
    loss = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", "") not in _TOKEN_LOSSES or forward_names(model) is not None:
        return False
    return _passes_keywords_to_loss(inspect.unwrap(type(model).forward))


def target_count(model: nn.Module, inputs: Inputs) -> int:
    """Labels other than -100; without the first of each row where the loss shifts them."""
    labels = inputs.kwargs["labels"]
    if getattr(model.loss_function, "__name__", "") in _SHIFTED_LOSSES:
        labels = labels[..., 1:]
    return int((labels != -100).sum())


def _transformers() -> Any:
    # every file is local; without these the hub would be asked for what a config merely mentions
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import transformers
    except ImportError:
        raise EnvironmentFailure(
            "A Hugging Face config needs transformers, which is not installed.",
            'Type: pip install "tpplan[hf]".',
        ) from None
    return transformers


def _architecture(transformers: Any, name: str, path: Path) -> type:
    model_class = getattr(transformers, name, None) if name else None
    if not inspect.isclass(model_class) or not issubclass(model_class, nn.Module):
        known = [n for n in dir(transformers) if "For" in n or n.endswith("Model")]
        raise TargetError(
            f"{path.name}: transformers {transformers.__version__} has no architecture {name!r}.",
            did_you_mean(name, known) or "Install a newer transformers, or build it in a model.py.",
        )
    return model_class


def _auto_class(transformers: Any, config: Any) -> type:
    for auto in _AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise TargetError(f"transformers has no model for {type(config).__name__}.", "Add `architectures` to the config.")


def _override(config: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    owner = config
    for part in parents:
        owner = getattr(owner, part, None)
    attributes = {} if owner is None else owner.to_dict()
    if last not in attributes and not hasattr(owner, last):
        near = did_you_mean(last, attributes)
        raise TargetError(f"The config has no {key}.", near or "--model-arg changes attributes that the config has.")
    setattr(owner, last, value)


def _give_padding_token(config: Any, notes: list[str]) -> None:
    """Decoders classify at the last token that is no padding, and refuse batches if there is no such token."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
        notes.append("The config has no pad_token_id, which batches need; 0 was taken.")


def _declared(model: nn.Module) -> list[str]:
    return [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]


def _needs_pixels(model: nn.Module) -> bool:
    """Images are left out where text alone is a valid input (a vision-language model)."""
    return getattr(model, "main_input_name", "") == "pixel_values" or "return_loss" in _declared(model)


def _integers(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    return torch.randint(0, bound, shape, device="cpu")


def image_side(config: Any) -> int | None:
    """The side of the images a config is made for, None if it names none."""
    for part in (config, getattr(config, "vision_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, dict):
            size = size.get("height")
        if isinstance(size, tuple | list):
            size = size[0]
        if isinstance(size, int):
            return size
    return None


def _image_shape(config: Any, batch: int, seq: int, has_text: bool) -> tuple[int, int, int, int]:
    vision = getattr(config, "vision_config", config)
    side = (image_side(config) or 224) if has_text else seq
    return (batch, getattr(vision, "num_channels", 3), side, side)


def _spectrogram_shape(config: Any, batch: int, seq: int) -> tuple[int, int, int]:
    if hasattr(config, "max_source_positions"):
        # Whisper's encoder accepts one length only: two frames a position
        return (batch, config.num_mel_bins, 2 * config.max_source_positions)
    return (batch, seq, getattr(config, "num_mel_bins", getattr(config, "feature_size", 80)))


def _add_labels(model: nn.Module, config: Any, takes: set[str], kwargs: dict[str, Any], batch: int, seq: int) -> None:
    name = type(model).__name__
    if "return_loss" in takes:
        kwargs["return_loss"] = True
    if {"start_positions", "end_positions"} <= takes:
        kwargs["start_positions"] = _integers((batch,), seq)
        kwargs["end_positions"] = _integers((batch,), seq)
    if "next_sentence_label" in takes:
        kwargs["next_sentence_label"] = _integers((batch,), 2)
    if "labels" not in takes:
        if config.is_encoder_decoder and "decoder_input_ids" in takes:
            kwargs["decoder_input_ids"] = _integers((batch, seq), config.get_text_config().vocab_size)
        return
    if name.endswith(("SequenceClassification", "ImageClassification", "AudioClassification")):
        single = config.num_labels > 1
        kwargs["labels"] = _integers((batch,), config.num_labels) if single else torch.randn(batch, device="cpu")
    elif name.endswith(("MultipleChoice", "NextSentencePrediction")):
        kwargs["labels"] = _integers((batch,), 2)
    elif name.endswith("TokenClassification"):
        kwargs["labels"] = _integers((batch, seq), config.num_labels)
    elif name.endswith("SemanticSegmentation"):
        side = kwargs["pixel_values"].shape[-1]
        kwargs["labels"] = _integers((batch, side, side), config.num_labels)
    elif "input_ids" in kwargs:
        kwargs["labels"] = kwargs["input_ids"].clone()
    elif name.endswith("ForCTC") and "input_values" in kwargs:
        # a CTC loss is finite if the frames outnumber the labels and the blanks between equal ones
        length = max(1, seq // getattr(config, "inputs_to_logits_ratio", 1) // 3)
        kwargs["labels"] = 1 + _integers((batch, length), config.vocab_size - 1)
    elif "input_features" in kwargs or "input_values" in kwargs:
        length = min(seq, getattr(config, "max_target_positions", seq))
        kwargs["labels"] = _integers((batch, length), config.get_text_config().vocab_size)


def _passes_keywords_to_loss(forward: Callable[..., Any]) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "loss_function":
            # an entry without a name is the ** of a call
            return any(keyword.arg is None or keyword.arg == "num_items_in_batch" for keyword in node.keywords)
    return False
