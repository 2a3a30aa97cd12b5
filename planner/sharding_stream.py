"""One unit class under sequence parallelism: which of its tensors are split along the tokens, and what that moves.

    outside                |  inside a unit
    stream (1/tp of the    |  norm -> (door: all_gather) -> col .. row -> (reduce_scatter) -> dropout, add
    tokens on each rank)   |  -------------- residual --------------------------------------> add

A *door* is a module that holds col layers and does nothing with the stream itself: what it is given is gathered
there, once for all its projections. A projection without a door gathers its own input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .graph import Op, UnitClass
from .sharding_carry import references
from .sharding_products import PRODUCTS
from .sharding_rules import POINTWISE, Interpreter, live_operators
from .sharding_search import Search
from .sharding_states import Conflict, Decision, Layer, Outcome, Partial, Split, State, Weight, Whole
from .sharding_walk import PROBE, inside

_SOURCE = "tokens"
_TOKENS, _RANK = 1, 3  # the stream is (batch, tokens, features)
STREAM = Split(_TOKENS, frozenset({_SOURCE}))
# What the runtime has been shown to run on a part of the tokens.
_PROVEN = POINTWISE | {"mean", "sum", "native_layer_norm", "_fused_rms_norm"}


@dataclass(slots=True)
class Stream:
    """What a split of the stream means for one class.

    tensors : ids of the tensors of which each rank holds its tokens
    outputs : whether each class output is one of them
    works : indices of the operators that run on 1/tp of the tokens
    modules : modules (relative FQN) whose operators these are
    scattered : row layers whose sum is scattered along the tokens
    gathers : (storage, door) -> module that reads it whole
    parameters : whole parameters that the stream reads, by name in the first unit -> tensor id
    lengths : tokens of each stream
    """

    tensors: set[int] = field(default_factory=set)
    outputs: tuple[bool, ...] = ()
    works: set[int] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    scattered: set[str] = field(default_factory=set)
    gathers: dict[tuple[int, str], str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)


def is_stream(cls: UnitClass, tensor: int) -> bool:
    """Whether a tensor could be a stream: (batch, tokens, features) with a gradient."""
    spec = cls.tensors[tensor]
    samples = [d.per_sample != 0 for d in spec.shape]
    return spec.requires_grad and samples == [True, False, False]


def follow(search: Search, index: int) -> Stream:
    """Follow the stream through class `index`, all of whose inputs that could be streams are split.

    Raises
    ------
    Conflict
        If an operator cannot run on a part of the tokens; `weight` is the module's relative FQN.
    """
    outcome = search.outcomes[index]
    _refuse(search, index, outcome)
    columns = {fqn for fqn in outcome.columns if fqn in search.layers[index]}
    doors = {fqn.rpartition(".")[0] for fqn in columns} - {""}
    while True:
        found = _Follower(search, index, doors, columns).run()
        if not doors & found.modules:
            return found
        doors -= found.modules


def _refuse(search: Search, index: int, outcome: Outcome) -> None:
    """Raise for styles that the runtime does not combine with a split stream."""
    reason = "is not run with a stream that is split along its tokens"
    if outcome.regions or outcome.raw:
        raise Conflict(frozenset(), f"a module whose code reads split parameters {reason}", weight="")
    kinds = {search.layers[index][f].kind for f in (*outcome.rows, *outcome.columns) if f in search.layers[index]}
    if "convolution" in kinds or outcome.channels:
        raise Conflict(frozenset(), f"a split convolution {reason}", weight="")
    if search.opaque[index]:
        raise Conflict(frozenset(), f"an opaque part {reason}", weight="")


class _Follower:
    """One walk over the operators of a class, with `doors` given."""

    def __init__(self, search: Search, index: int, doors: set[str], columns: set[str]) -> None:
        self.cls, self.outcome = search.graph.classes[index], search.outcomes[index]
        self.layers, self.columns, self.doors = search.layers[index], columns, doors
        layer = Layer(_SOURCE, "", "linear", 1, 1)
        views = search.views[index]
        self.walk = Interpreter(self.cls, {_SOURCE: layer}, {_SOURCE: Decision("col")}, lambda name: False, views)
        self.maker: dict[int, str] = {}
        self.found = Stream()

    def run(self) -> Stream:
        """What a split of the stream means, with these doors."""
        for tensor in self.cls.inputs:
            if is_stream(self.cls, tensor):
                self._set(tensor, STREAM)
        live = live_operators(self.walk)
        for op in self.cls.ops:
            if op.index not in live or all(t in self.walk.views for t in op.outputs):
                continue
            try:
                self._step(op)
            except Conflict as conflict:
                raise Conflict(frozenset(), str(conflict), weight=op.fqn) from None
        self.found.outputs = tuple(self._streams(t) for t in self.cls.outputs)
        return self.found

    def _streams(self, tensor: int) -> bool:
        return isinstance(self.walk.state(tensor), Split)

    def _set(self, tensor: int, state: State) -> None:
        self.walk.out.states[tensor] = state
        if isinstance(state, Split):
            self.found.tensors.add(tensor)
            self.found.lengths.add(self.walk.sizes[tensor][_TOKENS])

    def _step(self, op: Op) -> None:
        given = {t for t in op.inputs if self._streams(t) and not self._is_gathered(op, t)}
        features = any(isinstance(self.outcome.states[t], Split | Partial) for t in op.inputs)
        for tensor in op.outputs:
            self.maker[tensor] = op.fqn
        if op.fqn in self.outcome.rows:
            self._row(op)
        elif not given:
            for tensor in op.outputs:
                self._set(tensor, Whole())
        elif features:
            raise Conflict(frozenset(), "the stream meets split features")
        else:
            self._work(op, given)

    def _is_gathered(self, op: Op, tensor: int) -> bool:
        """Whether an operator reads a stream whole: at the outermost door that the tensor crosses."""
        maker = self.maker.get(tensor)
        crossed = [d for d in self.doors if inside(op.fqn, d) and (maker is None or not inside(maker, d))]
        if not crossed and op.fqn not in self.columns:
            return False
        door = min(crossed, key=len, default="")
        self.found.gathers.setdefault((self.cls.tensors[tensor].base, door), op.fqn)
        return True

    def _row(self, op: Op) -> None:
        """A row layer: its output is (batch, tokens, features) in the end; before, its flattening."""
        last = [o for o in self.cls.ops if o.fqn == op.fqn][-1].outputs[0]
        if self.layers[op.fqn].kind != "linear" or not is_stream(self.cls, last):
            raise Conflict(frozenset(), "its sum is no (batch, tokens, features) with a gradient")
        self.found.scattered.add(op.fqn)
        for tensor in op.outputs:
            if is_stream(self.cls, tensor):
                self._set(tensor, STREAM)
            elif not isinstance(self.outcome.states[tensor], Split):
                self.found.tensors.add(tensor)  # its flattening, the storage of the same tokens

    def _work(self, op: Op, given: set[int]) -> None:
        """An operator on 1/tp of the tokens."""
        base = op.name.split(".")[-2].removesuffix("_")
        if base in PRODUCTS:
            raise Conflict(frozenset(), "a layer that stays whole reads the stream")
        if base not in _PROVEN:
            raise Conflict(frozenset(), f"{base} is not run on a part of the tokens")
        for tensor in {t for a in op.args for t in references(a)} - given:
            self._meets(tensor)
        self.walk.step(op)
        for tensor in op.outputs:
            state = self.walk.state(tensor)
            plain = isinstance(state, Split) and (state.dim, state.outer, state.segments) == (_TOKENS, 1, ())
            if isinstance(state, Split) and not (plain and len(self.walk.sizes[tensor]) == _RANK):
                raise Conflict(frozenset(), f"{base} changes the shape of the stream")
            self._set(tensor, state)
        self.found.works.add(op.index)
        if op.fqn not in self.layers and not op.fqn.startswith("/"):
            self.found.modules.add(op.fqn)

    def _meets(self, tensor: int) -> None:
        """A whole tensor that an operator on the stream reads."""
        spec, state = self.cls.tensors[tensor], self.walk.state(tensor)
        if isinstance(state, Weight):
            if spec.requires_grad:
                if not self.walk.sizes[tensor]:
                    raise Conflict(frozenset(), "a parameter without dimensions scales the stream")
                self.found.parameters[state.name] = tensor
        elif spec.requires_grad and PROBE in self.walk.sizes[tensor]:
            raise Conflict(frozenset(), "the stream meets an activation that is whole")
