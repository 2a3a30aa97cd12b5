"""What is fixed for every unit whatever the mesh: its parameters, and where it may be cut, wrapped, recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import ModelGraph, UnitClass
from .unit_costs import saved_storages


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """What is fixed for a unit whatever the mesh.

    parameter_names, buffer_names : absolute, canonical names first used by this unit, and shared ones
    shared_names : parameters that an earlier unit uses too (tied)
    elsewhere : storages of its class that another unit already keeps
    may_recompute : a module of its own, without operators of its parents
    own_group : wrapped by fully_shard on its own
    kind : equal for units with equal class and equal `elsewhere`
    cut_after : a stage may end here: the trace allows it, and no module is called on both sides
    """

    parameter_names: tuple[str, ...]
    shared_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    elsewhere: frozenset[int]
    may_recompute: bool
    own_group: bool
    kind: int
    cut_after: bool


def unit_facts(graph: ModelGraph) -> tuple[UnitFacts, ...]:
    """`UnitFacts` of every unit of the chain, in order."""
    canonical = {name: group[0] for group in graph.tied for name in group}
    cuts = legal_cuts(graph)
    shared_by_ties = set(canonical.values())
    seen: set[str] = set()
    users: dict[str, int] = {}
    raw = []
    for unit in graph.units:
        cls = graph.classes[unit.class_index]
        names = [canonical.get(n, n) for n in absolute_names(unit.fqn, cls)]
        names = list(dict.fromkeys(names))
        for name in names:
            users[name] = users.get(name, 0) + 1
        raw.append((unit, cls, names))
    kinds: dict[object, int] = {}
    facts = []
    first_user_of_replicated: set[tuple[int, int]] = set()
    left_over = [n for n in graph.parameters if canonical.get(n, n) == n and n not in users]
    for unit, cls, names in raw:
        if unit.position == 0:
            names = names + left_over
        own = [n for n in names if n not in seen]
        seen.update(names)
        parameters = [n for n in own if not graph.parameters[n].is_buffer]
        shared = [n for n in names if n not in own and not graph.parameters[n].is_buffer]
        elsewhere = kept_elsewhere(graph, unit.position, first_user_of_replicated)
        glue = any(op.fqn.startswith("/") for op in cls.ops)
        works = any(op.forward.kind in ("gemm", "conv", "attention") for op in cls.ops)
        single = all(users.get(n, 1) == 1 and n not in shared_by_ties for n in parameters + shared)
        facts.append(
            UnitFacts(
                parameter_names=tuple(parameters),
                shared_names=tuple(shared),
                buffer_names=tuple(n for n in own if graph.parameters[n].is_buffer),
                elsewhere=elsewhere,
                may_recompute=works and not glue and unit.call == 0 and not unit.replicated and bool(parameters),
                own_group=single and bool(parameters) and unit.call == 0,
                kind=kinds.setdefault((unit.class_index, elsewhere), len(kinds)),
                cut_after=unit.position in cuts,
            )
        )
    return tuple(facts)


def legal_cuts(graph: ModelGraph) -> set[int]:
    """Positions after which a stage may end: traced as legal, and no module is called on both sides.

    (A module called twice with a cut between its calls would need its parameters on two stages.)
    """
    last_call = {unit.fqn: unit.position for unit in graph.units if unit.fqn and not unit.replicated}
    legal, open_until = set(), -1
    for unit in graph.units:
        open_until = max(open_until, last_call.get(unit.fqn, -1))
        if unit.cut_after and open_until <= unit.position:
            legal.add(unit.position)
    return legal


def absolute_names(unit_fqn: str, cls: UnitClass) -> list[str]:
    """The class's parameter and buffer names in the user's model, for the unit at `unit_fqn`."""
    return [absolute_name(unit_fqn, p.fqn) for p in cls.parameters]


def absolute_name(unit_fqn: str, relative: str) -> str:
    """A name relative to a unit ("/x" is already absolute) as the model spells it.

    >>> absolute_name("model.layers.3", "mlp.up_proj.weight"), absolute_name("lm_head", "/model.norm.weight")
    ('model.layers.3.mlp.up_proj.weight', 'model.norm.weight')
    """
    if relative.startswith("/"):
        return relative[1:]
    return ".".join(part for part in (unit_fqn, relative) if part)


def kept_elsewhere(graph: ModelGraph, position: int, seen: set[tuple[int, int]]) -> frozenset[int]:
    """Input storages of a unit that its producer, the batch, or an earlier unit already keeps.

    `seen` collects outputs of replicated units (rotary tables) that one unit has been charged for.
    """
    unit = graph.units[position]
    cls = graph.classes[unit.class_index]
    counted = set()
    for tensor, (source, output) in zip(cls.inputs, unit.sources, strict=True):
        base = cls.tensors[tensor].base
        if source < 0:
            counted.add(base)
            continue
        producer = graph.units[source]
        producer_cls = graph.classes[producer.class_index]
        produced = producer_cls.tensors[producer_cls.outputs[output]].base
        if producer.replicated:
            if (source, output) in seen:
                counted.add(base)
            seen.add((source, output))
        elif produced in saved_storages(producer_cls):
            counted.add(base)
    return frozenset(counted)
