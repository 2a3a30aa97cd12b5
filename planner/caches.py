"""Empties the function caches of a model's own code, which would carry fake tensors of one run into the next."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_LIBRARIES = ("torch.", "builtins", "abc", "typing")


def forget_cached(model: nn.Module) -> None:
    """Clear every `functools.lru_cache` in the files that define the model's modules."""
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    for name in names:
        if not name.startswith(_LIBRARIES):
            for cache in _caches(sys.modules.get(name)):
                cache.cache_clear()


def _caches(module: Any) -> Iterator[Any]:
    for value in list(vars(module).values()) if module is not None else ():
        own_class = isinstance(value, type) and value.__module__ == vars(module)["__name__"]
        inside = vars(value).values() if own_class else ()
        for found in (value, *inside):
            if isinstance(found, functools._lru_cache_wrapper):
                yield found
