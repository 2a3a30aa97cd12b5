"""Layer pins bound to a model: which units each pattern names, and whether these can be run that way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..errors import InfeasibleError, UsageError
from .graph import ModelGraph
from .pins import AXES, Pin, Pins, contradiction
from .sharding import Sharding
from .unit_facts import UnitFacts, unit_facts

_STYLES = ("col", "row", "vocab")


def bind_layers(pins: Pins, graph: ModelGraph, sharding: Sharding) -> Pins:
    """The pins with every layer pattern resolved to the units of a model.

    A pattern names units by their FQN; one that names no unit may name modules inside units (``*.mlp.down_proj``).
    Then col, row and vocab must be what tensor parallelism makes of these modules, and the pin holds for their units.

    Raises
    ------
    UsageError
        If a pattern names nothing (near names are told), or two patterns contradict each other at a unit.
    InfeasibleError
        If no unit of a pattern can be run that way, with the reason.
    """
    if not pins.layers():
        return pins
    facts = {u.fqn: f for u, f in zip(graph.units, unit_facts(graph), strict=True) if u.fqn}
    bound = Pins(tuple(_bind(p, list(facts), sharding) if p.pattern else p for p in pins))
    for pin in bound.layers():
        _check_possible(pin, facts, sharding)
    for fqn in facts:
        _check_unit(fqn, [p for p in bound.layers() if p.names(fqn)])
    return bound


def _bind(pin: Pin, units: Sequence[str], sharding: Sharding) -> Pin:
    named = frozenset(fqn for fqn in units if fnmatchcase(fqn, pin.pattern))
    if named:
        return replace(pin, units=named)
    modules = sorted(m for m in {*sharding.styles, *sharding.whole} if fnmatchcase(m, pin.pattern))
    if not modules:
        near = get_close_matches(pin.pattern, [*units, *sharding.styles], 3, 0.4) or list(units[:3])
        raise UsageError(f"{pin}: no layer is called {pin.pattern}.", f"For example: {', '.join(near)}.")
    if pin.word in _STYLES and pin.kind == "fix":
        _check_styles(pin, modules, sharding)
    elif pin.word in _STYLES:
        modules = [m for m in modules if m in sharding.styles and sharding.styles[m].style == pin.word]
    return replace(pin, units=frozenset(_unit_of(module, units) for module in modules))


def _unit_of(module: str, units: Sequence[str]) -> str:
    """The unit that a module belongs to: the longest FQN that it starts with ("" where there is none)."""
    return max((u for u in units if module == u or module.startswith(f"{u}.")), key=len, default="")


def _check_styles(pin: Pin, modules: Sequence[str], sharding: Sharding) -> None:
    for module in modules:
        style = sharding.styles.get(module)
        if style is None:
            raise InfeasibleError(f"{pin}: {module} stays whole: {sharding.whole[module]}.", "Drop the pin.")
        if style.style != pin.word:
            raise InfeasibleError(
                f"{pin}: tensor parallelism makes {module} {style.style}: what it reads and what reads it leave no "
                f"{pin.word}.",
                f"Use {style.style} or replicate.",
            )


def _check_possible(pin: Pin, facts: Mapping[str, UnitFacts], sharding: Sharding) -> None:
    """Some unit of the pattern must be able to do what is fixed."""
    assert pin.units is not None
    if pin.kind != "fix":
        return
    if pin.axis == "recompute" and pin.value != "none" and not any(facts[u].may_recompute for u in pin.units):
        raise InfeasibleError(
            f"{pin}: {_some(pin.units)} cannot be recomputed: only modules of their own with a matrix product, "
            "a convolution or attention, called once, can.",
            "Name a block.",
        )
    if pin.axis == "sharding" and pin.value == "tp":
        split = {_unit_of(module, list(facts)) for module in sharding.styles}
        if not split & pin.units:
            why = "; ".join(f"{m}: {r}" for m, r in sharding.whole.items() if _unit_of(m, list(facts)) in pin.units)
            raise InfeasibleError(
                f"{pin}: tensor parallelism splits nothing in {_some(pin.units)} ({why or 'no layer with a rule'}).",
                "Drop the pin, or use replicate.",
            )


def _check_unit(fqn: str, pins: Sequence[Pin]) -> None:
    """Every property of a unit must have a value left."""
    for axis, values in (("recompute", AXES["recompute"]), ("zero_stage", (2, 3)), ("sharding", ("tp", "replicate"))):
        own = [p for p in pins if p.axis == axis]
        assert values is not None
        if own and not any(all(p.allows(v) for p in own) for v in values):
            one = next((p for p in own if p.kind == "fix"), own[0])
            other = next((p for p in own if p is not one and not p.allows(one.value)), own[-1])
            error = contradiction(one, other)
            raise UsageError(f"{error.message.rstrip('.')}: both name {fqn}.", error.remedy)


def _some(names: frozenset[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (" ..." if len(names) > 3 else "")
