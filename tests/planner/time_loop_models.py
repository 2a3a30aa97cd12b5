"""Models with loops over time steps, written by hand in the ways people do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class OwnCell(nn.Module):
    """Raw parameters and a loop over `unbind`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.w = nn.Parameter(torch.zeros(48, 32))
        self.u = nn.Parameter(torch.zeros(48, 48))
        self.head = nn.Linear(48, 50)

    def forward(self, ids):
        x = self.embed(ids)
        h = x.new_zeros(ids.shape[0], 48)
        steps = []
        for x_t in x.unbind(1):
            h = torch.tanh(x_t @ self.w.t() + h @ self.u.t())
            steps.append(h)
        return self.head(torch.stack(steps, 1))


class CellModule(nn.Module):
    """A module called once a step, its results written into a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.cell = nn.LSTMCell(32, 48)
        self.head = nn.Linear(48, 50)

    def forward(self, ids):
        x = self.embed(ids)
        h = c = x.new_zeros(ids.shape[0], 48)
        steps = []
        for t in range(ids.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            steps.append(h)
        return self.head(torch.stack(steps, 1))


class Growing(nn.Module):
    """Each step reads all steps before it: its operators are of another size at every step."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        x = self.embed(ids)
        steps = [x[:, : t + 1].mul(2).mean(1) for t in range(ids.shape[1])]
        return self.head(torch.stack(steps, 1))


class Recurrent(nn.Module):
    """A recurrent layer of torch's own, with a learned first state."""

    def __init__(self, kind="LSTM", bidirectional=False, proj_size=0, packed=False):
        super().__init__()
        directions = 2 if bidirectional else 1
        options = {"proj_size": proj_size} if proj_size else {}
        self.embed = nn.Embedding(50, 32)
        self.rnn = getattr(nn, kind)(32, 48, 2, batch_first=True, dropout=0.1, bidirectional=bidirectional, **options)
        self.state = nn.Parameter(torch.zeros(2 * directions, 1, proj_size or 48))
        self.cell = nn.Parameter(torch.zeros(2 * directions, 1, 48)) if kind == "LSTM" else None
        self.head = nn.Linear(directions * (proj_size or 48), 50)
        self.packed = packed

    def forward(self, ids):
        x, batch = self.embed(ids), ids.shape[0]
        h = self.state.repeat(1, batch, 1)
        state = h if self.cell is None else (h, self.cell.repeat(1, batch, 1))
        if self.packed:
            lengths = torch.full((batch,), ids.shape[1])
            lengths[1:] = 3
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out = self.rnn(x, state)[0]
        if self.packed:
            out = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]
        return self.head(out)


def example_inputs(batch, seq):
    return (torch.randint(0, 50, (batch, seq)),)


def loss_fn(output, inputs):
    return F.cross_entropy(output.flatten(0, 1).float(), inputs[0].flatten())
