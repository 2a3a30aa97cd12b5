"""One operator at a time: its rule's claim about a split, and what two ranks would compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tpplan.planner.graph import Affine, Kernel, Op, Ref, Tensor, UnitClass
from tpplan.planner.sharding_rules import Interpreter
from tpplan.planner.sharding_states import Decision, Layer, Partial, Split, State, Weight, Whole

TP = 2
SOURCE = "up"


@dataclass(frozen=True)
class Claim:
    """What the rules say of one call: states of inputs and outputs, and whole inputs that each rank cuts."""

    inputs: list[torch.Tensor]
    states: list[State]
    outputs: list[torch.Tensor]
    results: list[State]
    cuts: Mapping[int, int]
    walk: Interpreter


def claim(
    call: Any,
    args: Sequence[Any],
    splits: Mapping[int, Split],
    weights: Mapping[int, Weight] | None = None,
    module_type: str = "Block",
    layers: Iterable[Layer] = (),
    **kwargs: Any,
) -> Claim:
    """Run the rule of `call(*args)`; `splits` and `weights` by position among the tensors of `args`.

    Raises
    ------
    Conflict
        If the rule does not carry the split.
    """
    inputs: list[torch.Tensor] = []

    def refer(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            inputs.append(value)
            return Ref(len(inputs) - 1)
        if isinstance(value, (list, tuple)):
            return tuple(refer(v) for v in value)
        return value

    referred = tuple(refer(a) for a in args) + tuple(kwargs.items())
    result = call(*args, **kwargs)
    outputs = [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    tensors = tuple(
        Tensor(i, tuple(Affine(n) for n in t.shape), str(t.dtype).removeprefix("torch."), "activation", i)
        for i, t in enumerate([*inputs, *outputs])
    )
    ids = tuple(range(len(inputs), len(tensors)))
    kernel = Kernel("", "memory", Affine(), Affine())
    op = Op(0, str(call), "m", 0, module_type, referred, tuple(range(len(inputs))), ids, kernel)
    zero = Affine()
    cls = UnitClass(0, "Block", (op,), tensors, (), (), ids, zero, zero, zero, zero, zero)
    known = {SOURCE: Layer(SOURCE, "up.weight", "linear", 8, 64), **{layer.fqn: layer for layer in layers}}
    decisions = {fqn: Decision("col") for fqn in known}
    walk = Interpreter(cls, known, decisions, lambda name: False, dict(weights or {}))
    for place, state in splits.items():
        walk.out.states[place] = state
    states = [walk.state(i) for i in range(len(inputs))]
    walk.step(op)
    cuts = {t: d for (_, t), d in walk.cuts.items()}
    return Claim(inputs, states, outputs, [walk.state(t) for t in ids], cuts, walk)


def split(dim: int, outer: int = 1) -> Split:
    return Split(dim, frozenset({SOURCE}), outer=outer)


def part(tensor: torch.Tensor, dim: int, rank: int, outer: int = 1) -> torch.Tensor:
    """What `rank` holds of a tensor that is split along `dim`."""
    if outer == 1:
        return tensor.chunk(TP, dim)[rank].contiguous()
    shape = tensor.shape
    apart = tensor.reshape(*shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])
    return apart.chunk(TP, dim + 1)[rank].reshape(*shape[:dim], shape[dim] // TP, *shape[dim + 1 :])


def local_inputs(found: Claim, rank: int) -> list[torch.Tensor]:
    """The inputs of one rank: its parts of split ones, of whole ones that are cut, of parameters that follow."""
    given = []
    for i, (tensor, state) in enumerate(zip(found.inputs, found.states, strict=True)):
        if isinstance(state, Split):
            given.append(part(tensor, state.dim, rank, state.outer))
        elif isinstance(state, Weight) and state.name in found.walk.out.raw:
            stored, _ = found.walk.out.raw[state.name]
            given.append(part(tensor, state.dims.index(stored), rank))
        elif i in found.cuts:
            given.append(part(tensor, found.cuts[i], rank))
        else:
            given.append(tensor)
    return given


def joined(parts: Sequence[torch.Tensor], state: State) -> torch.Tensor:
    """The whole tensor from what the ranks computed."""
    if isinstance(state, Partial):
        return torch.stack(list(parts)).sum(0)
    if not isinstance(state, Split):
        return parts[0]
    if state.outer == 1:
        return torch.cat(list(parts), state.dim)
    apart = [
        p.reshape(*p.shape[: state.dim], state.outer, p.shape[state.dim] // state.outer, *p.shape[state.dim + 1 :])
        for p in parts
    ]
    whole = torch.cat(apart, state.dim + 1)
    return whole.flatten(state.dim, state.dim + 1)


def assert_legal(found: Claim, run: Any) -> None:
    """`run(inputs, rank)` gives each rank's outputs: joined as claimed, they are those of the whole call."""
    ranks = [run(local_inputs(found, rank), rank) for rank in range(TP)]
    ranks = [[r] if isinstance(r, torch.Tensor) else [t for t in r if isinstance(t, torch.Tensor)] for r in ranks]
    for i, (whole, state) in enumerate(zip(found.outputs, found.results, strict=True)):
        if isinstance(state, Whole) and not whole.is_floating_point():
            continue
        torch.testing.assert_close(joined([r[i] for r in ranks], state), whole, equal_nan=True)


def local_shape(shape: Sequence[int], state: State) -> list[int]:
    """Shape of a rank's part."""
    return [n // TP if isinstance(state, Split) and d == state.dim else n for d, n in enumerate(shape)]
