"""Sequence parallelism, found: may the stream between row and col layers be split along its tokens?

Between the sum after a row layer and the next col layer every rank computes the same norms, dropouts and residual
sums. If each of these operators carries a split of the tokens, a rank may do its tokens alone:

    row  -> reduce_scatter -> [ dropout, add, norm on 1/tp of the tokens ] -> all_gather -> col

which moves the bytes of the all-reduce that it replaces, and keeps 1/tp of the activations between. The stretch
begins with the first unit that has a row layer and ends behind the last. The whole copies that projections keep for
their weights' gradients stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .graph import Affine, Unit, UnitClass
from .sharding_search import Search
from .sharding_states import Collective, Conflict, Outcome, absolute, tensor_bytes
from .sharding_stream import Stream, follow, is_stream
from .sharding_walk import inside


@dataclass(frozen=True, slots=True)
class ClassSequence:
    """What a split stream changes in the sharding of one unit class.

    streams : ids of tensors of which each rank holds its tokens
    works : indices of operators that run on 1/tp of the tokens
    gathered : ids of storages of streams whose gathered, whole copy projections keep for backward
    collectives : all tp collectives of a unit call, in place of those of the whole stream
    gradient_sums : all-reduces over tp of gradients of whole weights, at each reduction of gradients
    """

    streams: frozenset[int] = frozenset()
    works: frozenset[int] = frozenset()
    gathered: frozenset[int] = frozenset()
    collectives: tuple[Collective, ...] = ()
    gradient_sums: tuple[Collective, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """Whether the stream may be split, by what, and who works on a part of it.

    possible : whether every operator between row and col layers carries the split
    modules : absolute FQNs of the units, norms, dropouts and other modules that would run on 1/tp of the tokens
    tokens : tp must divide this (common divisor of the lengths of all streams)
    reason : what stops it, "" if nothing does
    scattered : row layers whose sum is scattered along the tokens
    islands : modules that run whole: what they are given is gathered, what they return is cut
    ends : units whose output is gathered, because what reads it is outside the stretch
    streams : (unit position, output index) of the tensors that are split where they cross from unit to unit
    classes : what changes in each class, by index; other classes stay as they are
    """

    possible: bool
    modules: tuple[str, ...] = ()
    tokens: int = 0
    reason: str = ""
    scattered: frozenset[str] = frozenset()
    islands: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()
    streams: frozenset[tuple[int, int]] = frozenset()
    classes: Mapping[int, ClassSequence] = field(default_factory=dict)


def sequence_parallel(search: Search) -> SequenceParallel:
    """Follow the stream from the first unit with a row layer to the last."""
    graph = search.graph
    summing = [u.position for u in graph.units if _sums(search.outcomes[u.class_index])]
    if not summing:
        return SequenceParallel(False, reason="no layer is split along what it sums over")
    stretch = graph.units[summing[0] : summing[-1] + 1]
    found: dict[int, Stream] = {}
    for unit in stretch:
        if unit.class_index in found or not _may_hold_a_stream(search, unit):
            continue
        try:
            found[unit.class_index] = follow(search, unit.class_index)
        except Conflict as conflict:
            if search.outcomes[unit.class_index].rows or search.outcomes[unit.class_index].columns:
                where = absolute(unit.fqn, conflict.weight.strip("/")) or graph.name
                return SequenceParallel(False, reason=f"{where}: {conflict}")
    if not any(stream.scattered for stream in found.values()):
        return SequenceParallel(False, reason="no row layer's sum can be scattered along the tokens")
    lengths = set[int]().union(*(s.lengths for s in found.values()))
    tokens = math.gcd(*lengths) if lengths else 0
    if tokens <= 1:
        return SequenceParallel(False, reason=f"streams of {', '.join(map(str, sorted(lengths)))} tokens")
    return _Stretch(search, found, stretch, tokens).result()


def _sums(outcome: Outcome) -> bool:
    return bool(outcome.rows or outcome.regions)


def _may_hold_a_stream(search: Search, unit: Unit) -> bool:
    cls = search.graph.classes[unit.class_index]
    return not unit.replicated and any(is_stream(cls, t) for t in cls.inputs)


class _Stretch:
    """The units between which the stream is split, and what passes their borders."""

    def __init__(self, search: Search, found: Mapping[int, Stream], stretch: tuple[Unit, ...], tokens: int) -> None:
        self.search, self.found, self.tokens = search, found, tokens
        self.units = [u for u in stretch if u.class_index in found and any(found[u.class_index].outputs)]
        self.positions = {u.position for u in self.units}
        self.classes = {i: _changes(search, i, found[i]) for i in sorted({u.class_index for u in self.units})}
        self.ends: set[int] = set()
        self.extra: dict[int, list[Collective]] = {}

    def result(self) -> SequenceParallel:
        """The answer, once it is clear that no class and no end is on both sides."""
        graph = self.search.graph
        for unit in graph.units:
            if unit.class_index in self.classes and unit.position not in self.positions:
                return SequenceParallel(False, reason=f"{unit.fqn} is the same inside the stretch and outside")
            self._borders(unit)
        ends = {graph.units[p].fqn for p in self.ends}
        if any(u.fqn in ends and u.position not in self.ends for u in self.units):
            return SequenceParallel(False, reason="a module is called inside the stretch and at its end")
        modules = dict.fromkeys(m for u in self.units for m in self._modules(u))
        for index, extra in self.extra.items():
            outcome = self.search.outcomes[index]
            self.classes[index] = ClassSequence(collectives=(*outcome.collectives, *extra))
        return SequenceParallel(
            possible=True,
            modules=tuple(modules),
            tokens=self.tokens,
            scattered=frozenset(absolute(u.fqn, f) for u in self.units for f in self.found[u.class_index].scattered),
            islands=frozenset(absolute(u.fqn, f) for u in self.units for f in self.found[u.class_index].islands),
            ends=tuple(sorted(ends)),
            streams=frozenset(
                (u.position, i)
                for u in self.units
                for i, split in enumerate(self.found[u.class_index].outputs)
                if split and u.position not in self.ends
            ),
            classes=self.classes,
        )

    def _modules(self, unit: Unit) -> Iterator[str]:
        yield unit.fqn
        yield from sorted(absolute(unit.fqn, fqn) for fqn in self.found[unit.class_index].modules if fqn)

    def _borders(self, unit: Unit) -> None:
        """What a unit reads across the borders of the stretch.

        A split stream read outside is gathered; a whole one read inside is cut, and its gradient gathered. Both are
        counted with the unit outside.
        """
        graph = self.search.graph
        cls, within = graph.classes[unit.class_index], unit.position in self.positions
        for (position, output), tensor in zip(unit.sources, cls.inputs, strict=True):
            if position < 0 or (position in self.positions) == within:
                continue
            maker = graph.units[position]
            n_bytes = tensor_bytes(cls.tensors[tensor])
            if within and is_stream(cls, tensor):
                self._add(maker.class_index, "backward", n_bytes)
            elif not within and self.found[maker.class_index].outputs[output]:
                self._add(unit.class_index, "forward", n_bytes)
                self.ends.add(position)

    def _add(self, index: int, phase: str, n_bytes: Affine) -> None:
        gather = Collective(phase, "all_gather", n_bytes, "")
        known = self.extra.setdefault(index, [])
        if gather not in known:
            known.append(gather)


def _changes(search: Search, index: int, stream: Stream) -> ClassSequence:
    """A class's collectives and kept tensors with the stream split."""
    cls, outcome = search.graph.classes[index], search.outcomes[index]
    gathered = {storage for storage, _ in (*stream.gathers, *stream.given)}
    saved = {
        cls.tensors[t].base
        for op in cls.ops
        if outcome.op_split[op.index] == "n" or _on_island(stream, op.fqn)
        for t in op.saved
    }
    split = {cls.tensors[t].base for t in stream.tensors} | stream.tensors
    return ClassSequence(
        streams=frozenset(split),
        works=frozenset(stream.works),
        gathered=frozenset(gathered & saved),
        collectives=tuple(_collectives(cls, outcome, stream)),
        gradient_sums=tuple(
            Collective("backward", "all_reduce", tensor_bytes(cls.tensors[tensor]), name)
            for name, tensor in sorted(stream.parameters.items())
        ),
    )


