"""Sequence parallelism, found: may the stream between row and col layers be split along its tokens?

Between the sum after a row layer and the next col layer every rank computes the same norms, dropouts and residual
sums. If each of these operators carries a split of the tokens, a rank may do its tokens alone:

    row  -> reduce_scatter -> [ dropout, add, norm on 1/tp of the tokens ] -> all_gather -> col

which moves the bytes of the all-reduce that it replaces, and keeps 1/tp of the activations between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from .graph import Op, Unit, UnitClass
from .sharding_products import PRODUCTS, operands
from .sharding_rules import Interpreter, live_operators
from .sharding_search import Search
from .sharding_states import Conflict, Decision, Layer, Outcome, Partial, Split, State, Weight, Whole, absolute
from .sharding_walk import PROBE, inside

_TOKENS = "tokens"
_STREAM = Split(1, frozenset({_TOKENS}))


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """Whether the stream may be split, by what, and who works on a part of it.

    possible : whether every operator between row and col layers carries the split
    modules : absolute FQNs of the norms, dropouts and other modules that would run on 1/tp of the tokens
    tokens : tp must divide this (common divisor of the lengths of all streams)
    reason : what stops it, "" if nothing does
    """

    possible: bool
    modules: tuple[str, ...] = ()
    tokens: int = 0
    reason: str = ""


@dataclass(slots=True)
class _Found:
    outputs: list[State]
    modules: set[str] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)


def sequence_parallel(search: Search) -> SequenceParallel:
    """Follow the stream from the first unit with a col layer to the last with a row layer."""
    graph = search.graph
    with_rows = [u.position for u in graph.units if search.outcomes[u.class_index].rows or _regions(search, u)]
    if not with_rows:
        return SequenceParallel(False, reason="no layer is split along what it sums over")
    known: dict[tuple[int, int], State] = {}
    cache: dict[tuple[int, tuple[State, ...]], _Found] = {}
    modules: set[str] = set()
    lengths: set[int] = set()
    for unit in graph.units[with_rows[0] : with_rows[-1] + 1]:
        cls = graph.classes[unit.class_index]
        states = tuple(
            known.get(source, _entry(search, cls, i)) for source, i in zip(unit.sources, cls.inputs, strict=True)
        )
        key = (unit.class_index, states)
        try:
            found = cache.get(key) or _follow(search, unit, states)
        except Conflict as conflict:
            where = absolute(unit.fqn, str(conflict.weight).strip("/")) or graph.name
            return SequenceParallel(False, reason=f"{where}: {conflict.reason}")
        cache[key] = found
        known.update({(unit.position, i): state for i, state in enumerate(found.outputs)})
        modules |= {absolute(unit.fqn, fqn) for fqn in found.modules}
        lengths |= found.lengths
    tokens = math.gcd(*lengths) if lengths else 0
    if tokens <= 1:
        return SequenceParallel(False, reason=f"streams of {', '.join(map(str, sorted(lengths)))} tokens")
    return SequenceParallel(True, tuple(sorted(modules)), tokens)


def _regions(search: Search, unit: Unit) -> bool:
    return bool(search.outcomes[unit.class_index].regions)


def _entry(search: Search, cls: UnitClass, tensor: int) -> State:
    """An input from before the first unit: the stream itself, if it is (batch, tokens, features) with a gradient."""
    spec = cls.tensors[tensor]
    samples = [d.per_sample != 0 for d in spec.shape]
    stream = spec.requires_grad and len(samples) == 3 and samples[0] and not samples[1]
    return _STREAM if stream else Whole()


def _follow(search: Search, unit: Unit, states: tuple[State, ...]) -> _Found:
    """The states of a unit's outputs; a conflict names the module in its field `weight`."""
    index = unit.class_index
    cls, outcome = search.graph.classes[index], search.outcomes[index]
    walk = _walk(search, index)
    for tensor, state in zip(cls.inputs, states, strict=True):
        walk.out.states[tensor] = state
    found = _Found([])
    live = live_operators(walk)
    gathered: set[str] = set(outcome.regions)  # modules at whose door the tokens are gathered anyway
    while True:
        try:
            _interpret(walk, search, index, live, gathered, found)
            break
        except Conflict as conflict:
            door = _door(outcome, conflict.weight, gathered)
            if door is None and not outcome.rows and not outcome.columns:
                return _Found([Whole()] * len(cls.outputs))  # a unit between two streams: gathered before it
            if door is None:
                raise
            gathered.add(door)
    found.outputs = [s if _is_stream(s := walk.state(t)) else Whole() for t in cls.outputs]
    return found


