"""Pins: what the user decides before the search does, from `--fix`, `--max`, `--min`, `--forbid` and `--pins FILE`.

A pin restricts one axis of the whole plan (``tp=8``), or one property of the units that a pattern names
(``layer:model.layers.0=full``). A pin of a unit goes before one of the whole plan that speaks of the same property.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import UsageError

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb")
SEARCHED_SCHEDULES = SCHEDULES[:3]
SWITCH = ("off", "on")

# What each axis may be: the names it has, or None for whole numbers of 1 or more.
AXES: dict[str, tuple[int | str, ...] | None] = {
    "tp": None,
    "pp": None,
    "dp": None,
    "dp_replicate": None,
    "dp_shard": None,
    "microbatch_size": None,
    "microbatches": None,
    "virtual": None,
    "schedule": SCHEDULES,
    "zero_stage": (2, 3),
    "recompute": RECOMPUTE,
    "sequence_parallel": SWITCH,
    "gradient_sync": ("every", "last"),
}

# What a layer pin may say: the property of a unit's choice that it fixes, and its value there.
LAYER_VALUES: dict[str, tuple[str, int | str]] = {
    **{name: ("recompute", name) for name in RECOMPUTE},
    "zero2": ("zero_stage", 2),
    "zero3": ("zero_stage", 3),
    **dict.fromkeys(("col", "row", "vocab", "tp"), ("sharding", "tp")),
    "replicate": ("sharding", "replicate"),
}

_SIGNS = {"fix": "=", "max": "<=", "min": ">=", "forbid": "!="}


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin.

    kind : fix | max | min | forbid
    axis : an axis of the plan, or the property of a unit that a layer pin speaks of
    value : what it is held against
    pattern : for layer pins, an fnmatch pattern on FQNs ("" for pins of the whole plan)
    word : for layer pins, the value as typed (row is sharding "tp")
    units : for layer pins once bound to a model, the FQNs of the units it holds for
    source : the file it came from, "" for the command line
    """

    kind: str
    axis: str
    value: int | str
    pattern: str = ""
    word: str = ""
    units: frozenset[str] | None = None
    source: str = ""

    def __str__(self) -> str:
        name = f"layer:{self.pattern}" if self.pattern else self.axis
        text = f"--{self.kind} {name}={self.word or self.value}"
        return f"{text} (in {self.source})" if self.source else text

    def allows(self, value: int | str) -> bool:
        """Whether a value of the axis passes."""
        if self.kind == "max":
            return value <= self.value  # type: ignore[operator]
        if self.kind == "min":
            return value >= self.value  # type: ignore[operator]
        return (value == self.value) == (self.kind == "fix")

    def names(self, fqn: str) -> bool:
        """Whether a layer pin holds for the unit `fqn`."""
        return fqn in self.units if self.units is not None else fnmatchcase(fqn, self.pattern)


