"""Graph neural networks by hand: messages along edges, summed at their targets with index_add.

A batch holds `batch` graphs of `seq` nodes each with a fixed number of edges a node, and is one large graph inside.
"""

import torch
import torch.nn.functional as F
from torch import nn

NEIGHBOURS = 8


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.update = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, h, source, target):
        m = self.message(torch.cat([h[source], h[target]], -1))
        total = torch.zeros_like(h).index_add(0, target, m)
        return h + self.update(torch.cat([self.norm(h), total], -1))


class MessagePassing(nn.Module):
    def __init__(self, dim=1024, layers=12, kinds=128):
        super().__init__()
        self.kinds = kinds
        self.embed = nn.Embedding(kinds, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))
        self.out = nn.Linear(dim, 1)

    def forward(self, atoms, edges, labels):
        graphs, nodes = atoms.shape
        first = torch.arange(graphs, device=atoms.device)[:, None] * nodes
        source, target = ((edges[:, :, side] + first).flatten() for side in (0, 1))
        h = self.embed(atoms).flatten(0, 1)
        for layer in self.layers:
            h = layer(h, source, target)
        pooled = self.out(h).view(graphs, nodes).mean(1)
        return F.mse_loss(pooled.float(), labels.float())


def message_passing(**sizes):
    return MessagePassing(**sizes)


def example_inputs(batch, seq, model):
    return {
        "atoms": torch.randint(0, model.kinds, (batch, seq)),
        "edges": torch.randint(0, seq, (batch, seq * NEIGHBOURS, 2)),
        "labels": torch.randn(batch),
    }