def _door(outcome: Outcome, fqn: str, gathered: set[str]) -> str | None:
    """The child of the unit around module `fqn`, if layers inside it gather the tokens at its door already."""
    child = fqn.partition(".")[0]
    sums = [*outcome.rows, *outcome.regions]
    inner = any(inside(layer.partition(":")[0], child) for layer in sums)
    return child if child and not fqn.startswith("/") and inner and child not in gathered else None


def _interpret(
    walk: Interpreter, search: Search, index: int, live: set[int], gathered: set[str], found: _Found
) -> None:
    outcome = search.outcomes[index]
    for op in walk.cls.ops:
        if op.index not in live or all(t in walk.views for t in op.outputs):
            continue
        try:
            states = _step(walk, outcome, op, gathered)
        except Conflict as conflict:
            raise Conflict(conflict.modules, conflict.reason, weight=op.fqn) from None
        for tensor, state in zip(op.outputs, states, strict=False):
            walk.out.states[tensor] = state
        if any(_is_stream(walk.state(t)) for t in op.outputs):
            found.lengths |= set(_lengths(walk, op))
            if op.fqn not in search.layers[index]:
                found.modules.add(op.fqn)


def _walk(search: Search, index: int) -> Interpreter:
    layer = Layer(_TOKENS, "", "linear", 1, 1)
    cls = search.graph.classes[index]
    return Interpreter(cls, {_TOKENS: layer}, {_TOKENS: Decision("col")}, lambda name: False, search.views[index])


def _is_stream(state: State) -> bool:
    return isinstance(state, Split) and _TOKENS in state.sources


def _lengths(walk: Interpreter, op: Op) -> Iterator[int]:
    for tensor in op.outputs:
        state = walk.state(tensor)
        if isinstance(state, Split) and _is_stream(state):
            yield walk.sizes[tensor][state.dim] // state.outer


def _step(walk: Interpreter, outcome: Outcome, op: Op, gathered: set[str]) -> list[State]:
    """The token states of an operator's outputs."""
    split = [isinstance(outcome.states[t], Split | Partial) for t in op.outputs]
    within = any(inside(op.fqn, door) for door in gathered)
    if any(split) or _gathers(outcome, op):
        return [Whole()] * len(op.outputs)  # behind a col layer, which gathers the tokens
    if within or any(isinstance(outcome.states[t], Split | Partial) for t in op.inputs):
        return [_scattered(walk, t) for t in op.outputs]  # a row layer's sum, scattered
    base = op.name.split(".")[-2]
    if base in PRODUCTS and isinstance(walk.state(operands(op, base)[2]), Weight):
        return [_whole_layer(walk, op, base)]
    if not any(_is_stream(walk.state(t)) for t in op.inputs):
        return [Whole()] * len(op.outputs)
    walk.step(op)
    return [walk.state(t) for t in op.outputs]


def _gathers(outcome: Outcome, op: Op) -> bool:
    return op.fqn in outcome.columns and outcome.op_split[op.index] == "n"


def _scattered(walk: Interpreter, tensor: int) -> State:
    """The stream after a row layer: (batch, tokens, features), or its flattening."""
    shape = walk.sizes[tensor]
    if not walk.cls.tensors[tensor].requires_grad:
        return Whole()
    if len(shape) == 3 and shape[0] == PROBE:
        return _STREAM
    if len(shape) == 2 and shape[0] % PROBE == 0 and shape[0] > PROBE:
        return Split(0, frozenset({_TOKENS}), outer=PROBE)
    return Whole()


def _whole_layer(walk: Interpreter, op: Op, base: str) -> State:
    """A layer that stays whole works on its tokens alone (its weight's gradients are then summed)."""
    state = walk.state(operands(op, base)[1])
    if isinstance(state, Split) and state.dim == len(walk.sizes[op.outputs[0]]) - 1:
        raise Conflict(state.sources, "a whole layer sums over the tokens")
    return state if _is_stream(state) else Whole()