@dataclass(frozen=True, slots=True)
class Pins:
    """All pins of a request; empty by default. Hashable, and false where nothing is pinned.

    Some axes have no meaning under some meshes (a schedule with pp = 1, a ZeRO level with dp_shard = 1, sequence
    parallelism and the sharding of a unit with tp = 1, recomputation of a unit that cannot recompute): whoever
    enumerates asks only where they have one.
    """

    pins: tuple[Pin, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self.pins)

    def of(self, axis: str) -> tuple[Pin, ...]:
        """The pins of one axis of the whole plan."""
        return tuple(p for p in self.pins if p.axis == axis and not p.pattern)

    def layers(self) -> tuple[Pin, ...]:
        """The pins of single units."""
        return tuple(p for p in self.pins if p.pattern)

    def fixed(self, axis: str) -> int | str | None:
        """The value that `--fix` gives an axis; None where it is free."""
        return next((p.value for p in self.of(axis) if p.kind == "fix"), None)

    def allows(self, axis: str, value: int | str | bool) -> bool:
        """Whether an axis of the plan may have `value` (True and False stand for on and off).

        >>> pins = parse_pins(fix=["tp=8"], most=["pp=4"])
        >>> pins.allows("tp", 4), pins.allows("pp", 4), pins.allows("dp_shard", 3)
        (False, True, True)
        """
        if axis not in AXES:
            raise KeyError(axis)
        if isinstance(value, bool):
            value = SWITCH[value]
        return all(p.allows(value) for p in self.of(axis))

    def allows_layer(
        self, fqn: str, *, recompute: str | None = None, zero_stage: int | None = None, sharding: str | None = None
    ) -> bool:
        """Whether the unit `fqn` may run this way; None for what has no meaning for it (under this mesh).

        >>> pins = parse_pins(fix=["recompute=none", "layer:h.0=full"])
        >>> pins.allows_layer("h.0", recompute="full"), pins.allows_layer("h.1", recompute="full")
        (True, False)
        """
        for axis, value in (("recompute", recompute), ("zero_stage", zero_stage), ("sharding", sharding)):
            if value is not None and not all(p.allows(value) for p in self._of_unit(fqn, axis)):
                return False
        return True

    def _of_unit(self, fqn: str, axis: str) -> tuple[Pin, ...]:
        """Pins that decide one property of a unit: its own, and the plan's unless its own fix it."""
        own = tuple(p for p in self.pins if p.pattern and p.axis == axis and p.names(fqn))
        return own if any(p.kind == "fix" for p in own) else (*own, *self.of(axis))

    def layer_key(self, fqn: str) -> tuple[int, ...]:
        """Which layer pins hold for a unit: units with equal keys are pinned alike."""
        return tuple(i for i, p in enumerate(self.pins) if p.pattern and p.names(fqn))

    def schedules(self) -> tuple[str, ...]:
        """Pipeline schedules to search; zero-bubble only where it is fixed."""
        searched = SCHEDULES if self.fixed("schedule") == "zb" else SEARCHED_SCHEDULES
        return tuple(name for name in searched if self.allows("schedule", name))

    def microbatch_sizes(self, usual: Iterable[int]) -> tuple[int, ...]:
        """The microbatch sizes to search: those of `usual` that are allowed, or the fixed one whatever it is."""
        fixed = self.fixed("microbatch_size")
        sizes = usual if fixed is None else (int(fixed),)
        return tuple(size for size in sizes if self.allows("microbatch_size", size))

    def without(self, *dropped: Pin) -> Pins:
        """These pins less some."""
        return replace(self, pins=tuple(p for p in self.pins if p not in dropped))

    def text(self) -> str:
        """All pins in a line.

        >>> parse_pins(fix=["tp=8", "layer:h.*=row"], most=["pp=4"], forbid=["recompute=full"]).text()
        'tp=8, layer:h.*=row, pp<=4, recompute!=full'
        """
        names = [f"layer:{p.pattern}" if p.pattern else p.axis for p in self.pins]
        return ", ".join(f"{n}{_SIGNS[p.kind]}{p.word or p.value}" for n, p in zip(names, self.pins, strict=True))


NO_PINS = Pins()


def parse_pins(
    fix: Sequence[str] = (),
    most: Sequence[str] = (),
    least: Sequence[str] = (),
    forbid: Sequence[str] = (),
    file: str | Path | None = None,
) -> Pins:
    """The pins of a command line and of a file.

    Parameters
    ----------
    fix, most, least, forbid : sequence of "axis=value" or (fix, forbid) "layer:PATTERN=value"
        What follows --fix, --max, --min and --forbid.
    file : path, optional
        See `pins_file.read_pins_file`. What the command line says of an axis goes before what the file says.

    Raises
    ------
    UsageError
        For an unknown axis or value, and for pins that contradict each other (both are named).

    Examples
    --------
    >>> pins = parse_pins(fix=["tp=8", "recompute=full"], most=["pp=4"])
    >>> pins.fixed("tp"), pins.fixed("recompute"), pins.allows("pp", 8)
    (8, 'full', False)
    """
    texts = (("fix", fix), ("max", most), ("min", least), ("forbid", forbid))
    typed = [parse_pin(kind, text) for kind, values in texts for text in values]
    if file is not None:
        from .pins_file import read_pins_file

        filed = read_pins_file(file)
        check_consistent(filed)
        typed += [p for p in filed if not any(_replaces(pin, p) for pin in typed)]
    pins = tuple(dict.fromkeys(typed))
    check_consistent(tuple(typed))
    return Pins(pins)


