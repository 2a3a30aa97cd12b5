"""Image classifiers of torchvision by their name, with a cross-entropy loss; `seq` is the side of the images."""

import torch
import torch.nn.functional as F
from vision_libraries import torchvision

CLASSES = 1000


def classifier(name="resnet50", **settings):
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings)


def resnet(blocks="bottleneck", layers=(3, 4, 6, 3), **settings):
    """A ResNet of any depth."""
    kinds = {"bottleneck": torchvision.models.resnet.Bottleneck, "basic": torchvision.models.resnet.BasicBlock}
    return torchvision.models.ResNet(kinds[blocks], list(layers), num_classes=CLASSES, **settings)


def swin(embed_dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, drop_path=0.2):
    return torchvision.models.SwinTransformer(
        [4, 4],
        embed_dim,
        list(depths),
        list(heads),
        [window, window],
        stochastic_depth_prob=drop_path,
        num_classes=CLASSES,
    )


def vit(image=224, patch=16, layers=24, heads=16, width=1024, mlp=4096):
    return torchvision.models.VisionTransformer(image, patch, layers, heads, width, mlp, num_classes=CLASSES)


def densenet(growth=32, blocks=(6, 12, 24, 16), features=64):
    return torchvision.models.DenseNet(growth, tuple(blocks), features, num_classes=CLASSES)


def example_inputs(batch, seq=224):
    return {"x": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, CLASSES, (batch,))}


def loss_fn(output, inputs):
    # Inception and GoogLeNet return the logits of auxiliary classifiers beside their own
    logits = output if isinstance(output, torch.Tensor) else output[0]
    extra = () if isinstance(output, torch.Tensor) else [o for o in output[1:] if o is not None]
    loss = F.cross_entropy(logits.float(), inputs["labels"])
    return loss + sum(0.4 * F.cross_entropy(other.float(), inputs["labels"]) for other in extra)
