"""Hugging Face models from a config alone: construction with random weights, kind of loss."""

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
        # unnamed, the attention of each part of the model is SDPA where that part has it
        return model_class._from_config(own, dtype=torch.float32)

    return construct


def is_hf_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (without importing transformers)."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


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


def _passes_keywords_to_loss(forward: Callable[..., Any]) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "loss_function":
            # an entry without a name is the ** of a call
            return any(keyword.arg is None or keyword.arg == "num_items_in_batch" for keyword in node.keywords)
    return False
