"""Which tensor-parallel layout a traced model allows: a style for each layer, found from its operators alone.

Every linear layer starts as a candidate for col, every large embedding for vocab. Each class is interpreted
(`sharding_rules.py`); where a split cannot go on, the layers to blame change their style (col -> packed, gather or
replicate) and the class is interpreted again, until all splits end in row layers or in the loss. Each change goes
one way, so this ends. The residual stream between units stays whole (no sequence parallelism yet).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..units import DTYPE_BYTES
from .graph import ModelGraph, Op, UnitClass
from .sharding_rules import Collective, Conflict, Decision, Interpreter, Layer, Outcome, Split

_VOCAB_DEGREES = 8  # a vocabulary is split only if every other legal degree up to this divides it
_MINOR_SHARE = 0.05  # layers below this share of the parameters may not narrow the choice of tp
_TOP_DEGREE = 1024
_REASONS = 6  # layers that stay whole and are named

Key = tuple[int, str]  # class index, module FQN relative to the unit


@dataclass(frozen=True, slots=True)
class Style:
    """How tp treats one module; the fields of plan.json's `ModuleStyle`."""

    style: str
    sizes: tuple[int, ...] = ()
    output: str = "replicate"


@dataclass(frozen=True, slots=True)
class ClassSharding:
    """What tp does to one unit class.

    op_split[i] : None, or what tp divides in operator i: "n" (col), "k" (row), "heads", "batch", "elements"
    tensor_split[t] : whether each rank holds 1/tp of tensor t
    collectives : tp collectives of one unit call, whole-tensor bytes, module FQN relative to the unit
    """

    op_split: tuple[str | None, ...]
    tensor_split: tuple[bool, ...]
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True)
class Sharding:
    """The tensor-parallel layout of a model; the same styles serve every allowed degree.

    styles : style of each sharded module, by absolute FQN
    attention : modules that attend on split heads
    parameter_split : dimension that tp divides, by parameter name (all names of tied ones); whole ones are absent
    parts : sizes that tp must divide, with what they belong to
    reasons : for people: what limits the degrees, which large layers stay whole and why
    sharded_share : share of the parameter bytes that tp divides
    """

    classes: tuple[ClassSharding, ...]
    styles: Mapping[str, Style]
    attention: frozenset[str]
    loss_parallel: bool
    parameter_split: Mapping[str, int]
    parts: tuple[tuple[int, str], ...]
    reasons: tuple[str, ...]
    sharded_share: float

    def of_class(self, index: int) -> ClassSharding:
        """What tp does to class `index`."""
        return self.classes[index]

    def degrees_allowed(self, max_tp: int) -> list[int]:
        """Degrees up to `max_tp` that divide every part; 1 alone if less than half of the bytes would be divided."""
        if self.sharded_share < 0.5 or not self.parts:
            return [1]
        common = math.gcd(*(size for size, _ in self.parts))
        return [d for d in range(1, min(max_tp, common, _TOP_DEGREE) + 1) if common % d == 0]


def analyse(graph: ModelGraph) -> Sharding:
    """Find the tensor-parallel layout of a traced model."""
    return _Search(graph).run()


