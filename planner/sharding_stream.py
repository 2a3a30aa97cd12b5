"""One unit class under sequence parallelism: which of its tensors are split along the tokens, and what that moves.

    outside                |  inside a unit
    stream (1/tp of the    |  norm -> (door: all_gather) -> col .. row -> (reduce_scatter) -> dropout, add
    tokens on each rank)   |  -------------- residual --------------------------------------> add

A *door* is a module that holds col layers and does nothing with the stream itself: what it is given is gathered
there, once for all its projections. A projection without a door gathers its own input. An *island* is a module whose
code cannot run on a part of the tokens (a mixture of experts): what it is given is gathered, it runs as without the
split, and what it returns is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .graph import Op, UnitClass
from .sharding_carry import references
from .sharding_products import PRODUCTS
from .sharding_rules import POINTWISE, Interpreter, live_operators
from .sharding_search import Search
from .sharding_states import Conflict, Decision, Layer, Partial, Split, State, Weight, Whole
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
    islands : modules that run whole inside the stretch
    given : (storage, island) for what islands are given
    cuts : tensors that islands return whole and that are then cut
    parameters : whole parameters that the stream reads, by name in the first unit -> tensor id
    lengths : tokens of each stream
    """

    tensors: set[int] = field(default_factory=set)
    outputs: tuple[bool, ...] = ()
    works: set[int] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    scattered: set[str] = field(default_factory=set)
    gathers: dict[tuple[int, str], str] = field(default_factory=dict)
    islands: set[str] = field(default_factory=set)
    given: set[tuple[int, str]] = field(default_factory=set)
    cuts: dict[int, str] = field(default_factory=dict)
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
    kinds = {search.layers[index][f].kind for f in (*outcome.rows, *outcome.columns) if f in search.layers[index]}
    if "convolution" in kinds or outcome.channels:
        raise Conflict(frozenset(), "a split convolution is not run beside a split stream")
    layers = search.layers[index]
    columns = {fqn for fqn in outcome.columns if fqn in layers and layers[fqn].kind != "raw"}
    doors = {fqn.rpartition(".")[0] for fqn in columns} - {""}
    islands: set[str] = set()
    while True:
        follower = _Follower(search, index, doors, columns, islands)
        try:
            follower.run()
        except Conflict as conflict:
            island = _island(search, index, conflict.weight)
            if not doors & follower.found.modules:
                if island is None or island in islands:
                    raise
                islands.add(island)
        else:
            if not doors & follower.found.modules:
                return follower.found
        doors -= follower.found.modules


def _island(search: Search, index: int, fqn: str) -> str | None:
    """The child of the unit around module `fqn`, to run whole; None for the unit itself, layers and lists."""
    child, _, rest = fqn.partition(".")
    listed = rest.partition(".")[0].isdigit()
    return None if not child or child.startswith("/") or listed or child in search.layers[index] else child


class _Follower:
    """One walk over the operators of a class, with `doors` and `islands` given."""

    def __init__(self, search: Search, index: int, doors: set[str], columns: set[str], islands: set[str]) -> None:
        self.cls, self.outcome = search.graph.classes[index], search.outcomes[index]
        self.layers, self.columns, self.doors = search.layers[index], columns, doors
        layer = Layer(_SOURCE, "", "linear", 1, 1)
        views = search.views[index]
        self.walk = Interpreter(self.cls, {_SOURCE: layer}, {_SOURCE: Decision("col")}, lambda name: False, views)
        self.maker: dict[int, str] = {}
        self.opaque = search.opaque[index]
        self.found = Stream(islands=set(islands))

    def run(self) -> None:
        """Find what a split of the stream means, with these doors and islands."""
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
                raise Conflict(frozenset(), str(conflict), weight=conflict.weight or op.fqn) from None
        for tensor in self.cls.outputs:
            self._leaves_island(tensor, "/")
        self.found.outputs = tuple(self._streams(t) for t in self.cls.outputs)

    def _streams(self, tensor: int) -> bool:
        return isinstance(self.walk.state(tensor), Split)

    def _set(self, tensor: int, state: State) -> None:
        self.walk.out.states[tensor] = state
        if isinstance(state, Split):
            self.found.tensors.add(tensor)
            self.found.lengths.add(self.walk.sizes[tensor][_TOKENS])

    def _step(self, op: Op) -> None:
        island = self._island_of(op.fqn)
        if island:
            for tensor in op.inputs:
                if self._streams(tensor) and self._island_of(self.maker.get(tensor, "")) != island:
                    self.found.given.add((self.cls.tensors[tensor].base, island))
            for tensor in op.outputs:
                self.maker[tensor] = op.fqn
                self._set(tensor, Whole())
            return
        for tensor in op.inputs:
            self._leaves_island(tensor, op.fqn)
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

    def _island_of(self, fqn: str) -> str | None:
        return next((i for i in self.found.islands if inside(fqn, i)), None) if fqn else None

    def _leaves_island(self, tensor: int, reader: str) -> None:
        """A stream that an island made is cut when it leaves."""
        island = self._island_of(self.maker.get(tensor, ""))
        if island and not inside(reader, island) and not self._streams(tensor) and is_stream(self.cls, tensor):
            self._set(tensor, STREAM)
            self.found.cuts[tensor] = island

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
        if op.fqn in self.doors:
            self.found.modules.add(op.fqn)  # no door then
        if any(inside(op.fqn, part) for part in self.opaque):
            raise Conflict(frozenset(), "an opaque part reads the stream")
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
            reason = "the stream meets an activation that is whole"
            raise Conflict(frozenset(), reason, weight=self.maker.get(tensor, ""))
