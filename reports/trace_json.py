"""The traced graph as JSON: everything a tool needs, in an order that does not change, and back to a `ModelGraph`.

The fields under "graph" are those of `planner.graph` by name: their docstrings say what they mean. Written otherwise:
figures are {"base", "per_sample", "per_pair"} (value at b samples: base + per_sample b + per_pair b^2), sizes that do
not follow b are plain numbers, the place of a tensor in an operator's arguments is {"tensor": id}, and numbers that
JSON lacks are {"float": "-inf"}.
"""

from __future__ import annotations

import json
import math
import platform
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError
from ..planner.graph import Affine, ModelGraph, Ref
from ..planner.sharding import Sharding
from .chain_rows import Group, Row, chain_rows, row_name

FORMAT, SCHEMA_VERSION = "tpplan-trace", 1
JSON_MARK = f'"format": "{FORMAT}"'  # near the beginning of every such file
_WIDTH = 140  # a value that fits in so many characters is one line
_NOT_WRITTEN = {"extra"}
_OPAQUE = ("fqn", "reason", "flops_share")


def trace_json(graph: ModelGraph, sharding: Sharding, batch: int, max_tp: int = 64) -> str:
    """The JSON text; equal for equal graphs, but for the versions in it.

    Parameters
    ----------
    graph : ModelGraph
    sharding : Sharding
        What `planner.sharding.analyse` found for it.
    batch : int
        Samples of "totals"; everything else holds for all batch sizes.
    max_tp : int
        Largest tp degree listed.
    """
    document = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "versions": {"tpplan": version("tpplan"), "torch": version("torch"), "python": platform.python_version()},
        "hash": graph.hash,
        "totals": {"batch_size": batch, **graph.summary(batch), "captured": graph.captured},
        "chain": [_chain_row(graph, row) for row in chain_rows(graph)],
        "tensor_parallel": _tensor_parallel(sharding, max_tp),
        "graph": {**_encode(graph), "opaque": [dict(zip(_OPAQUE, part, strict=True)) for part in graph.opaque]},
    }
    return _text(document, "") + "\n"


def read_trace(text: str) -> ModelGraph:
    """The graph that `trace_json` wrote, equal to the first one (its `extra` is left out).

    Raises
    ------
    UsageError
        If the text is no JSON, is no trace, or is of a newer schema.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UsageError(f"This is no JSON: {error}.", "Write it with tpplan trace TARGET --json FILE.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError("This JSON is no trace.", "Write one with tpplan trace TARGET --json FILE.")
    if document["schema_version"] > SCHEMA_VERSION:
        raise UsageError(
            f"The trace has schema {document['schema_version']}, newer than {SCHEMA_VERSION}.", "Update tpplan."
        )
    data = dict(document["graph"])
    data["opaque"] = [[part[name] for name in _OPAQUE] for part in data["opaque"]]
    return _decode(data, ModelGraph)


def _chain_row(graph: ModelGraph, row: Row | Group) -> dict[str, Any]:
    if isinstance(row, Group):
        return {"count": row.count, "members": [_chain_row(graph, member) for member in row.members]}
    kind = graph.classes[row.class_index].module_type
    return {
        "layers": row_name(graph, row),
        "module_type": kind,
        "class": row.class_index,
        "run": row.run,
        "units": list(row.positions),
    }


def _tensor_parallel(sharding: Sharding, max_tp: int) -> dict[str, Any]:
    """What tp may do: degrees, styles by module, what stays whole and why, collectives of each class."""
    sequence = sharding.sequence
    return {
        "degrees_allowed": sharding.degrees_allowed(max_tp),
        "sharded_share": sharding.sharded_share,
        "limits": [{"size": size, "of": label} for size, label in sharding.parts],
        "reasons": list(sharding.reasons),
        "loss_parallel": sharding.loss_parallel,
        "sequence_parallel": {
            "possible": sequence.possible,
            "tokens": sequence.tokens,
            "reason": sequence.reason,
            "modules": list(sequence.modules),
        },
        "styles": {name: _encode(style) for name, style in sorted(sharding.styles.items())},
        "attention": sorted(sharding.attention),
        "parameter_split": dict(sorted(sharding.parameter_split.items())),
        "whole": dict(sorted(sharding.whole.items())),
        "classes": [
            {"op_split": list(c.op_split), "collectives": [_encode(item) for item in c.collectives]}
            for c in sharding.classes
        ],
    }


def _encode(value: Any) -> Any:
    """A dataclass, tuple or number as JSON data."""
    if isinstance(value, Affine):
        return {"base": value.base, "per_sample": value.per_sample, "per_pair": value.per_pair}
    if isinstance(value, Ref):
        return {"tensor": value.tensor}
    if is_dataclass(value):
        written = (f.name for f in fields(value) if f.name not in _NOT_WRITTEN)
        return {
            name: _sizes(getattr(value, name)) if name == "shape" else _encode(getattr(value, name)) for name in written
        }
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} in a graph has no JSON form")


def _sizes(shape: Sequence[Affine | int]) -> list[Any]:
    """A shape: plain numbers where the batch does not matter."""
    return [d.base if isinstance(d, Affine) and not (d.per_sample or d.per_pair) else _encode(d) for d in shape]


def _decode(data: Any, kind: Any) -> Any:
    """JSON data as the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _decode_any(data)
    if kind is Affine:
        return Affine(**data) if isinstance(data, dict) else Affine(data)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _decode(item, hints[name]) for name, item in data.items()})
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(item, arguments[0]) for item in data)
        return tuple(_decode(item, inner) for item, inner in zip(data, arguments, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _decode(item, arguments[1]) for key, item in data.items()}
    if origin in (Union, types.UnionType):
        raise TypeError(f"a field of a graph has the type {kind}, which no reader knows")
    return data


def _decode_any(data: Any) -> Any:
    """An argument of an operator."""
    if isinstance(data, list):
        return tuple(_decode_any(item) for item in data)
    if isinstance(data, dict):
        if "tensor" in data:
            return Ref(data["tensor"])
        return float(data["float"]) if "float" in data else Affine(**data)
    return data


def _text(value: Any, indent: str) -> str:
    """JSON with short values on one line."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(line) <= _WIDTH or not isinstance(value, dict | list):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        members = [f"{json.dumps(key, ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
        begin, end = "{}"
    else:
        members = [_text(item, inner) for item in value]
        begin, end = "[]"
    joined = f",\n{inner}".join(members)
    return f"{begin}\n{inner}{joined}\n{indent}{end}"
