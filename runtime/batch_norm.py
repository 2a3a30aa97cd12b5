"""BatchNorm in a mixed-precision run: its weight, bias and running statistics in float32, whatever its input.

`fully_shard` gives modules their parameters in the compute dtype; torch's batch norm takes a bfloat16 input
with float32 parameters and statistics, but not a mixture of the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def keep_batch_norm_in_float32(model: nn.Module) -> None:
    """Let every batch norm of `model` cast its own parameters to float32 as it runs."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.forward = partial(_run, module, module.forward)  # type: ignore[method-assign]


def _run(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    table: dict[str, Any] = module._parameters
    saved = dict(table)
    try:
        table.update({name: p.to(torch.float32) for name, p in saved.items() if p is not None})
        return forward(*args, **kwargs)
    finally:
        table.update(saved)
