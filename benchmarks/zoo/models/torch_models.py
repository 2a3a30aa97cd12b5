"""Models out of torch's own layers: nn.Transformer, an encoder of nn.TransformerEncoderLayer, LSTM and GRU models."""

import torch
import torch.nn.functional as F
from torch import nn


class Seq2Seq(nn.Module):
    """nn.Transformer between embeddings and a vocabulary head."""

    def __init__(self, vocab=32000, dim=1024, heads=16, layers=12, ffn=4096, dropout=0.1, longest=1024):
        super().__init__()
        self.src, self.tgt, self.pos = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim), nn.Embedding(longest, dim)
        self.tr = nn.Transformer(
            dim, heads, layers, layers, ffn, dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.head = nn.Linear(dim, vocab)

    def forward(self, src, tgt, labels):
        p = torch.arange(src.size(1), device=src.device)
        q = torch.arange(tgt.size(1), device=src.device)
        s, t = self.src(src) + self.pos(p), self.tgt(tgt) + self.pos(q)
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), device=src.device, dtype=t.dtype)
        h = self.tr(s, t, tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(h).flatten(0, 1).float(), labels.flatten())


class TextClassifier(nn.Module):
    """nn.TransformerEncoder with a padding mask, as the tutorials write it."""

    def __init__(self, vocab=30000, dim=768, heads=12, layers=12, ffn=3072, dropout=0.1, classes=20, longest=512):
        super().__init__()
        self.dim = dim
        self.embed = nn.Embedding(vocab, dim, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(longest, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, ffn, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, ids, labels):
        x = self.embed(ids) * self.dim**0.5 + self.position[: ids.size(1)]
        h = self.encoder(x, src_key_padding_mask=ids == 0)
        return F.cross_entropy(self.head(h[:, 0]).float(), labels)


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocab=32000, emb=1024, hid=2048, layers=3, dropout=0.2):
        super().__init__()
        self.emb = nn.Embedding(vocab, emb)
        self.rnn = nn.LSTM(emb, hid, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hid, vocab)

    def forward(self, ids, labels):
        h, _ = self.rnn(self.emb(ids))
        return F.cross_entropy(self.head(h).flatten(0, 1).float(), labels.flatten())


class GRUTagger(nn.Module):
    """Bidirectional GRU layers with residual connections."""

    def __init__(self, vocab=32000, dim=1024, layers=4, tags=64):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.head = nn.Linear(dim, tags)
        self.tags = tags

    def forward(self, ids, labels):
        x = self.emb(ids)
        for gru, norm in zip(self.layers, self.norms, strict=True):
            x = x + gru(norm(x))[0]
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), (labels % self.tags).flatten())


class CellLanguageModel(nn.Module):
    """nn.LSTMCell in a Python loop over time steps."""

    def __init__(self, vocab=32000, dim=1024, layers=2):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.cells = nn.ModuleList(nn.LSTMCell(dim, dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, labels):
        x = self.emb(ids)
        states = [(x.new_zeros(x.size(0), x.size(2)), x.new_zeros(x.size(0), x.size(2))) for _ in self.cells]
        outputs = []
        for t in range(ids.size(1)):
            h = x[:, t]
            for i, cell in enumerate(self.cells):
                states[i] = cell(h, states[i])
                h = states[i][0]
            outputs.append(h)
        return F.cross_entropy(self.head(torch.stack(outputs, 1)).flatten(0, 1).float(), labels.flatten())


def nn_transformer(**sizes):
    return Seq2Seq(**sizes)


def nn_encoder(**sizes):
    return TextClassifier(**sizes)


def lstm_lm(**sizes):
    return LSTMLanguageModel(**sizes)


def gru_tagger(**sizes):
    return GRUTagger(**sizes)


def lstm_cells(**sizes):
    return CellLanguageModel(**sizes)


def example_inputs(batch, seq, model):
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    ids = torch.randint(0, embedding.num_embeddings, (batch, seq))
    if isinstance(model, Seq2Seq):
        return {"src": ids, "tgt": ids.clone(), "labels": ids.clone()}
    if isinstance(model, TextClassifier):
        return {"ids": ids, "labels": torch.randint(0, model.head.out_features, (batch,))}
    return {"ids": ids, "labels": ids.clone()}
