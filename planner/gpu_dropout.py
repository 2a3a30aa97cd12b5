"""Dropout as a GPU runs it: one operator that keeps a mask of one byte an element.

The CPU's own dropout makes scaled noise in the dtype of its input and keeps that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """What `torch.nn.functional.dropout` is on a GPU."""
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]
