"""Image classifiers of timm by their name, with a cross-entropy loss; `seq` is the side of the images."""

import torch
import torch.nn.functional as F
from vision_libraries import timm

CLASSES = 1000


def classifier(name="vit_base_patch16_224", **settings):
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)


def example_inputs(batch, seq=224):
    return {"x": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, CLASSES, (batch,))}


def loss_fn(output, inputs):
    return F.cross_entropy(output.float(), inputs["labels"])
