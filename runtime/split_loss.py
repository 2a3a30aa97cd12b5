"""Cross entropy on logits whose classes tp divides: torch's loss_parallel, also where the logits came whole.

The model's own code may have gathered them (torch 2.11 gathers what is padded); each rank then takes its classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import loss_parallel

from .compat import dtensor_dispatcher
from .placements import split_dim

_LOG_SOFTMAX = torch.ops.aten._log_softmax.default


@contextmanager
def loss_on_split_classes() -> Iterator[None]:
    """`loss_parallel` that takes whole logits too, and is off again after an error inside."""
    handlers = dtensor_dispatcher()._custom_op_handlers
    before = dict(handlers)
    try:
        with loss_parallel():
            of_torch = handlers[_LOG_SOFTMAX]

            def with_split_classes(operator: Any, args: Any, kwargs: Any) -> Any:
                logits, dim = args[0], args[1] % args[0].ndim
                if split_dim(logits) != dim:
                    logits = logits.redistribute(placements=[Shard(dim)])
                return of_torch(operator, (logits, *args[1:]), kwargs)

            handlers[_LOG_SOFTMAX] = with_split_classes
            yield
    finally:
        handlers.clear()
        handlers.update(before)