def _on_island(stream: Stream, fqn: str) -> bool:
    return any(inside(fqn, island) for island in stream.islands)


def _collectives(cls: UnitClass, outcome: Outcome, stream: Stream) -> Iterator[Collective]:
    """Sums after row layers become scatters, sums of col layers' input gradients too; each has its gather.

    Islands keep theirs; what they are given is gathered, and so are the gradients of what they return.
    """
    gathered = {storage for storage, _ in stream.gathers}
    replaced = {
        (tensor_bytes(cls.tensors[tensor]), module)
        for (tensor, _), module in outcome.inputs_summed.items()
        if tensor in gathered and not _on_island(stream, module)
    }
    for storage, island in sorted(stream.given):
        yield Collective("forward", "all_gather", tensor_bytes(cls.tensors[storage]), island)
    for tensor, island in stream.cuts.items():
        yield Collective("backward", "all_gather", tensor_bytes(cls.tensors[tensor]), island)
    for (storage, _), module in stream.gathers.items():
        yield from _pair("all_gather", "reduce_scatter", tensor_bytes(cls.tensors[storage]), module)
    for item in outcome.collectives:
        if item.phase == "forward" and item.collective == "all_reduce" and item.module in stream.scattered:
            yield from _pair("reduce_scatter", "all_gather", item.bytes, item.module)
        elif item.phase != "backward" or (item.bytes, item.module) not in replaced:
            yield item


def _pair(forward: str, backward: str, n_bytes: Affine, module: str) -> Iterator[Collective]:
    yield Collective("forward", forward, n_bytes, module)
    yield Collective("backward", backward, n_bytes, module)