@dataclass(slots=True)
class _Search:
    """The state of one analysis: the layers of each class, and what is tried for each."""

    graph: ModelGraph
    names: list[list[str]] = field(default_factory=list)
    layers: list[dict[str, Layer]] = field(default_factory=list)
    decisions: dict[Key, Decision] = field(default_factory=dict)
    why: dict[Key, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> Sharding:
        """Interpret, settle what spans classes, repeat until nothing changes."""
        self._collect()
        while True:
            before = dict(self.decisions)
            self.outcomes = [self._interpret(index) for index in range(len(self.graph.classes))]
            if self.decisions == before and not self._settle():
                break
        return self._result()

    # what there is

    def _collect(self) -> None:
        """Candidates: linears and embeddings whose weight is their own and is used by their own operator."""
        self.aliases = {name: group[0] for group in self.graph.tied for name in group}
        first = {u.class_index: u.fqn for u in reversed(self.graph.units)}
        self.prefix = [first.get(index, "") for index in range(len(self.graph.classes))]
        for cls, prefix in zip(self.graph.classes, self.prefix, strict=True):
            names = [absolute(prefix, t.fqn) if t.kind in ("parameter", "buffer") else "" for t in cls.tensors]
            self.names.append(
                [name if t.kind == "parameter" else "" for name, t in zip(names, cls.tensors, strict=True)]
            )
            self.layers.append(dict(self._layers_of(cls, prefix, self.names[-1])))
        largest = self._largest_embedding()
        for index, layers in enumerate(self.layers):
            for fqn, layer in layers.items():
                style = "col"
                if layer.kind == "embedding":
                    style = "vocab" if 2 * layer.numel >= largest else "replicate"
                self.decisions[index, fqn] = Decision(style)

    def _layers_of(self, cls: UnitClass, prefix: str, names: Sequence[str]) -> Iterable[tuple[str, Layer]]:
        transposed: dict[int, int] = {}
        for op in cls.ops:
            if op.name in ("aten.t.default", "aten.transpose.int") and names[op.inputs[0]]:
                transposed[op.outputs[0]] = op.inputs[0]
            kind = {"aten.mm.default": "linear", "aten.addmm.default": "linear"}.get(op.name)
            kind = "embedding" if op.name == "aten.embedding.default" else kind
            if kind is None or op.fqn.startswith("/"):
                continue
            used = op.inputs[0] if kind == "embedding" else _weight_operand(op)
            stored = transposed.get(used, used)
            # Hugging Face's Conv1D keeps its weight as (in, out) and multiplies without transposing it.
            if not names[stored] or (kind == "linear" and used == stored and op.module_type != "Conv1D"):
                continue
            if not self._owns(absolute(prefix, op.fqn), names[stored], kind):
                continue
            shape = tuple(round(d.at(1)) for d in cls.tensors[stored].shape)
            out = shape[1] if op.module_type == "Conv1D" else shape[0]
            yield op.fqn, Layer(op.fqn, names[stored], kind, out, math.prod(shape))

    def _owns(self, module: str, weight: str, kind: str) -> bool:
        """Whether `weight` is the module's .weight (or tied to it), and nothing but a bias stands beside it."""
        own = f"{module}.weight".lstrip(".")
        if self.aliases.get(own, own) != self.aliases.get(weight, weight):
            return False
        beside = {
            name.rpartition(".")[2]
            for name, p in self.graph.parameters.items()
            if name.rpartition(".")[0] == module and not p.is_buffer
        }
        return beside <= ({"weight", "bias"} if kind == "linear" else {"weight"})

    def _groups(self) -> dict[str, list[Key]]:
        """Layers by the canonical name of their weight: tied layers, and layers that several classes run."""
        groups: dict[str, list[Key]] = {}
        for index, layers in enumerate(self.layers):
            for fqn, layer in layers.items():
                groups.setdefault(self.aliases.get(layer.weight, layer.weight), []).append((index, fqn))
        return groups

    # interpretation

    def _interpret(self, index: int) -> Outcome:
        cls, layers = self.graph.classes[index], self.layers[index]
        while True:
            mine = {fqn: self.decisions[index, fqn] for fqn in layers}
            try:
                return Interpreter(cls, layers, mine, self._is_split, self.names[index]).run()
            except Conflict as conflict:
                self._yield(index, conflict)

    def _is_split(self, parameter: str) -> bool:
        """Whether some layer splits a parameter (a bias follows its weight)."""
        return any(self.decisions[key].style != "replicate" for key in self._owners(parameter))

    def _owners(self, parameter: str) -> list[Key]:
        """The layers whose weight or bias a parameter is."""
        names = {n for n, first in self.aliases.items() if first == self.aliases.get(parameter)} | {parameter}
        found = []
        for name in names:
            weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
            found += self._groups().get(self.aliases.get(weight, weight), [])
        return found

    def _yield(self, index: int, conflict: Conflict) -> None:
        """Change the style of the layers that a conflict names."""
        keys = [(index, fqn) for fqn in sorted(conflict.modules)]
        changed = [self._give_up(key, conflict.reason, conflict.packed) for key in keys]
        if conflict.weight:
            for key in self._owners(conflict.weight):
                self._replicate(key, conflict.reason)
                changed.append(True)
        if not any(changed):
            raise AssertionError(f"{conflict} changes nothing")

    def _give_up(self, key: Key, reason: str, packed: tuple[int, ...] = ()) -> bool:
        """Move one layer to the next style: col, then packed or gather if they fit, then replicate."""
        decision = self.decisions[key]
        if decision.style == "replicate":
            return False
        if packed and decision.style == "col" and all(size > 1 for size in packed):
            self.decisions[key] = Decision("packed", packed)
        elif decision.style == "col" and self._is_head(key):
            self.decisions[key] = Decision("gather")
        else:
            self.decisions[key] = Decision("replicate")
            self.why[key] = reason
        return True

    def _is_head(self, key: Key) -> bool:
        """Whether a layer is worth sharding although its output must be gathered: a vocabulary head."""
        layer = self.layers[key[0]][key[1]]
        tied = self._groups()[self.aliases.get(layer.weight, layer.weight)]
        if any(self.layers[i][f].kind == "embedding" and self.decisions[i, f].style == "vocab" for i, f in tied):
            return True
        linears = [fqn for fqn, other in self.layers[key[0]].items() if other.kind == "linear"]
        last = self.graph.units[-1].class_index == key[0] and linears[-1:] == [key[1]]
        return last and (layer.numel >= _MINOR_SHARE * self._total() or 2 * layer.numel >= self._largest_embedding())

    def _largest_embedding(self) -> float:
        """Parameters of the largest embedding (infinite if there is none, so that nothing is compared with it)."""
        found = [layer.numel for layers in self.layers for layer in layers.values() if layer.kind == "embedding"]
        return max(found, default=math.inf)

    def _total(self) -> int:
        seen = {self.aliases.get(n, n): p.numel for n, p in self.graph.parameters.items() if not p.is_buffer}
        return sum(seen.values())

    # what spans classes

    def _settle(self) -> bool:
        """One rule at a time: tied layers agree, the loss is all parallel or not at all, parts divide."""
        before = dict(self.decisions)
        rules = (
            self._ties,
            self._shared_modules,
            self._one_loss,
            self._small_losses,
            self._whole_parts,
            self._vocabulary,
            self._minor,
        )
        for rule in rules:
            rule()
            if self.decisions != before:
                return True
        return False

    def _split_dim(self, key: Key) -> int | None:
        """Which dimension of the (out, in) weight this layer splits."""
        if key[1] in self.outcomes[key[0]].rows:
            return 1
        return None if self.decisions[key].style == "replicate" else 0

    def _ties(self) -> None:
        for keys in self._groups().values():
            wanted = {(self._split_dim(k), self.decisions[k].sizes) for k in keys}
            if len(wanted) > 1:
                for key in keys:
                    self._replicate(key, "the layers that share its weight cannot be split alike")

    def _shared_modules(self) -> None:
        """A row layer in one call and a col layer in another cannot be both."""
        for index, outcome in enumerate(self.outcomes):
            for fqn in outcome.rows.keys() & outcome.columns:
                self._replicate((index, fqn), "its calls would need different splits")

    def _one_loss(self) -> None:
        if any(o.whole_loss for o in self.outcomes):
            for index, outcome in enumerate(self.outcomes):
                for fqn in outcome.loss:
                    self._give_up((index, fqn), "the model has another loss on whole tensors")

    def _small_losses(self) -> None:
        for index, outcome in enumerate(self.outcomes):
            for fqn in outcome.loss:
                if not self._is_head((index, fqn)):
                    self._replicate((index, fqn), "too small to be worth it")

    def _replicate(self, key: Key, reason: str) -> None:
        self.decisions[key] = Decision("replicate")
        self.why.setdefault(key, reason)

    def _components(self) -> list[tuple[int, set[Key], int]]:
        """Layers that must be split together: (parameters over all units, layers, common divisor of the parts)."""
        found: list[tuple[set[Key], int]] = []
        for index, outcome in enumerate(self.outcomes):
            for sources, size, _ in outcome.limits:
                members, common = {(index, fqn) for fqn in sources}, size
                for other in [pair for pair in found if pair[0] & members]:
                    found.remove(other)
                    members, common = members | other[0], math.gcd(common, other[1])
                found.append((members, common))
        return [(sum(self._numel(key) for key in members), members, common) for members, common in found]

    def _numel(self, key: Key) -> int:
        """Parameters of a layer, and of the row layers behind it, over all units of its class."""
        index, fqn = key
        rows = self.outcomes[index].rows
        own = self.layers[index][fqn].numel
        own += sum(self.layers[index][row].numel // len(rows[row]) for row in rows if fqn in rows[row])
        return own * sum(unit.class_index == index for unit in self.graph.units)

    def _whole_parts(self) -> None:
        for _, members, common in self._components():
            if common == 1:
                for key in members:
                    self._replicate(key, "its parts have no common divisor")

    def _is_vocabulary(self, members: Iterable[Key]) -> bool:
        return any(
            self.layers[i][f].kind == "embedding"
            or f in self.outcomes[i].loss
            or self.decisions[i, f].style == "gather"
            for i, f in members
        )

    def _vocabulary(self) -> None:
        """Give a vocabulary up that would narrow the choice of tp, unless it is most of the model."""
        components = self._components()
        rest = [c for c in components if not self._is_vocabulary(c[1])]
        if not rest or 2 * sum(c[0] for c in rest) < self._total():
            return
        common = math.gcd(*(c[2] for c in rest))
        for _, members, size in components:
            wanted = [d for d in range(2, _VOCAB_DEGREES + 1) if common % d == 0]
            if self._is_vocabulary(members) and any(size % d for d in wanted):
                for key in members:
                    self._replicate(key, f"tp = {', '.join(map(str, wanted))} do not all divide {size}")

    def _minor(self) -> None:
        """Give up small layers that would narrow the choice of tp."""
        common = 0
        for numel, members, size in sorted(self._components(), key=lambda c: (-c[0], sorted(c[1]))):
            narrower = math.gcd(common, size)
            lost = any(common % d == 0 and narrower % d for d in range(2, _VOCAB_DEGREES + 1))
            if common and lost and numel < _MINOR_SHARE * self._total():
                for key in members:
                    self._replicate(key, f"its {size} parts would limit tp")
            else:
                common = narrower

    # the answer

    def _result(self) -> Sharding:
        styles: dict[str, Style] = {}
        split: dict[str, int] = {}
        attention: set[str] = set()
        for unit in self.graph.units:
            index, outcome = unit.class_index, self.outcomes[unit.class_index]
            attention |= {absolute(unit.fqn, fqn) for fqn in outcome.attention}
            for fqn in self.layers[index]:
                style = self._style(index, fqn)
                if style is not None:
                    module = absolute(unit.fqn, fqn)
                    styles[module] = style
                    split.update(self._parameters(module, style, self._is_conv1d(index, fqn)))
        for name, canonical in self.aliases.items():
            known = split.get(name, split.get(canonical))
            if known is not None:
                split.update({name: known, canonical: known})
        return Sharding(
            classes=tuple(_class_sharding(o, self.graph.classes[i]) for i, o in enumerate(self.outcomes)),
            styles=styles,
            attention=frozenset(attention),
            loss_parallel=any(o.loss for o in self.outcomes),
            parameter_split=split,
            parts=self._parts(),
            reasons=tuple(self._reasons(split)),
            sharded_share=self._share(split),
        )

    def _style(self, index: int, fqn: str) -> Style | None:
        decision = self.decisions[index, fqn]
        if fqn in self.outcomes[index].rows:
            return Style("row")
        if decision.style == "replicate":
            return None
        if decision.style == "vocab":
            return Style("vocab")
        if decision.style == "gather":
            return Style("col")
        return Style(decision.style, decision.sizes, "shard")

    def _is_conv1d(self, index: int, fqn: str) -> bool:
        ops = self.graph.classes[index].ops
        return any(op.fqn == fqn and op.module_type == "Conv1D" for op in ops)

    def _parameters(self, module: str, style: Style, transposed: bool) -> dict[str, int]:
        weight, bias = f"{module}.weight".lstrip("."), f"{module}.bias".lstrip(".")
        found = {weight: int((style.style == "row") != transposed)}
        known = bias in self.graph.parameters or bias in self.aliases
        if style.style in ("col", "packed") and known:
            found[bias] = 0
        return found

    def _parts(self) -> tuple[tuple[int, str], ...]:
        """The smallest label for each size that tp must divide."""
        parts: dict[int, str] = {}
        for outcome in self.outcomes:
            for _, size, label in outcome.limits:
                if size not in parts or "head" in label:
                    parts[size] = label
        return tuple(sorted(parts.items()))

    def _share(self, split: Mapping[str, int]) -> float:
        total = divided = 0
        for name, p in self.graph.parameters.items():
            if not p.is_buffer and self.aliases.get(name, name) == name:
                n_bytes = p.numel * DTYPE_BYTES[p.dtype]
                total += n_bytes
                divided += n_bytes * (name in split)
        return divided / total if total else 0.0

    def _reasons(self, split: Mapping[str, int]) -> Iterable[str]:
        share, parts = self._share(split), self._parts()
        if share < 0.5:
            yield f"only {share:.0%} of the parameter bytes could be split over tp (half is the least)"
        else:
            common = math.gcd(*(size for size, _ in parts))
            tight = [label for size, label in parts if size == parts[0][0] or size % parts[0][0]]
            yield f"tp must divide {', '.join(tight[:3])}: their common divisor is {common}"
        total, said = self._total(), dict[tuple[str, str], str]()
        for (index, fqn), reason in self.why.items():
            count = sum(u.class_index == index for u in self.graph.units)
            if self._style(index, fqn) is None and self.layers[index][fqn].numel * count >= 0.01 * total:
                said.setdefault((fqn, reason), f"{absolute(self.prefix[index], fqn)} stays whole: {reason}")
        yield from list(said.values())[:_REASONS]


def absolute(prefix: str, fqn: str) -> str:
    """The absolute FQN of a name relative to the unit `prefix` (a leading "/" marks an absolute one).

    >>> absolute("h.0", "attn.c_proj"), absolute("h.0", "/wte.weight"), absolute("", "head")
    ('h.0.attn.c_proj', 'wte.weight', 'head')
    """
    if fqn.startswith("/"):
        return fqn[1:]
    return ".".join(part for part in (prefix, fqn) if part)


def _weight_operand(op: Op) -> int:
    """The tensor on the right of a matrix product."""
    return [a.tensor for a in op.args if hasattr(a, "tensor")][-1]


def _class_sharding(outcome: Outcome, cls: UnitClass) -> ClassSharding:
    return ClassSharding(
        op_split=tuple(outcome.op_split),
        tensor_split=tuple(isinstance(state, Split) for state in outcome.states),
        collectives=tuple(outcome.collectives),
    )
