"""From what the search decided to styles of modules: who does what with which parameter under tp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .graph import Unit
from .sharding_search import Search
from .sharding_states import Layer, absolute


@dataclass(frozen=True, slots=True)
class Style:
    """How tp treats one module; the fields of plan.json's `ModuleStyle`."""

    style: str
    sizes: tuple[int, ...] = ()
    output: str = "replicate"
    parameters: tuple[tuple[str, int], ...] = ()
    packed: tuple[tuple[str, tuple[int, ...]], ...] = ()
    shared: tuple[str, ...] = ()


def unit_styles(search: Search, unit: Unit) -> Iterator[tuple[str, Style, Mapping[str, int]]]:
    """Sharded modules of a unit: absolute FQN, style, and the split dimension of its parameters by absolute name."""
    index = unit.class_index
    outcome = search.outcomes[index]
    for fqn, layer in search.layers[index].items():
        style = _layer_style(search, index, layer)
        if style is not None:
            module = absolute(unit.fqn, fqn)
            yield module, style, _parameters(search, module, style, _dims(search, index, layer))
    types = {op.fqn: op.module_type for op in search.graph.classes[index].ops}
    for fqn in sorted(outcome.channels):
        module = absolute(unit.fqn, fqn)
        style = Style("channel", output="shard")
        yield module, style, _parameters(search, module, style, (0, 0))
    yield from _raw_styles(search, unit, types)


def is_split(search: Search, index: int, layer: Layer) -> bool:
    """Whether tp divides the weight of a layer."""
    outcome = search.outcomes[index]
    if layer.kind == "raw":
        return layer.weight in outcome.raw
    return _layer_style(search, index, layer) is not None or layer.fqn in outcome.channels


def _layer_style(search: Search, index: int, layer: Layer) -> Style | None:
    outcome, decision = search.outcomes[index], search.decisions[index, layer.fqn]
    if layer.kind == "raw":
        return None
    if layer.fqn in outcome.rows:
        return Style("row")
    if layer.kind == "embedding":
        return Style("vocab") if decision.style == "vocab" else None
    if decision.style == "replicate" or layer.fqn not in outcome.columns:
        return None
    if decision.style == "gather":
        return Style("col")
    return Style(decision.style, decision.sizes, "shard")


def _dims(search: Search, index: int, layer: Layer) -> tuple[int, int]:
    """Dimensions of the weight for output and input features (or channels)."""
    for op in search.graph.classes[index].ops:
        if op.fqn == layer.fqn and layer.kind == "linear" and op.module_type == "Conv1D":
            return 1, 0
        if op.fqn == layer.fqn and op.name.startswith("aten.convolution") and op.args[6]:
            return 1, 0
    return 0, 1


def _parameters(search: Search, module: str, style: Style, dims: tuple[int, int]) -> dict[str, int]:
    weight, bias = f"{module}.weight".lstrip("."), f"{module}.bias".lstrip(".")
    known = {name: name in search.graph.parameters or name in search.aliases for name in (weight, bias)}
    found = {weight: dims[1] if style.style == "row" else dims[0]} if known[weight] else {}
    if style.style in ("col", "packed", "channel") and known[bias]:
        found[bias] = 0
    return found


def _raw_styles(search: Search, unit: Unit, types: Mapping[str, str]) -> Iterator[tuple[str, Style, Mapping[str, int]]]:
    """Modules whose own code reads split parameters: regions, attention modules, and others."""
    index = unit.class_index
    outcome, prefix = search.outcomes[index], search.prefix[index]
    doors = {*outcome.regions, *(fqn for fqn, kind in types.items() if kind.endswith("MultiheadAttention"))}
    grouped: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
    for name, split in outcome.raw.items():
        short = relative(prefix, name)
        holders = [door for door in doors if f"{short}.".startswith(f"{door}.".lstrip("."))]
        owner = max(holders, key=len, default=short.rpartition(".")[0])
        grouped.setdefault(owner, {})[short] = split
    for owner, members in grouped.items():
        inner = {short[len(owner) :].strip("."): split for short, split in members.items()}
        region = owner in outcome.regions
        heads = types.get(owner, "").endswith("MultiheadAttention")
        shared = {relative(prefix, name)[len(owner) :].strip(".") for name in outcome.regions.get(owner, ())}
        style = Style(
            "region" if region else "heads" if heads else "parameters",
            parameters=tuple(sorted((name, dim) for name, (dim, _) in inner.items())),
            packed=tuple(sorted((name, sizes) for name, (_, sizes) in inner.items() if sizes)),
            shared=tuple(sorted(shared)),
        )
        names = {absolute(unit.fqn, short): dim for short, (dim, _) in members.items()}
        yield absolute(unit.fqn, owner), style, names


def relative(prefix: str, name: str) -> str:
    """A parameter's name relative to the unit `prefix`; the inverse of `absolute`.

    >>> relative("h.0", "h.0.attn.weight"), relative("h.0", "wte.weight")
    ('attn.weight', '/wte.weight')
    """
    if not prefix:
        return name
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else f"/{name}"
