"""Residual networks for images (depths 18 to 152), with BatchNorm; forward knows nothing of the labels.

tpplan suggest examples/resnet.py --gpus 16 --global-batch 1024
tpplan suggest examples/resnet.py --gpus 4 --hardware cpu-gloo --model-arg depth=18 --model-arg width=8 --seq-len 32
"""

import torch
import torch.nn.functional as F
from torch import nn

# depth -> (bottleneck blocks?, blocks in each of the four groups)
LAYOUTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Basic(nn.Module):
    """Two 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.branch = nn.Sequential(
            conv(inputs, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, width, 3),
            nn.BatchNorm2d(width),
        )
        self.shortcut = make_shortcut(inputs, width, stride)

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two 1 x 1 ones that narrow and widen; the stride lies on the 3 x 3."""

    expansion = 4

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = width * self.expansion
        self.branch = nn.Sequential(
            conv(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = make_shortcut(inputs, outputs, stride)

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


def make_shortcut(inputs, outputs, stride):
    """The identity, or a projection where the shape changes."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    def __init__(self, depth, width, num_classes):
        super().__init__()
        if depth not in LAYOUTS:
            raise ValueError(f"depth={depth}: choose one of {', '.join(map(str, LAYOUTS))}")
        self.num_classes = num_classes
        bottleneck, counts = LAYOUTS[depth]
        block = Bottleneck if bottleneck else Basic
        self.stem = nn.Sequential(
            conv(3, width, 7, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        )
        groups = []
        channels = width
        for i, count in enumerate(counts):
            blocks = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width * 2**i, stride))
                channels = width * 2**i * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = self.groups(self.stem(images))
        return self.head(self.pool(x).flatten(1))


def build_model(depth=50, width=64, num_classes=1000):
    return ResNet(int(depth), width, num_classes)


def example_inputs(batch, seq, model):
    """`seq` is the side of the images."""
    return {"images": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, model.num_classes, (batch,))}


def loss_fn(output, inputs):
    return F.cross_entropy(output, inputs["labels"])