def parse_pin(kind: str, text: str, source: str = "") -> Pin:
    """One "axis=value" as a pin.

    Raises
    ------
    UsageError
        If the axis or its value is unknown; the known ones are listed.
    """
    option = f"{source}: {kind}" if source else f"--{kind}"
    name, equals, value = (part.strip() for part in text.rpartition("="))
    if not equals:
        raise UsageError(f"{option} {text} is not AXIS=VALUE.", "For example --fix tp=8.")
    if name.startswith("layer:"):
        return _layer_pin(kind, name.removeprefix("layer:"), value, option, text, source)
    axis = name.replace("-", "_")
    if axis not in AXES:
        near = get_close_matches(axis, AXES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"{option} {text}: no such axis.{hint}",
            f"Axes: {', '.join(AXES)}, layer:PATTERN; for example --fix tp=8.",
        )
    names = AXES[axis]
    if kind in ("max", "min") and names is not None:
        raise UsageError(f"{option} {text}: {axis} has no {kind}.", f"Use --fix {axis}=... or --forbid {axis}=...")
    if names is None:
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"{option} {text}: {axis} takes a whole number of 1 or more.", f"For example {axis}=8.")
        return Pin(kind, axis, int(value), source=source)
    known = {str(n): n for n in names}
    if value not in known:
        raise UsageError(f"{option} {text}: no such {axis}.", f"Values: {', '.join(known)}.")
    return Pin(kind, axis, known[value], source=source)


def _layer_pin(kind: str, pattern: str, value: str, option: str, text: str, source: str) -> Pin:
    if kind in ("max", "min"):
        raise UsageError(f"{option} {text}: a layer has no {kind}.", "Use --fix or --forbid with layer:PATTERN.")
    if not pattern or value not in LAYER_VALUES:
        raise UsageError(
            f"{option} {text}: a layer takes PATTERN=VALUE with a known value.",
            f"Values: {', '.join(LAYER_VALUES)}; for example --fix layer:model.layers.0=full.",
        )
    axis, meant = LAYER_VALUES[value]
    return Pin(kind, axis, meant, pattern, value, source=source)


def _replaces(typed: Pin, filed: Pin) -> bool:
    """Whether a pin of the command line stands in for one of the file (what it forbids only drops that very fix)."""
    if (typed.axis, typed.pattern) != (filed.axis, filed.pattern):
        return False
    if typed.kind == "forbid":
        return filed.kind == "fix" and filed.value == typed.value
    return typed.kind == "fix" or filed.kind in ("fix", typed.kind)


def check_consistent(pins: Sequence[Pin]) -> None:
    """Raise `UsageError` where two pins of one axis or pattern leave nothing, or one is given twice."""
    groups: dict[tuple[str, str], list[Pin]] = {}
    for pin in pins:
        groups.setdefault((pin.axis, pin.pattern), []).append(pin)
    for (axis, pattern), group in groups.items():
        _check_once(group)
        fixed = [p for p in group if p.kind == "fix"]
        for other in group:
            if fixed and not other.allows(fixed[0].value):
                raise contradiction(fixed[0], other)
        top = min((p for p in group if p.kind == "max"), key=lambda p: p.value, default=None)
        low = max((p for p in group if p.kind == "min"), key=lambda p: p.value, default=None)
        if top and low and not top.allows(low.value):
            raise contradiction(low, top)
        values = ("tp", "replicate") if axis == "sharding" else AXES[axis]
        if values and not pattern and not any(all(p.allows(v) for p in group) for v in values):
            raise UsageError(f"{' and '.join(map(str, group))} leave no {axis}.", "Drop one of them.")
    _check_product({axis: group for (axis, pattern), group in groups.items() if not pattern})


def _check_once(group: Sequence[Pin]) -> None:
    for kind in ("fix", "max", "min"):
        same = [p for p in group if p.kind == kind]
        if len(same) > 1:
            name = f"layer:{same[0].pattern}" if same[0].pattern else same[0].axis
            both = f"{same[0]} and {same[1]}"
            raise UsageError(f"--{kind} {name} is given twice: {both}.", "Give it once.")


def contradiction(one: Pin, other: Pin) -> UsageError:
    """The error for two pins that cannot both hold."""
    return UsageError(f"{one} contradicts {other}.", "Drop one of the two.")


def _check_product(groups: dict[str, list[Pin]]) -> None:
    """dp is dp_replicate x dp_shard."""
    fixed = {axis: p for axis, group in groups.items() for p in group if p.kind == "fix"}
    dp, parts = fixed.get("dp"), [fixed[a] for a in ("dp_replicate", "dp_shard") if a in fixed]
    product = 1
    for part in parts:
        product *= int(part.value)
        if dp is not None and int(dp.value) % product:
            raise UsageError(f"{dp} contradicts {part}: dp is dp_replicate x dp_shard.", "Drop one of the two.")
    if dp is not None and len(parts) == 2 and product != dp.value:
        raise UsageError(
            f"{dp} contradicts {parts[0]} and {parts[1]}: dp is dp_replicate x dp_shard.", "Drop one of the three."
        )
