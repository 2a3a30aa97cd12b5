"""Where a target's model comes from: the user's code or a config; how it is constructed, and its hooks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import TargetError
from . import diffusers_models, huggingface
from .arguments import bind_arguments
from .construct import build_on_meta, meta_copy
from .locate import Location, read_config
from .user_module import execute, find_model, user_code


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that a model's file may define beside the model."""

    example_inputs: Callable[..., Any] | None = None
    loss_fn: Callable[..., Any] | None = None
    count_targets: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One way to a model.

    `construct` takes "meta" or "cpu". `folder` is importable while user code runs. `notes` grows when a
    construction has something to tell the user.
    """

    kind: str
    name: str
    content_hash: str
    construct: Callable[[str], nn.Module]
    folder: Path | None = None
    hooks: Hooks = Hooks()
    notes: list[str] = field(default_factory=list)


def from_location(location: Location, spec: str, arguments: Mapping[str, Any]) -> Source:
    """The source at `location`; `arguments` go to the factory, the class or the config.

    Raises
    ------
    TargetError, ModelError, EnvironmentFailure
        See `load_target`.
    """
    return _from_config(location, arguments) if location.kind == "config" else _from_code(location, spec, arguments)


def _from_code(location: Location, spec: str, arguments: Mapping[str, Any]) -> Source:
    module = execute(location)
    shown = location.module or spec.removesuffix(f":{location.attribute}")
    found = find_model(module, location.attribute, shown)
    notes: list[str] = []
    make = bind_arguments(found, arguments, shown, notes)
    folder = Path.cwd() if location.path is None else location.path.parent
    where = found.name if location.kind == "module" else f"{found.name} of {shown}"

    def construct(device: str) -> nn.Module:
        with user_code(f"Building {where} failed", folder):
            if device == "meta":
                return meta_copy(found.value) if found.is_instance else _on_meta(make, notes)
            if not found.is_instance:
                return make()
            # the file runs again, so that the seed set by the caller decides the weights
            return find_model(execute(location), location.attribute, shown).value

    stem = location.path.stem if location.path is not None else location.module
    return Source(
        kind=location.kind,
        name=f"{stem}:{location.attribute}" if location.attribute else stem,
        content_hash=hashlib.sha256(_text_of(module) or spec.encode()).hexdigest(),
        construct=construct,
        folder=folder,
        hooks=Hooks(*(_hook(module, name) for name in ("example_inputs", "loss_fn", "count_targets"))),
        notes=notes,
    )


def _from_config(location: Location, arguments: Mapping[str, Any]) -> Source:
    assert location.path is not None
    path = location.path
    data = read_config(path)
    notes: list[str] = []
    if "_class_name" in data:
        kind, make = "diffusers", diffusers_models.constructor(data, path, arguments)
    else:
        config, model_class = huggingface.read_hf_config(data, path, arguments, notes)
        kind, make = "huggingface", huggingface.constructor(config, model_class)
    name = path.parent.name if path.name == "config.json" else path.stem

    def construct(device: str) -> nn.Module:
        with user_code(f"Building {name} from {path.name} failed", None, "Correct the config."):
            return make() if device == "cpu" else _on_meta(make, notes)

    content = json.dumps(data, sort_keys=True).encode()
    return Source(kind, name, hashlib.sha256(content).hexdigest(), construct, notes=notes)


def _on_meta(make: Callable[[], nn.Module], notes: list[str]) -> nn.Module:
    model, note = build_on_meta(make)
    if note and note not in notes:
        notes.append(note)
    return model


def _hook(module: ModuleType, name: str) -> Callable[..., Any] | None:
    hook = getattr(module, name, None)
    if hook is not None and not callable(hook):
        raise TargetError(f"{name} beside the model is a {type(hook).__name__}.", f"Make {name} a function.")
    return hook


def _text_of(module: ModuleType) -> bytes:
    """The source text of a module, b"" for one without a readable file."""
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
