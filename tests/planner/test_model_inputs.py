"""Inputs that the planner makes up for vision, audio, multimodal, series and diffusion models, and losses of them."""

from __future__ import annotations

import json

import pytest
import torch
from tpplan.errors import UsageError
from tpplan.planner.inputs import Inputs, take
from tpplan.planner.losses import find_loss
from tpplan.planner.target import load_target

pytest.importorskip("transformers")
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def kwargs_of(tmp_path, config, batch=2, seq=32):
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = load_target(str(tmp_path / "config.json"))
    return target.example_inputs(target.build(), batch, seq).kwargs


def shapes(kwargs):
    return {name: tuple(value.shape) for name, value in kwargs.items() if isinstance(value, torch.Tensor)}


def llava():
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_id": 127,
    }


def test_the_tokens_of_an_image_match_its_features(tmp_path):
    given = kwargs_of(tmp_path, llava())
    assert shapes(given) == {"input_ids": (2, 32), "pixel_values": (2, 3, 32, 32), "labels": (2, 32)}
    assert (given["input_ids"] == 127).sum(1).tolist() == [16, 16]  # (32 / 8) squared patches


def test_a_text_too_short_for_its_image_is_refused(tmp_path):
    with pytest.raises(UsageError, match="takes 16 tokens, the sequence has 16"):
        kwargs_of(tmp_path, llava(), seq=16)


def test_videos_have_frames(tmp_path):
    config = {
        "architectures": ["VideoMAEForVideoClassification"],
        "model_type": "videomae",
        **VISION,
        "num_frames": 4,
        "num_labels": 5,
    }
    assert shapes(kwargs_of(tmp_path, config)) == {"pixel_values": (2, 4, 3, 32, 32), "labels": (2,)}


def test_series_are_as_long_as_the_config_says(tmp_path):
    config = {
        "architectures": ["TimeSeriesTransformerForPrediction"],
        "model_type": "time_series_transformer",
        "prediction_length": 6,
        "context_length": 10,
        "lags_sequence": [1, 5],
        "num_time_features": 2,
    }
    assert shapes(kwargs_of(tmp_path, config)) == {
        "past_values": (2, 15),
        "past_time_features": (2, 15, 2),
        "past_observed_mask": (2, 15),
        "future_values": (2, 6),
        "future_time_features": (2, 6, 2),
    }


def test_segmentation_by_points_and_boxes(tmp_path):
    config = {"architectures": ["SamModel"], "model_type": "sam", "vision_config": {"num_hidden_layers": 1}}
    given = kwargs_of(tmp_path, config, seq=1024)
    assert shapes(given) == {
        "pixel_values": (2, 3, 1024, 1024),
        "input_points": (2, 1, 2, 2),
        "input_labels": (2, 1, 2),
        "input_boxes": (2, 1, 4),
    }
    left, top, right, bottom = given["input_boxes"].unbind(-1)
    assert (left <= right).all()
    assert (top <= bottom).all()


def test_packed_latents_carry_their_places(tmp_path):
    pytest.importorskip("diffusers")
    config = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": True,
    }
    given = kwargs_of(tmp_path, config, seq=4)
    assert shapes(given) == {
        "hidden_states": (2, 16, 64),
        "img_ids": (2, 16, 3),
        "txt_ids": (2, 77, 3),
        "timestep": (2,),
        "guidance": (2,),
        "encoder_hidden_states": (2, 77, 32),
        "pooled_projections": (2, 24),
    }
    assert given["img_ids"][0, 6].tolist() == [0, 1, 2]


def test_samples_are_taken_from_lists_of_dicts_and_rows_of_patches():
    objects = [{"class_labels": torch.tensor([i]), "boxes": torch.rand(i, 4)} for i in range(4)]
    batch = Inputs(
        kwargs={
            "ids": torch.arange(4),
            "patches": torch.arange(12),
            "labels": objects,
            "table": torch.ones(1, 5),
        }
    )
    part = take(batch, 1, 3).kwargs
    assert part["ids"].tolist() == [1, 2]
    assert part["patches"].tolist() == [3, 4, 5, 6, 7, 8]  # three rows a sample
    assert part["table"].shape == (1, 5)  # one row is every sample's
    assert [one["boxes"].shape for one in part["labels"]] == [(1, 4), (2, 4)]


def test_a_stand_in_loss_counts_every_trained_output():
    first, second = (torch.full((3,), value, requires_grad=True) for value in (1.0, 2.0))
    loss, said = find_loss({"a": first, "b": [second, first], "c": torch.ones(2), "n": torch.arange(2)})
    assert loss.item() == 1.0 + 4.0
    assert said == "stand-in: the mean of squares of each of 2 floating-point outputs"
