"""Convolution nets by hand with edges that skip: a U-Net, and a residual net with dense connections between levels."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 8


def double(into, out):
    return nn.Sequential(
        nn.Conv2d(into, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """The original U-Net for segmentation: four levels down, four up, a skip at each level."""

    def __init__(self, width=96, levels=4):
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.stem = double(3, width)
        self.downs = nn.ModuleList(double(a, b) for a, b in itertools.pairwise(widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merges = nn.ModuleList(double(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images):
        x = self.stem(images)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, merge, skip in zip(self.ups, self.merges, reversed(skips), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


class NestedNet(nn.Module):
    """U-Net++-like: every node of the grid sees all nodes before it at its level, in a dict by (level, column)."""

    def __init__(self, width=64, levels=4):
        super().__init__()
        self.levels = levels
        widths = [width * 2**i for i in range(levels + 1)]
        self.nodes = nn.ModuleDict()
        for column in range(levels + 1):
            for level in range(levels + 1 - column):
                below = widths[level + 1] if column else 0
                into = (3 if level == 0 else widths[level - 1]) if column == 0 else column * widths[level] + below
                self.nodes[f"{level}_{column}"] = double(into, widths[level])
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images):
        found = {}
        for column in range(self.levels + 1):
            for level in range(self.levels + 1 - column):
                if column == 0:
                    x = images if level == 0 else F.max_pool2d(found[level - 1, 0], 2)
                else:
                    deeper = F.interpolate(found[level + 1, column - 1], scale_factor=2.0, mode="nearest")
                    x = torch.cat([*(found[level, c] for c in range(column)), deeper], 1)
                found[level, column] = self.nodes[f"{level}_{column}"](x)
        return self.head(found[0, self.levels])


def u_net(width=96, levels=4):
    return UNet(width, levels)


def nested_u_net(width=64, levels=4):
    return NestedNet(width, levels)


def example_inputs(batch, seq=256):
    return {"images": torch.randn(batch, 3, seq, seq), "labels": torch.randint(0, CLASSES, (batch, seq, seq))}


def loss_fn(output, inputs):
    return F.cross_entropy(output.float(), inputs["labels"])
