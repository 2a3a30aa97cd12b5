"""Labels for a transformers model, such that every head gets a gradient: what forward takes, by the model's task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

_TOKENS = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification", "XVector")


def labels_for(
    model: nn.Module, takes: Collection[str], inputs: Mapping[str, Any], batch: int, seq: int
) -> dict[str, Any]:
    """Labels (and `decoder_input_ids` for a model that has none) as keyword arguments of forward."""
    config: Any = model.config
    found: dict[str, Any] = {}
    if {"start_positions", "end_positions"} <= set(takes):
        found["start_positions"] = _integers((batch,), seq)
        found["end_positions"] = _integers((batch,), seq)
    for name in ("next_sentence_label", "sentence_order_label"):
        if name in takes:
            found[name] = _integers((batch,), 2)
    if "labels" in takes:
        labels = _labels(model, config, inputs, batch, seq)
        if labels is not None:
            found["labels"] = labels
    elif config.is_encoder_decoder and "decoder_input_ids" in takes:
        found["decoder_input_ids"] = _integers((batch, _target_length(config, seq)), _vocabulary(config))
    return found


def _labels(model: nn.Module, config: Any, inputs: Mapping[str, Any], batch: int, seq: int) -> Any:
    """The argument called `labels`; None where training with it is not written."""
    task = type(model).__name__
    if task.endswith(("ObjectDetection", "DepthEstimation")):
        # the loss of detection pairs queries with objects outside of torch, image by image; a stand-in costs about
        # the same
        return None
    if task.endswith("SemanticSegmentation"):
        side = inputs["pixel_values"].shape[-1]
        return _integers((batch, side, side), config.num_labels)
    if task.endswith(_TOKENS):
        return _integers((batch,), config.num_labels) if config.num_labels > 1 else _normal(batch)
    if task.endswith(("MultipleChoice", "NextSentencePrediction")):
        return _integers((batch,), 2)
    if task.endswith("TokenClassification"):
        return _integers((batch, seq), config.num_labels)
    if task.endswith("QuestionAnswering"):
        return torch.rand(batch, config.num_labels, device="cpu")  # a score for every answer
    if task.startswith("Electra") and task.endswith("ForPreTraining"):
        return _integers((batch, seq), 2)  # replaced or not
    if "input_ids" in inputs:
        return inputs["input_ids"].clone()
    if task.endswith("ForCTC"):
        # a CTC loss is finite if the frames outnumber the labels and the blanks between equal ones
        length = max(1, seq // getattr(config, "inputs_to_logits_ratio", 1) // 3)
        return 1 + _integers((batch, length), config.vocab_size - 1)
    if "input_features" in inputs or "input_values" in inputs:
        return _integers((batch, _target_length(config, seq)), _vocabulary(config))
    if "pixel_values" in inputs and getattr(config, "num_labels", 0) > 1:
        return _integers((batch,), config.num_labels)
    return None


def _target_length(config: Any, seq: int) -> int:
    return min(seq, getattr(config, "max_target_positions", seq))


def _vocabulary(config: Any) -> int:
    return config.get_text_config().vocab_size


def _integers(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    return torch.randint(0, bound, shape, device="cpu")


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")
