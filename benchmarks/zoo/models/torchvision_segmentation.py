"""Semantic segmentation of torchvision: a dict of maps goes out, an auxiliary head among them."""

import torch
import torch.nn.functional as F
from vision_libraries import torchvision

CLASSES = 21


def segmenter(name="deeplabv3_resnet50"):
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)


def example_inputs(batch, seq=512):
    return {"x": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, CLASSES, (batch, seq, seq))}


def loss_fn(output, inputs):
    main, extra = (F.cross_entropy(output[name].float(), inputs["labels"]) for name in ("out", "aux"))
    return main + 0.5 * extra
