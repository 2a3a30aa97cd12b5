"""tpplan: how to split any PyTorch model over your GPUs, priced, proven and runnable.

The public API is loaded on first use, so `import tpplan` costs nothing:

- ``tpplan.suggest(target, gpus=16)`` plans a model and returns a `Plan`.
- ``tpplan.Plan.load(path)`` / ``plan.save(path)`` read and write plan.json.
- ``tpplan.parallelize(build_model, plan, ...)`` applies a plan in a user's own training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import TpplanError
    from .planner.plan import Plan
    from .planner.suggest import suggest
    from .runtime.api import parallelize

__all__ = ["Plan", "TpplanError", "parallelize", "suggest"]
__version__ = "0.1.0.dev0"

_PUBLIC = {
    "Plan": ("tpplan.planner.plan", "Plan"),
    "suggest": ("tpplan.planner.suggest", "suggest"),
    "parallelize": ("tpplan.runtime.api", "parallelize"),
    "TpplanError": ("tpplan.errors", "TpplanError"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tpplan' has no attribute {name!r}")
    import importlib

    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)
