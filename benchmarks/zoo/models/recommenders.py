"""Recommenders with embedding tables; `seq` is not used by DLRM (one row a sample), the bag's length elsewhere."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def mlp(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())][:-1])


class DLRM(nn.Module):
    """Tables of nn.Embedding, a bottom MLP, pairwise interaction, a top MLP (dense gradients)."""

    def __init__(self, tables=8, rows=1_000_000, dim=128, wide=1024):
        super().__init__()
        self.rows, self.count = rows, tables
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(tables))
        self.bottom = mlp(13, 512, 256, dim)
        n = tables + 1
        self.register_buffer("tri", torch.tril_indices(n, n, -1), persistent=False)
        self.top = mlp(dim + n * (n - 1) // 2, wide, wide, 512, 256, 1)

    def forward(self, dense, sparse, labels):
        d = self.bottom(dense)
        x = torch.stack([d] + [t(sparse[:, i]) for i, t in enumerate(self.tables)], 1)
        z = torch.bmm(x, x.transpose(1, 2))[:, self.tri[0], self.tri[1]]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat([d, z], 1)).float().squeeze(1), labels.float())


class BagRanker(nn.Module):
    """nn.EmbeddingBag over the items of a user's history, a cross network and a deep network (DCN v2)."""

    def __init__(self, items=2_000_000, dim=128, features=8, crosses=3, wide=2048):
        super().__init__()
        self.items, self.features = items, features
        self.bags = nn.ModuleList(nn.EmbeddingBag(items // features, dim, mode="sum") for _ in range(features))
        width = dim * features
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(crosses))
        self.deep = mlp(width, wide, wide, width)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, history, labels):
        x0 = torch.cat([bag(history[:, i]) for i, bag in enumerate(self.bags)], 1)
        x = x0
        for cross in self.crosses:
            x = x0 * cross(x) + x
        logits = self.head(torch.cat([x, self.deep(x0)], 1))
        return F.binary_cross_entropy_with_logits(logits.float().squeeze(1), labels.float())


def dlrm(**sizes):
    return DLRM(**sizes)


def bag_ranker(**sizes):
    return BagRanker(**sizes)


def example_inputs(batch, seq, model):
    labels = torch.randint(0, 2, (batch,)).float()
    if isinstance(model, DLRM):
        sparse = torch.randint(0, model.rows, (batch, model.count))
        return {"dense": torch.randn(batch, 13), "sparse": sparse, "labels": labels}
    history = torch.randint(0, model.items // model.features, (batch, model.features, seq))
    return {"history": history, "labels": labels}
