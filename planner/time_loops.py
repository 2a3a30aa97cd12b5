"""Loops over time steps: the operators that every step repeats are kept once, with how often they run.

A unit traced at several sequence lengths shows which operators belong to a loop: those that run more often at a
longer sequence. Equal operators (name, module, shapes, figures, kinds of what they read, what is kept of them) form
a group; a group whose size follows the length shrinks to its first operator, and a tensor made by any of the
others becomes the one that the first makes. What the first and the last step do otherwise forms groups of its own.

    traced at 5 steps   prefix  a1 b1  a b  a b  a b  a bn  suffix
    traced at 7 steps   prefix  a1 b1  a b  a b  a b  a b  a b  a bn  suffix
    kept                prefix  a1 b1  a x n-1   b x n-2    bn  suffix
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .graph import Affine, Op, Ref, UnitClass


class NotExtendable(Exception):
    """What was traced at several lengths shows no loop that could be extended."""


@dataclass(slots=True)
class _Groups:
    """Equal operators of one class: `members[g]` are the indices of group g, in order of first appearance."""

    cls: UnitClass
    kept: set[int]
    members: list[list[int]] = field(default_factory=list)


def collapse(classes: Sequence[UnitClass]) -> list[UnitClass]:
    """One class as traced at several lengths, with the operators of loops kept once each.

    Raises
    ------
    NotExtendable
        If the lengths disagree about which operators there are, or what is kept cannot be told apart.
    """
    if len({len(cls.ops) for cls in classes}) == 1:
        return list(classes)
    grouped = [_groups(cls) for cls in classes]
    if len({len(g.members) for g in grouped}) > 1:
        raise NotExtendable(f"{classes[0].module_type}: other operators at other lengths")
    sizes = [[len(g.members[i]) for g in grouped] for i in range(len(grouped[0].members))]
    repeated = [i for i, counts in enumerate(sizes) if len(set(counts)) > 1]
    found = [_shrink(g, [g.members[i] for i in repeated]) for g in grouped]
    if len({len(cls.ops) for cls in found}) > 1:
        raise NotExtendable(f"{classes[0].module_type}: other operators at other lengths")
    return found


def _groups(cls: UnitClass) -> _Groups:
    kept = {cls.tensors[t].base for t in cls.saved}
    keys: list[Hashable] = [_key(cls, op, kept) for op in cls.ops]
    producer = {cls.tensors[t].base: op.index for op in reversed(cls.ops) for t in op.outputs}
    for _ in range(2):  # views of storages that differ (the last step's, which nothing reads) differ too
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        groups = [numbers[key] for key in keys]
        keys = [
            (groups[op.index], _distinct(groups[producer[cls.tensors[t].base]] for t in op.outputs)) for op in cls.ops
        ]
    found: dict[Hashable, list[int]] = {}
    for op, key in zip(cls.ops, keys, strict=True):
        found.setdefault(key, []).append(op.index)
    return _Groups(cls, kept, list(found.values()))


def _key(cls: UnitClass, op: Op, kept: set[int]) -> Hashable:
    """What operators of one group share; numbers among the arguments (the step's index) are left out."""
    return (
        op.name,
        op.fqn,
        op.module_type,
        _form(op.args),
        _distinct(_look(cls, t, kept, as_read=True) for t in op.inputs),
        _distinct(_look(cls, t, kept) for t in op.outputs),
        _distinct(_look(cls, t, kept) for t in op.saved),
        op.forward,
        op.backward,
    )


def _distinct(items: Iterable[Hashable]) -> tuple[Hashable, ...]:
    return tuple(dict.fromkeys(items))


def _look(cls: UnitClass, t: int, kept: set[int], as_read: bool = False) -> Hashable:
    """What two tensors must share to be taken for one another."""
    tensor = cls.tensors[t]
    seen = (tensor.shape, tensor.dtype, tensor.kind, tensor.fqn)
    if as_read:
        return seen
    return (*seen, tensor.requires_grad, tensor.strides_contiguous, tensor.storage_bytes, tensor.base in kept)


def _form(value: Any) -> Hashable:
    """The arguments without numbers; lists of tensors and of numbers count as one item each."""
    if isinstance(value, Ref):
        return "tensor"
    if isinstance(value, tuple):
        return _distinct(_form(v) for v in value) if _plain_list(value) else tuple(_form(v) for v in value)
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _plain_list(value: tuple[Any, ...]) -> bool:
    return all(isinstance(v, Ref) for v in value) or all(type(v) is int for v in value)


def _shrink(groups: _Groups, repeated: Sequence[list[int]]) -> UnitClass:
    """The class with each of the `repeated` groups reduced to its first operator."""
    cls, stands = groups.cls, _stands_for(groups, repeated)
    times = {group[0]: len(group) for group in repeated}
    dropped = {index for group in repeated for index in group[1:]}
    renamed = _Renamed(cls, stands)
    ops = tuple(
        replace(
            op,
            index=i,
            call=op.call if op.index not in times else 0,
            args=renamed.args(op.args),
            inputs=renamed.all(op.inputs),
            outputs=renamed.all(op.outputs),
            saved=renamed.all(op.saved),
            repeat=times.get(op.index, 1),
        )
        for i, op in enumerate(op for op in cls.ops if op.index not in dropped)
    )
    found = replace(
        cls,
        ops=ops,
        tensors=renamed.tensors(),
        inputs=renamed.all(cls.inputs),
        outputs=renamed.all(cls.outputs),
        saved=renamed.saved(cls.saved),
    )
    _check(cls, found)
    return found


def _stands_for(groups: _Groups, repeated: Sequence[list[int]]) -> dict[int, int]:
    """Tensor made in a loop -> the tensor that the first step makes in its place."""
    cls, kept = groups.cls, groups.kept
    stands: dict[int, int] = {}
    for group in repeated:
        first = cls.ops[group[0]]
        by_look = {_look(cls, t, kept): t for t in reversed(first.outputs)}
        for index in group[1:]:
            made = cls.ops[index].outputs
            same_place = len(made) == len(first.outputs)
            for place, t in enumerate(made):
                if t in cls.ops[index].inputs:
                    continue
                look = _look(cls, t, kept)
                if same_place and _look(cls, first.outputs[place], kept) == look:
                    stands.setdefault(t, first.outputs[place])
                else:
                    stands.setdefault(t, by_look[look])
    for op in cls.ops:  # an operator that makes one tensor for each step (unbind, split)
        looks: dict[Hashable, list[int]] = {}
        for t in op.outputs:
            looks.setdefault(_look(cls, t, kept), []).append(t)
        for alike in looks.values():
            if len(alike) >= _MANY:
                for t in alike[1:]:
                    stands.setdefault(t, alike[0])
    return stands


_MANY = 5  # equal outputs of one operator that are taken for one output a step (a fused projection has 2 to 4)


class _Renamed:
    """New numbers for the tensors of a shrunk class, by first use."""

    def __init__(self, cls: UnitClass, stands: Mapping[int, int]) -> None:
        self.cls, self.stands = cls, stands
        self.ids: dict[int, int] = {}

    def id(self, t: int) -> int:
        """The new number of the tensor that stands for `t`."""
        while t in self.stands:
            t = self.stands[t]
        return self.ids.setdefault(t, len(self.ids))

    def all(self, tensors: Iterable[int]) -> tuple[int, ...]:
        """New numbers, each once."""
        return tuple(dict.fromkeys(self.id(t) for t in tensors))

    def args(self, value: Any) -> Any:
        """Arguments with new numbers; tensors of a list that became one are listed once."""
        if isinstance(value, Ref):
            return Ref(self.id(value.tensor))
        if not isinstance(value, tuple):
            return value
        if value and all(isinstance(v, Ref) for v in value):
            return tuple(Ref(new) for new in self._merged([v.tensor for v in value]))
        return tuple(self.args(v) for v in value)

    def _merged(self, tensors: Sequence[int]) -> list[int]:
        """New numbers; of different tensors that became one, the first."""
        shown: dict[int, int] = {}
        found = []
        for t in tensors:
            new = self.id(t)
            if shown.setdefault(new, t) == t:
                found.append(new)
        return found

    def saved(self, tensors: Iterable[int]) -> tuple[int, ...]:
        """One tensor for each storage that stays, in order."""
        found: dict[int, int] = {}
        for t in tensors:
            base = self.id(self.cls.tensors[t].base)
            shown = self.id(t)
            found.setdefault(base, shown if self.base_of(shown) == base else base)
        return tuple(found.values())

    def base_of(self, new: int) -> int:
        """The new number of the tensor that owns the storage of tensor `new`."""
        old = next(o for o, n in self.ids.items() if n == new)
        return self.id(self.cls.tensors[old].base)

    def tensors(self) -> tuple[Any, ...]:
        """The tensors that are left, with how many each stands for."""
        bases = {old: self.id(self.cls.tensors[old].base) for old in tuple(self.ids)}
        while len(bases) < len(self.ids):  # a storage's first tensor that no operator left reads
            bases = {old: self.id(self.cls.tensors[old].base) for old in tuple(self.ids)}
        alike: dict[int, list[int]] = {}
        for tensor in self.cls.tensors:
            old = tensor.id
            while old in self.stands:
                old = self.stands[old]
            if old in self.ids:
                alike.setdefault(old, []).append(tensor.id)
        found = []
        for old, new in self.ids.items():
            own = sum(self.cls.tensors[t].base == t for t in alike[old])
            found.append(replace(self.cls.tensors[old], id=new, base=bases[old], repeat=max(own, 1)))
        return tuple(found)


def _check(before: UnitClass, after: UnitClass) -> None:
    """The shrunk class has the figures of the whole one."""
    saved, forward, backward = Affine(), Affine(), Affine()
    for t in after.saved:
        base = after.tensors[after.tensors[t].base]
        saved += base.storage_bytes.scaled(base.repeat)
    for op in after.ops:
        forward += op.forward_flops
        backward += op.backward_flops
    if (saved, forward, backward) != (before.saved_bytes, before.flops_forward, before.flops_backward):
        raise NotExtendable(f"{before.module_type}: steps of its loop differ")
