"""The pins file: TOML with the tables fix, max, min, forbid and layers, each AXIS = VALUE or a list of values."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .pins import SWITCH, Pin, parse_pin

TABLES = ("fix", "max", "min", "forbid", "layers")


def read_pins_file(path: str | Path) -> tuple[Pin, ...]:
    """Read a file of pins.

        [fix]
        tp = 8
        [max]
        pp = 4
        [forbid]
        schedule = ["interleaved", "gpipe"]
        [layers]                        # what --fix layer:PATTERN=VALUE says
        "model.layers.0" = "full"
        "model.layers.*" = ["zero3", "row"]

    Raises
    ------
    UsageError
        If the file is missing, is no TOML, has unknown tables, axes or values.
    """
    source = Path(path)
    try:
        data = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"No pins file {source}.", "Name a TOML file, or use --fix.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {source}: {error}.", "Name a TOML file, or use --fix.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is no TOML: {error}.", "For example: [fix] and below it tp = 8.") from None
    unknown = sorted(set(data) - set(TABLES))
    if unknown:
        raise UsageError(f"{source}: there is no table {unknown[0]!r}.", f"Tables: {', '.join(TABLES)}.")
    pins = []
    for table, entries in data.items():
        if not isinstance(entries, Mapping):
            raise UsageError(f"{source}: {table} is no table.", f"Write [{table}] on a line of its own.")
        kind, prefix = ("fix", "layer:") if table == "layers" else (table, "")
        for name, values in entries.items():
            for value in values if isinstance(values, list) else [values]:
                pins.append(parse_pin(kind, f"{prefix}{name}={_word(value, f'{source}: {name}')}", str(source)))
    return tuple(pins)


def _word(value: Any, where: str) -> str:
    """A TOML value as it would be typed."""
    if isinstance(value, bool):
        return SWITCH[value]
    if isinstance(value, int | str):
        return str(value)
    raise UsageError(f"{where} is {value!r}.", "Pins are whole numbers, names, true or false, or lists of them.")
