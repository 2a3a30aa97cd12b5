"""Which parts of a traced model have figures that hold for the data of the trace only, and why."""

from __future__ import annotations

from collections.abc import Collection

from .graph import ModelGraph
from .graph_view import absolute
from .recording import Recording

_MEANS = "figures are those of random data, and tensor parallelism leaves it whole"
_LOOP = (
    "it runs other operators at other microbatch sizes (a loop over samples?); figures are sums, and tensor"
    " parallelism leaves it whole"
)


def opaque_parts(
    graph: ModelGraph, rec: Recording, inexact: Collection[tuple[int, str]], loops: Collection[int] = ()
) -> tuple[tuple[str, str, float], ...]:
    """(FQN, reason, share of the model's forward FLOPs) of every outermost such part.

    A part is a module, or, as "/" with the FQN of a module, what this module runs between units ("/": the model
    itself, and its loss).

    Parameters
    ----------
    rec : Recording
        Of one run: operators without a formula, and where the model looked at values.
    inexact : collection of (class index, relative FQN)
        Modules whose figures are no function of the microbatch size.
    loops : collection of int
        Classes whose operators follow the microbatch size.
    """
    reasons = {unit.fqn: _LOOP for unit in graph.units if unit.class_index in loops}
    for fqn, why in rec.opaque.items():
        for name in _everywhere(graph, fqn):
            reasons.setdefault(name, why)
    for read in rec.reads:
        if read.sizes and read.drawn:
            for name in _everywhere(graph, read.fqn):
                reasons.setdefault(name, f"{read.where}: {read.what} makes sizes of data; {_MEANS}")
    for index, fqn in sorted(inexact):
        units = [unit for unit in graph.units if unit.class_index == index]
        where = _nearest(rec, units[0].fqn)
        for unit in units:
            name = fqn if fqn.startswith("/") else absolute(fqn, unit.fqn)
            reasons.setdefault(name, f"{where}its sizes depend on data; {_MEANS}")
    outermost = {f: r for f, r in reasons.items() if not any(_below(f, o) for o in reasons)}
    inside = dict.fromkeys(outermost, 0.0)
    for unit in graph.units:
        for op in graph.classes[unit.class_index].ops:
            name = op.fqn if op.fqn.startswith("/") else absolute(op.fqn, unit.fqn)
            for fqn in outermost:
                if name == fqn or _below(name, fqn):
                    inside[fqn] += op.forward_flops.at(1)
    total = graph.flops_forward.at(1)
    return tuple((fqn, reason, inside[fqn] / total if total else 0.0) for fqn, reason in outermost.items())


def opaque_notes(graph: ModelGraph) -> list[str]:
    """Remarks on the opaque parts: where, their share of the FLOPs, why; those with one reason together."""
    alike: dict[str, list[tuple[str, float]]] = {}
    for fqn, reason, share in graph.opaque:
        alike.setdefault(reason, []).append((fqn, share))
    found = []
    for reason, parts in alike.items():
        name = parts[0][0] if parts[0][0].strip("/") else "the model's own code"
        others = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        found.append(f"opaque: {name}{others}, {sum(s for _, s in parts):.1%} of the FLOPs: {reason}")
    if found and not graph.captured:
        found.append("opaque parts hold more than a fifth of the FLOPs: take the figures as a guide only")
    return found


def read_notes(graph: ModelGraph, rec: Recording) -> list[str]:
    """Remarks on places where data was looked at and the figures are exact for what was taken, and on recomputation."""
    notes: dict[str, None] = {}
    if rec.computed_again:
        notes[f"{rec.computed_again} operators run again in backward by the model's own checkpointing; counted"] = None
    seen: set[str] = set()
    for read in rec.reads:
        if read.where in seen or (read.sizes and read.drawn):
            continue
        seen.add(read.where)
        owner = _unit_of(graph, read.fqn)
        kind = graph.classes[graph.units[owner].class_index].module_type if owner >= 0 else graph.name
        if read.sizes:
            notes[f"{read.where} ({kind}): sizes are those of the example inputs"] = None
        elif read.drawn:
            notes[f"{read.where} ({kind}): a number computed from data steers the code; traced with random data"] = None
        else:
            notes[f"{read.where} ({kind}): a number of the inputs steers the code; traced with the example inputs"] = (
                None
            )
    return list(notes)


def _unit_of(graph: ModelGraph, fqn: str) -> int:
    """Position of the unit that is the module `fqn` or holds it, -1 if there is none."""
    for unit in graph.units:
        if fqn == unit.fqn or _below(fqn, unit.fqn):
            return unit.position
    return -1


def _everywhere(graph: ModelGraph, fqn: str) -> list[str]:
    """The module in each unit that is like the one where it was seen: repeated layers are not all run."""
    position = _unit_of(graph, fqn)
    if position < 0:
        return ["/" + fqn]
    seen = graph.units[position]
    inner = fqn[len(seen.fqn) :].strip(".")
    return [absolute(inner, unit.fqn) for unit in graph.units if unit.class_index == seen.class_index]


def _below(fqn: str, other: str) -> bool:
    """Whether `fqn` lies inside the module `other`; parts between units ("/...") hold nothing but themselves."""
    if fqn == other or fqn.startswith("/") or other.startswith("/"):
        return False
    return not other or fqn.startswith(other + ".")


def _nearest(rec: Recording, unit: str) -> str:
    """Where data was looked at in a unit, else the first place where it was in the model."""
    reads = [read for read in rec.reads if read.sizes]
    own = [read for read in reads if read.fqn == unit or read.fqn.startswith(unit + ".")]
    return f"{(own or reads)[0].where}: " if reads else ""
