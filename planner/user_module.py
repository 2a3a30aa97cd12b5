"""Runs a user's Python file or module and picks the model in it."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ModelError, TargetError, TpplanError
from .blame import blame
from .locate import Location, did_you_mean

ENTRY_POINTS = ("build_model", "get_model", "model")


@dataclass(frozen=True, slots=True)
class Found:
    """The model in a module: `value` is a factory, a class or an instance, reached by `name`."""

    name: str
    value: Any

    @property
    def is_instance(self) -> bool:
        """Whether the model was already constructed when the module ran."""
        return isinstance(self.value, nn.Module)


@contextlib.contextmanager
def user_code(doing: str, folder: str | os.PathLike[str] | None, remedy: str = "") -> Iterator[None]:
    """Run the user's code: their folder importable, their prints on stderr, their errors named.

    Parameters
    ----------
    doing : str
        What was going on, for the message: "model.py failed while being imported".
    folder : path, optional
        Put first on `sys.path` meanwhile, so that imports of neighbouring files work.

    Raises
    ------
    ModelError
        In place of any exception or `SystemExit`, naming the line; `KeyboardInterrupt` passes.
    """
    entry = str(folder) if folder is not None else None
    if entry is not None:
        sys.path.insert(0, entry)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except TpplanError:
        raise
    except SystemExit as error:
        raise ModelError(
            f"{doing}: it called exit. {blame(error, folder)}",
            "Keep what runs a training under `if __name__ == '__main__':`.",
        ) from error
    except Exception as error:
        raise ModelError(f"{doing}. {blame(error, folder)}", remedy or _remedy(error)) from error
    finally:
        if entry is not None:
            with contextlib.suppress(ValueError):
                sys.path.remove(entry)


def execute(location: Location) -> ModuleType:
    """Run the module at `location` afresh and return it.

    Raises
    ------
    TargetError
        If there is no such module.
    ModelError
        If it fails while being imported.
    """
    if location.kind == "file":
        assert location.path is not None
        return _execute_file(location.path)
    return _execute_module(location.module)


def find_model(module: ModuleType, attribute: str, shown: str) -> Found:
    """The model that `attribute` names; without one an entry point, the only instance or the only root class.

    Parameters
    ----------
    shown : str
        The file or module as the user typed it, for messages and for the remedy ``shown:NAME``.

    Raises
    ------
    TargetError
        If there is none, several, or the name is no model.
    """
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    if attribute:
        return _named(module, attribute, names, shown)
    for name in ENTRY_POINTS:
        if name in names and _is_model_like(names[name]):
            return Found(name, names[name])
    for kind, found in (("models", _root_instances(names)), ("model classes", _root_classes(module))):
        if len(found) == 1:
            return Found(*next(iter(found.items())))
        if found:
            listed = ", ".join(found)
            raise TargetError(f"{shown} has {len(found)} {kind}: {listed}.", f"Name one: {shown}:{next(iter(found))}.")
    raise TargetError(
        f"No model in {shown}: no build_model, get_model or model, no nn.Module instance or class.",
        f"Add `def build_model(): ...`, or name it: {shown}:NAME.",
    )


def _named(module: ModuleType, attribute: str, names: dict[str, Any], shown: str) -> Found:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            likely = [name for name, other in names.items() if _is_model_like(other)]
            near = did_you_mean(attribute, likely)
            raise TargetError(
                f"{shown} has no {attribute}.",
                near or (f"Models and factories in it: {', '.join(likely[:8])}." if likely else f"Check {shown}."),
            )
        value = getattr(value, part)
    if not _is_model_like(value):
        raise TargetError(
            f"{shown}:{attribute} is a {type(value).__name__}, not a model.",
            "Name an nn.Module class, an instance, or a function that returns one.",
        )
    return Found(attribute, value)


def _is_model_like(value: Any) -> bool:
    if inspect.isclass(value):
        return issubclass(value, nn.Module)
    return isinstance(value, nn.Module) or inspect.isroutine(value) or (callable(value) and hasattr(value, "func"))


def _root_instances(names: dict[str, Any]) -> dict[str, nn.Module]:
    """Top-level modules that hold parameters and lie in no other one, each under its first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, value in names.items():
        if isinstance(value, nn.Module) and id(value) not in found:
            found[id(value)] = (name, value)
    inner = {id(child) for _, value in found.values() for child in value.modules() if child is not value}
    roots = {name: value for key, (name, value) in found.items() if key not in inner}
    # a loss such as nn.CrossEntropyLoss() at the top of a file is no model
    return {name: value for name, value in roots.items() if any(True for _ in value.parameters())}


def _root_classes(module: ModuleType) -> dict[str, type[nn.Module]]:
    """nn.Module classes of this file that no other class of it inherits from or builds (directly or not)."""
    classes = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }
    uses = _references(module)
    reached: set[str] = set()
    for name in classes:
        reached |= _reachable(name, uses) - {name}
    roots = {name: value for name, value in classes.items() if name not in reached}
    # classes that build each other leave no root: all of them are candidates
    return roots or classes


def _references(module: ModuleType) -> dict[str, set[str]]:
    """Per top-level class or function of the file, the other ones that its body or bases mention."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):
        return {}
    definitions = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    names = {node.name for node in definitions}
    return {
        node.name: {
            inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and inner.id in names - {node.name}
        }
        for node in definitions
    }


def _reachable(start: str, uses: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for name in uses.get(pending.pop(), ()):
            if name not in seen:
                seen.add(name)
                pending.append(name)
    return seen


def _execute_file(path: Path) -> ModuleType:
    # dataclasses and pickle look a class's module up by name, so each file has its own entry
    name = f"tpplan_target_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    arguments, sys.argv = sys.argv, [str(path)]
    try:
        with user_code(f"{path.name} failed while being imported", path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    finally:
        sys.argv = arguments
    return module


def _execute_module(name: str) -> ModuleType:
    """An importable module; run anew when it was imported before, so that a seed set since takes effect."""
    folder = Path.cwd()
    with user_code(f"Importing {name} failed", folder):
        try:
            known = sys.modules.get(name)
            if known is None or getattr(known, "__spec__", None) is None:
                return importlib.import_module(name)
            assert known.__spec__ is not None
            assert known.__spec__.loader is not None
            fresh = importlib.util.module_from_spec(known.__spec__)
            known.__spec__.loader.exec_module(fresh)
            return fresh
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            near = did_you_mean(name, [p.stem for p in folder.glob("*.py")])
            raise TargetError(
                f"There is no module {error.name!r}.",
                near or "Install it here, or name a file: path/to/model.py.",
            ) from None


def _remedy(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"Install {error.name!r} in this Python environment."
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "A file with relative imports is named as a module: package.module:NAME."
    if isinstance(error, FileNotFoundError):
        return "Paths in the file are relative to where tpplan is started."
    return "Correct the model's code; --debug shows the whole traceback."
