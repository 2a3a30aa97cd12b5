"""Semantic segmentation of torchvision: a dict of maps goes out, an auxiliary head among them."""

import torch
import torch.nn.functional as F
from vision_libraries import torchvision

CLASSES = 21


def segmenter(name="deeplabv3_resnet50", dropout=None):
    """A segmentation model; `dropout` replaces the rates of its heads, which torchvision fixes."""
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    for module in model.modules():
        if dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def example_inputs(batch, seq=512):
    return {"x": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, CLASSES, (batch, seq, seq))}


def loss_fn(output, inputs):
    main, extra = (F.cross_entropy(output[name].float(), inputs["labels"]) for name in ("out", "aux"))
    return main + 0.5 * extra
