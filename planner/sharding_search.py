"""The search for styles: try col everywhere, give way where a split cannot go on, until all is consistent.

Every linear layer starts as a candidate for col, every large embedding for vocab. Each class is interpreted
(`sharding_rules.py`); the layers that a conflict names change their style (col -> packed, gather or replicate) and
the class is interpreted again. Rules that span classes follow: tied weights, one loss, parts that
divide. Each change goes one way, so this ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from .graph import ModelGraph, UnitClass
from .sharding_layers import layers_of
from .sharding_rules import Interpreter
from .sharding_states import Conflict, Decision, Layer, Outcome, Weight, absolute
from .sharding_views import parameter_views
from .sharding_walk import inside

_VOCAB_DEGREES = 8  # a vocabulary is split only if every other legal degree up to this divides it
_SMALL_OUTPUT = 16  # an output is gathered if the weight is so many times larger than it (for one sample)
_MOST_RESETS = 8  # per layer of a class
_MINOR_SHARE = 0.05  # layers below this share of the parameters, and below the next
_MINOR_WORK = 0.15  # share of the FLOPs, may not narrow the choice of tp

Key = tuple[int, str]  # class index, module FQN relative to the unit


@dataclass(slots=True)
class Search:
    """The state of one analysis: the layers of each class, and what is tried for each."""

    graph: ModelGraph
    views: list[dict[int, Weight]] = field(default_factory=list)
    opaque: list[set[str]] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    layers: list[dict[str, Layer]] = field(default_factory=list)
    order: list[dict[str, int]] = field(default_factory=list)
    decisions: dict[Key, Decision] = field(default_factory=dict)
    initial: dict[Key, Decision] = field(default_factory=dict)
    why: dict[Key, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    settled: set[Key] = field(default_factory=set)  # decided by a rule that spans classes
    resets: int = 0
    gather_all: bool = False  # any linear or convolution may have its output gathered

    def run(self) -> None:
        """Interpret, settle what spans classes, repeat until nothing changes."""
        self._collect()
        while True:
            before, kept = dict(self.decisions), len(self.kept)
            self.outcomes = [self._interpret(index) for index in range(len(self.graph.classes))]
            if self.decisions == before and len(self.kept) == kept and not self._settle():
                return

    # what there is

    def _collect(self) -> None:
        """Candidates: linears and embeddings whose weight is their own and is used by their own operator."""
        self.aliases = {name: group[0] for group in self.graph.tied for name in group}
        first = {u.class_index: u.fqn for u in reversed(self.graph.units)}
        self.prefix = [first.get(index, "") for index in range(len(self.graph.classes))]
        for cls, prefix in zip(self.graph.classes, self.prefix, strict=True):
            names = [absolute(prefix, t.fqn) if t.kind == "parameter" else "" for t in cls.tensors]
            self.views.append(parameter_views(cls, names))
            self.opaque.append(self._opaque_in(cls))
            found = layers_of(self.graph, cls, prefix, self.views[-1], self.aliases)
            self.layers.append({layer.fqn: layer for layer in found if not self._is_opaque(cls, layer)})
        largest = self._largest_embedding()
        for index, layers in enumerate(self.layers):
            for fqn, layer in layers.items():
                style = "col"
                if layer.kind == "embedding":
                    style = "vocab" if 2 * layer.numel >= largest else "replicate"
                self.decisions[index, fqn] = Decision(style)
            self.order.append({fqn: place for place, fqn in enumerate(layers)})
        self.initial = dict(self.decisions)

    def _opaque_in(self, cls: UnitClass) -> set[str]:
        """Opaque modules inside the units of a class, relative to them; "" if a whole unit is."""
        found: set[str] = set()
        for unit in self.graph.units:
            if unit.class_index == cls.index:
                for fqn, *_ in self.graph.opaque:
                    if inside(unit.fqn, fqn):
                        found.add("")
                    elif inside(fqn, unit.fqn):
                        found.add(fqn[len(unit.fqn) :].strip("."))
        return found

    def _is_opaque(self, cls: UnitClass, layer: Layer) -> bool:
        found = any(inside(layer.owner, part) for part in self.opaque[cls.index])
        if found:
            self.why[cls.index, layer.fqn] = "it is an opaque part"
        return found

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
            walk = Interpreter(cls, layers, mine, self._is_split, self.views[index], self.kept, self.opaque[index])
            try:
                return walk.run()
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
            keys = self._groups().get(self.aliases.get(weight, weight), [])
            found += [key for key in keys if weight == name or self.layers[key[0]][key[1]].kind != "raw"]
        return found

    def _yield(self, index: int, conflict: Conflict) -> None:
        """Change the style of the layers that a conflict names."""
        keys = [(index, fqn) for fqn in sorted(conflict.modules)]
        changed = [self._give_up(key, conflict.reason, conflict.packed) for key in keys]
        if any(changed):
            self._try_again_behind(index, [key for key, moved in zip(keys, changed, strict=True) if moved])
        if conflict.weight:
            for key in self._owners(conflict.weight):
                self._replicate(key, conflict.reason)
                changed.append(True)
        if conflict.keep and conflict.keep not in self.kept:
            self.kept.add(conflict.keep)
            changed.append(True)
        if not any(changed):
            raise AssertionError(f"{conflict} changes nothing")

    def _try_again_behind(self, index: int, changed: list[Key]) -> None:
        """Layers that run after those that changed may have given way to a split that is no more: col again.

        Only later layers are tried again, so this ends; the count guards against a long search in large units.
        """
        order = self.order[index]
        first = min(order[fqn] for _, fqn in changed)
        for fqn in self.layers[index]:
            key = (index, fqn)
            again = order[fqn] > first and key not in self.settled
            if again and self.decisions[key] != self.initial[key] and self.resets < _MOST_RESETS * len(order):
                self.decisions[key] = self.initial[key]
                self.resets += 1

    def _give_up(self, key: Key, reason: str, packed: tuple[int, ...] = ()) -> bool:
        """Move one layer to the next style: col, then packed or gather if they fit, then replicate."""
        decision = self.decisions[key]
        if decision.style == "replicate":
            return False
        if packed and decision.style == "col" and all(size > 1 for size in packed):
            self.decisions[key] = Decision("packed", packed)
        elif decision.style in ("col", "packed") and self._gathers(key):
            self.decisions[key] = Decision("gather")
        else:
            self.decisions[key] = Decision("replicate")
            self.why.setdefault(key, reason)
        return True

    def _gathers(self, key: Key) -> bool:
        """Whether a linear layer is worth sharding although its output must be gathered: far smaller, or a head."""
        layer = self.layers[key[0]][key[1]]
        if self.gather_all and layer.kind in ("linear", "convolution"):
            return True
        if layer.kind != "linear":
            return False
        return _SMALL_OUTPUT * layer.out_per_sample <= layer.numel or self._is_head(key)

    def _is_head(self, key: Key) -> bool:
        """Whether a layer is worth sharding although its output must be gathered: a vocabulary head."""
        layer = self.layers[key[0]][key[1]]
        tied = self._groups()[self.aliases.get(layer.weight, layer.weight)]
        if any(self.layers[i][f].kind == "embedding" and self.decisions[i, f].style == "vocab" for i, f in tied):
            return True
        linears = [fqn for fqn, other in self.layers[key[0]].items() if other.kind == "linear"]
        alone = sum(unit.class_index == key[0] for unit in self.graph.units) == 1
        last = alone and self.graph.units[-1].class_index == key[0] and linears[-1:] == [key[1]]
        return last and (layer.numel >= _MINOR_SHARE * self.total() or 2 * layer.numel >= self._largest_embedding())

    def _largest_embedding(self) -> float:
        """Parameters of the largest embedding (infinite if there is none, so that nothing is compared with it)."""
        found = [layer.numel for layers in self.layers for layer in layers.values() if layer.kind == "embedding"]
        return max(found, default=math.inf)

    def total(self) -> int:
        seen = {self.aliases.get(n, n): p.numel for n, p in self.graph.parameters.items() if not p.is_buffer}
        return sum(seen.values())

    # what spans classes

    def _settle(self) -> bool:
        """One rule at a time: tied layers agree, the loss is all parallel or not at all, parts divide."""
        before, kept = dict(self.decisions), len(self.kept)
        rules = (
            self._ties,
            self._raw_agree,
            self._shared_modules,
            self._one_loss,
            self._small_losses,
            self._whole_parts,
            self._vocabulary,
            self._minor,
        )
        for rule in rules:
            rule()
            if self.decisions != before or len(self.kept) != kept:
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

    def _raw_agree(self) -> None:
        """A raw parameter that several classes read must be split alike in all of them."""
        for index, outcome in enumerate(self.outcomes):
            for name, split in outcome.raw.items():
                for other, views in enumerate(self.views):
                    reads = other != index and any(w.name == name for w in views.values())
                    if reads and self.outcomes[other].raw.get(name) != split:
                        self.kept.add(name)
                        for key in self._owners(name):
                            self._replicate(key, "the parts of the model that share it cannot be split alike")

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
        self.settled.add(key)
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

    def _flops(self, key: Key) -> float:
        """Forward FLOPs of a layer over all units of its class, for one sample."""
        return self.layers[key[0]][key[1]].flops * sum(unit.class_index == key[0] for unit in self.graph.units)

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
        common = math.gcd(*(c[2] for c in rest))
        most = 2 * sum(c[0] for c in rest) < self.total()
        for _, members, size in components if rest else []:
            if most and math.gcd(size, common) > 1:
                continue
            wanted = [d for d in range(2, _VOCAB_DEGREES + 1) if common % d == 0]
            if self._is_vocabulary(members) and (any(size % d for d in wanted) or math.gcd(size, common) == 1):
                for key in members:
                    self._replicate(key, f"tp = {', '.join(map(str, wanted))} do not all divide {size}")

    def _minor(self) -> None:
        """Give up layers of the body that would narrow the choice of tp: few parameters, and little work."""
        body = [c for c in self._components() if not self._is_vocabulary(c[1])]
        total, common = sum(c[0] for c in body), 0
        work = sum(self._flops(key) for c in body for key in c[1])
        for numel, members, size in sorted(body, key=lambda c: (-c[0], sorted(c[1]))):
            narrower = math.gcd(common, size)
            lost = any(common % d == 0 and narrower % d for d in range(2, _VOCAB_DEGREES + 1))
            minor = numel < _MINOR_SHARE * total and sum(map(self._flops, members)) < _MINOR_WORK * work
            if common and lost and minor:
                for key in members:
                    self._replicate(key, f"its {size} parts would limit tp")
            else:
                common = narrower
