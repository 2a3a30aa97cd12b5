"""One walk over the operators of a unit class: the states found so far, and what every rule needs to say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from .graph import Op, UnitClass
from .sharding_states import (
    Collective,
    Conflict,
    Decision,
    Layer,
    Outcome,
    Partial,
    Split,
    State,
    Weight,
    Whole,
    tensor_bytes,
)

PROBE = 7  # microbatch at which shapes are compared: prime, so that chance equalities are rare


class Walk:
    """States of the tensors of one class, and what was found on the way.

    Parameters
    ----------
    cls : UnitClass
    layers : mapping of layer key to Layer
        Weights that may be split.
    decisions : mapping of layer key to Decision
    sharded : callable
        Tells by absolute parameter name whether some layer splits it.
    views : mapping of tensor id to Weight
        Parameters and buffers and their views.
    kept : collection of str
        Raw parameters, by absolute name, that must stay whole.
    opaque : collection of str
        Modules, relative to the unit, whose code was not traced operator by operator.
    """

    def __init__(
        self,
        cls: UnitClass,
        layers: Mapping[str, Layer],
        decisions: Mapping[str, Decision],
        sharded: Callable[[str], bool],
        views: Mapping[int, Weight],
        kept: Collection[str] = (),
        opaque: Collection[str] = (),
    ) -> None:
        self.cls, self.layers, self.decisions, self.sharded = cls, layers, decisions, sharded
        self.views, self.kept, self.opaque = views, kept, opaque
        self.raw_layers = {layer.weight: layer for layer in layers.values() if layer.kind == "raw"}
        self.region_doors = {layer.owner for layer in self.raw_layers.values() if layer.region}
        self.whole_uses: set[str] = set()
        self.cuts: dict[
            tuple[int, int], int
        ] = {}  # (operator, whole tensor) -> dimension of which each rank uses a part
        self.normed: set[str] = set()  # layers over whose split features a norm has summed
        self.attended: set[str] = set()  # layers whose split heads have met in attention
        self.made_in: dict[int, str] = {}  # tensors that the code of a region made
        states: list[State] = [views.get(t.id, Whole()) for t in cls.tensors]
        self.out = Outcome(states, [None] * len(cls.ops))
        self.sizes = sizes_of(cls)

    # what is there

    def state(self, tensor: int) -> State:
        return self.out.states[tensor]

    def splits(self, op: Op) -> list[tuple[int, Split]]:
        """The split inputs of an operator."""
        found = [(t, self.out.states[t]) for t in op.inputs]
        return [(t, s) for t, s in found if isinstance(s, Split)]

    def label(self, op: Op, size: int, what: str = "") -> str:
        return f"{op.fqn.strip('/') or self.cls.module_type} ({size}{what})"

    def region(self, op: Op) -> str | None:
        """The region in which an operator runs, if its weights are split."""
        for door in self.region_doors:
            if inside(op.fqn, door) and door in self.out.regions:
                return door
        return None

    # what a rule says

    def limit(self, sources: frozenset[str], size: int, label: str) -> None:
        """tp must divide `size`."""
        if size == 1:
            raise Conflict(sources, "there is only one part to give")
        self.out.limits.append((sources, size, label))

    def mark(self, op: Op, how: str) -> None:
        """tp divides the work of `op`."""
        self.out.op_split[op.index] = how

    def collective(self, op: Op, phase: str, kind: str, tensor: int) -> None:
        n_bytes = tensor_bytes(self.cls.tensors[tensor])
        self.out.collectives.append(Collective(phase, kind, n_bytes, op.fqn, op.repeat))

    def partial_gradient(self, tensor: int, door: str, module: str) -> None:
        """Each rank has a part of the gradient of a whole tensor: they are summed, once for each door."""
        storage = self.cls.tensors[tensor].base
        if self.cls.tensors[storage].requires_grad or self.cls.tensors[tensor].requires_grad:
            self.out.inputs_summed.setdefault((storage, door), module)

    def follow(self, name: str, dim: int, sizes: tuple[int, ...], sources: frozenset[str]) -> None:
        """A raw parameter is split along `dim`, as what it meets."""
        if any(layer.weight == name and layer.kind != "raw" for layer in self.layers.values()):
            raise Conflict(frozenset(), "its weight is used directly too", weight=name)
        known = self.out.raw.setdefault(name, (dim, sizes))
        if known != (dim, sizes):
            if name in self.raw_layers:
                raise Conflict(frozenset({self.raw_layers[name].fqn}), "its uses would need different splits")
            raise Conflict(frozenset(), "its uses would need different splits", keep=name)

    def segments_of(self, weight: Weight, dim: int) -> tuple[int, ...]:
        """Sizes of the equal segments along dimension `dim` of the parameter out of which a weight is cut."""
        stored = next(t for t in self.cls.tensors if t.kind == "parameter" and self.views[t.id].name == weight.name)
        return (weight.segment,) * (round(stored.shape[dim].at(1)) // weight.segment)

    def used_whole(self, weight: Weight, reason: str, own: bool = False) -> None:
        """A parameter is read whole: no layer may split it."""
        self.whole_uses.add(weight.name)
        if not own and self.sharded(weight.name):
            raise Conflict(frozenset(), reason, weight=weight.name)

    def smaller(self, one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
        """Which of two groups of layers to give up: the one with fewer parameters."""
        if not other:
            return one
        weigh = {side: sum(self.layers[f].numel for f in side if f in self.layers) for side in (one, other)}
        return one if weigh[one] < weigh[other] else other

    def leave_region(self, op: Op, tensor: int) -> None:
        """Sum a partial tensor at the door of its region; nothing else may leave one."""
        state = self.out.states[tensor]
        if isinstance(state, Partial):
            if inside(op.fqn, state.door):
                return
            self.sum_partial(tensor, state)
            return
        door = self.made_in.get(tensor, "")
        if not door or inside(op.fqn, door) or door not in self.out.regions:
            return
        if isinstance(state, Split):
            raise Conflict(state.sources, "its module returns it split")
        made = self.cls.tensors[tensor]
        if isinstance(state, Whole) and made.dtype.startswith(("float", "bfloat")) and made.kind == "activation":
            raise Conflict(self.of_region(door), "its module also returns what is no sum of the parts")

    def sum_partial(self, tensor: int, state: Partial) -> None:
        n_bytes = tensor_bytes(self.cls.tensors[tensor])
        self.out.collectives.append(Collective("forward", "all_reduce", n_bytes, state.door))
        self.out.states[tensor] = Whole(state.sources)

    def of_region(self, door: str) -> frozenset[str]:
        """The layers of a region."""
        return frozenset(layer.fqn for layer in self.raw_layers.values() if layer.region and layer.owner == door)


def inside(fqn: str, door: str) -> bool:
    """Whether a module is `door` or below it."""
    return fqn == door or fqn.startswith(f"{door}.") or not door


def sizes_of(cls: UnitClass) -> Sequence[tuple[int, ...]]:
    """Shapes of all tensors at the probing microbatch size."""
    return [tuple(round(d.at(PROBE)) for d in t.shape) for t in cls.tensors]
