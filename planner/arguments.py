"""Calls a user's factory or class with the arguments of the command line, and checks them first."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import TargetError
from .locate import did_you_mean
from .user_module import Found

# what a constructor calls the one argument that is its configuration
_CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")


def bind_arguments(found: Found, arguments: Mapping[str, Any], shown: str, notes: list[str]) -> Callable[[], nn.Module]:
    """A call without arguments that constructs the model.

    Where the only argument without a default is a configuration dataclass whose fields all have defaults, the
    dataclass is made first; `arguments` then name its fields, and `notes` says so.

    Parameters
    ----------
    shown : str
        The file or module as the user typed it, for messages.

    Raises
    ------
    TargetError
        If an argument is unknown, or one without a default is missing.
    """
    if found.is_instance:
        if arguments:
            raise TargetError(
                f"{shown}:{found.name} is already an instance; it takes no --model-arg.",
                "Name a class or function, or drop --model-arg.",
            )
        return lambda: found.value
    call = found.value
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return lambda: _built(call(**arguments), found, shown)
    config = _config_argument(call, signature, arguments)
    if config is None:
        _check(signature, arguments, found.name)
        return lambda: _built(call(**arguments), found, shown)
    name, config_class = config
    fields = [field.name for field in dataclasses.fields(config_class) if field.init]
    own = {key: value for key, value in arguments.items() if key in signature.parameters}
    rest = {key: value for key, value in arguments.items() if key not in own}
    unknown = next((key for key in rest if key not in fields), None)
    if unknown is not None:
        raise TargetError(
            f"{config_class.__name__} has no field {unknown!r}.",
            did_you_mean(unknown, fields) or f"It has: {', '.join(fields)}.",
        )
    text = ", ".join(f"{key}={value!r}" for key, value in rest.items())
    notes.append(f"{found.name} was given {name}={config_class.__name__}({text}), its defaults for the rest.")
    return lambda: _built(call(**own, **{name: config_class(**rest)}), found, shown)


def _check(signature: inspect.Signature, arguments: Mapping[str, Any], name: str) -> None:
    parameters = signature.parameters.values()
    keywords = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = next((key for key in arguments if key not in keywords), None)
        if unknown is not None:
            listed = f"It takes: {', '.join(keywords)}." if keywords else "It takes no arguments."
            raise TargetError(f"{name}() has no argument {unknown!r}.", did_you_mean(unknown, keywords) or listed)
    missing = _missing(signature, arguments)
    if missing:
        flags = " ".join(f"--model-arg {key}=..." for key in missing)
        raise TargetError(
            f"{name}() needs {', '.join(missing)}.", f"Pass {flags}, or add `def build_model():` that calls it."
        )


def _missing(signature: inspect.Signature, arguments: Mapping[str, Any]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in variadic and p.name not in arguments
    ]


def _config_argument(call: Any, signature: inspect.Signature, arguments: Mapping[str, Any]) -> tuple[str, type] | None:
    """Name and dataclass of the one missing argument, if it is a configuration with defaults throughout."""
    missing = _missing(signature, arguments)
    if len(missing) != 1:
        return None
    name = missing[0]
    module = sys.modules.get(call.__module__)
    try:
        hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except Exception:  # annotations may name what is imported for type checkers only
        hints = {}
    annotated = hints.get(name)
    if annotated is not None:
        candidates = [annotated]
    elif name in _CONFIG_NAMES:
        candidates = [value for value in vars(module).values() if inspect.isclass(value)] if module else []
    else:
        return None
    ready = [c for c in candidates if inspect.isclass(c) and dataclasses.is_dataclass(c) and _has_defaults(c)]
    return (name, ready[0]) if len(ready) == 1 else None


def _has_defaults(config_class: type) -> bool:
    return not _missing(inspect.signature(config_class), {})


def _built(model: Any, found: Found, shown: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{shown}:{found.name} returned a {type(model).__name__}, not an nn.Module.", "Let it return the model."
        )
    return model
