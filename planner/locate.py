"""Finds what a target names: a Python file, a module's attribute or a config.json; needs no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TargetError

FORMS = "A target is model.py, model.py:NAME, package.module:NAME, or a Hugging Face folder or its config.json."
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a target lives.

    kind : "file" (a Python file), "module" (an importable module) or "config" (a config.json)
    path : the file (kinds "file" and "config"), absolute
    module : dotted module name (kind "module")
    attribute : the name after the colon, "" if none was given
    """

    kind: str
    path: Path | None = None
    module: str = ""
    attribute: str = ""


def locate(spec: str) -> Location:
    """What `spec` names.

    Raises
    ------
    TargetError
        If nothing is there (with the nearest names that are), or it is nothing a model can be built from.

    Examples
    --------
    >>> locate("torchvision.models:resnet50")
    Location(kind='module', path=None, module='torchvision.models', attribute='resnet50')
    """
    if not spec.strip():
        raise TargetError("The target is empty.", FORMS)
    if Path(spec).exists():
        return _existing(Path(spec), "")
    name, colon, attribute = spec.rpartition(":")
    if not colon:
        raise _missing(spec)
    if not _DOTTED.fullmatch(attribute):
        raise TargetError(f"{attribute!r}, after the colon of {spec}, is not a name.", FORMS)
    if Path(name).exists():
        return _existing(Path(name), attribute)
    if name.endswith((".py", ".json")) or "/" in name or os.sep in name:
        raise _missing(name)
    if not _DOTTED.fullmatch(name):
        raise TargetError(f"{name!r} is neither a file nor a module name.", FORMS)
    return Location("module", module=name, attribute=attribute)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a config.json.

    Raises
    ------
    TargetError
        If it cannot be read, is no JSON object, or does not say which model it configures.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"Cannot read {path}: {error}.", FORMS) from None
    except ValueError as error:
        raise TargetError(f"{path} is not valid JSON: {error}.", "Restore the model's config.json.") from None
    if isinstance(data, dict) and "schema_version" in data and "mesh" in data:
        raise TargetError(f"{path} is a plan, not a model.", f"Run it with `tpplan run {path}`.")
    if not isinstance(data, dict) or not ({"model_type", "architectures", "_class_name"} & data.keys()):
        raise TargetError(
            f"{path} is no model configuration: it has neither model_type nor architectures.",
            "Name a Hugging Face folder or config.json.",
        )
    return data


def did_you_mean(name: str, candidates: Iterable[str], how_many: int = 3) -> str:
    """A sentence that offers the nearest of `candidates`, or "".

    >>> did_you_mean("modle.py", ["model.py", "train.py"])
    'Did you mean model.py?'
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=how_many, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def _existing(path: Path, attribute: str) -> Location:
    path = path.resolve()
    if path.is_dir():
        return _folder(path, attribute)
    if path.suffix == ".py":
        return Location("file", path, attribute=attribute)
    if path.suffix == ".json":
        if attribute:
            raise TargetError(f"A config takes no :{attribute}.", "Set `architectures` in the config instead.")
        return Location("config", path)
    raise TargetError(f"{path.name} is neither a Python file nor a config.json.", FORMS)


def _folder(path: Path, attribute: str) -> Location:
    config = path / "config.json"
    if config.is_file():
        return _existing(config, attribute)
    if (path / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in path.glob("*/config.json"))
        raise TargetError(
            f"{path.name} is a diffusers pipeline of several models.",
            f"Name one of its folders: {', '.join(parts)}.",
        )
    scripts = sorted(p.name for p in path.glob("*.py"))[:5]
    raise TargetError(
        f"The folder {path.name} has no config.json.",
        f"Name a file in it: {', '.join(scripts)}." if scripts else FORMS,
    )


def _missing(spec: str) -> TargetError:
    """Nothing at `spec`: offer what lies near it."""
    path = Path(spec)
    folder = path.parent
    if not folder.is_dir():
        near = did_you_mean(folder.name, _entries(folder.parent))
        if spec.count("/") == 1 and not path.suffix:  # it may be a name on a model hub
            near = f"{near} Models are never downloaded: name a local folder with a config.json.".lstrip()
        return TargetError(f"No such file or folder: {spec}.", near or FORMS)
    names = _entries(folder)
    near = did_you_mean(path.name, names)
    if not near and not path.suffix:
        near = did_you_mean(f"{path.name}.py", names)
    if not near and not path.suffix and _DOTTED.fullmatch(spec):
        near = f"For an installed module write {spec}:NAME."
    if not near:
        scripts = [name for name in names if name.endswith(".py")][:5]
        near = f"In {folder.resolve().name} there is: {', '.join(scripts)}." if scripts else FORMS
    return TargetError(f"No such file: {spec}.", near)


def _entries(folder: Path) -> list[str]:
    """Names in `folder` that could be targets."""
    try:
        return sorted(
            p.name
            for p in folder.iterdir()
            if not p.name.startswith(".") and (p.suffix in {".py", ".json"} or p.is_dir())
        )
    except OSError:
        return []
