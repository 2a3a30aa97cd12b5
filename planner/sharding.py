"""Which tensor-parallel layout a traced model allows: a style for each layer, found from its operators alone.

The search is in `sharding_search.py`, the rules of the operators in `sharding_rules.py` and `sharding_shapes.py`.
The residual stream between units stays whole; `sharding_sequence.py` finds whether it could be split too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..units import DTYPE_BYTES
from .graph import ModelGraph, UnitClass
from .sharding_search import Search
from .sharding_sequence import ClassSequence, SequenceParallel, sequence_parallel
from .sharding_states import Collective, Outcome, Split, absolute
from .sharding_styles import Style, is_split, unit_styles

_TOP_DEGREE = 1024
_NO_SEQUENCE = SequenceParallel(False)
_ENOUGH = 0.5  # of the parameter bytes, for tp to be worth its communication
_REASONS = 6  # layers that stay whole and are named


@dataclass(frozen=True, slots=True)
class ClassSharding:
    """What tp does to one unit class.

    op_split[i] : None, or what tp divides in operator i: "n" (col), "k" (row), "heads", "batch", "elements"
    tensor_split[t] : whether each rank holds 1/tp of tensor t
    collectives : tp collectives of one unit call, whole-tensor bytes, module FQN relative to the unit
    gradient_sums : all-reduces over tp of the gradients of whole weights that see 1/tp of the tokens, paid whenever
        gradients are reduced over data-parallel ranks (module: the weight's name in the class's first unit)
    gathered : tensors that rank holds whole though the stream is split: what projections keep of what they gathered
    """

    op_split: tuple[str | None, ...]
    tensor_split: tuple[bool, ...]
    collectives: tuple[Collective, ...]
    gradient_sums: tuple[Collective, ...] = ()
    gathered: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Sharding:
    """The tensor-parallel layout of a model; the same styles serve every allowed degree.

    styles : style of each sharded module, by absolute FQN
    attention : modules that attend on split heads
    parameter_split : dimension that tp divides, by parameter name (all names of tied ones); whole ones are absent
    parts : sizes that tp must divide, with what they belong to
    reasons : for people: what limits the degrees, which large layers stay whole and why
    sharded_share : share of the parameter bytes that tp divides
    whole : why each layer that could hold a split stays whole, by absolute FQN
    sequence : whether the stream between row and col layers may be split along its tokens too, and whose work that is
    stream_split : whether this is the variant whose stream is split
    """

    classes: tuple[ClassSharding, ...]
    styles: Mapping[str, Style]
    attention: frozenset[str]
    loss_parallel: bool
    parameter_split: Mapping[str, int]
    parts: tuple[tuple[int, str], ...]
    reasons: tuple[str, ...]
    sharded_share: float
    sequence: SequenceParallel = _NO_SEQUENCE
    whole: Mapping[str, str] = field(default_factory=dict)
    stream_split: bool = False

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms, dropouts and residual sums may run on 1/tp of the tokens."""
        return self.sequence.possible

    def of_class(self, index: int) -> ClassSharding:
        """What tp does to class `index`."""
        return self.classes[index]

    def degrees_allowed(self, max_tp: int) -> list[int]:
        """Degrees up to `max_tp` that divide every part; 1 alone if less than half of the bytes would be divided."""
        if self.sharded_share < _ENOUGH or not self.parts:
            return [1]
        common = math.gcd(*(size for size, _ in self.parts))
        return [d for d in range(1, min(max_tp, common, _TOP_DEGREE) + 1) if common % d == 0]


def analyse(graph: ModelGraph) -> Sharding:
    """Find the tensor-parallel layout of a traced model."""
    search = Search(graph)
    search.run()
    found = _sharding(search)
    if found.sharded_share >= _ENOUGH or not found.whole:
        return found
    wider = Search(graph, gather_all=True)
    wider.run()
    gathered = _sharding(wider)
    if gathered.sharded_share < _ENOUGH:
        return found
    why = [r.replace("stays whole", "has its output gathered") for r in found.reasons[1:]]
    return replace(gathered, reasons=(f"outputs are gathered, because {found.reasons[0]}", *why, *gathered.reasons))


def with_sequence_parallel(graph: ModelGraph, sharding: Sharding) -> Sharding | None:
    """The layout with the stream between row and col layers split along its tokens; None where that is not possible.

    Row layers scatter their sums (style output "sequence"), projections gather what they read, and everything
    between runs on, and keeps, 1/tp of the tokens, which tp must divide. Modules that cannot run on a part of them
    run whole (output "sequence" too: it is cut). The split of the parameters is the same.
    """
    found = sharding.sequence
    if not found.possible:
        return None
    classes = list(sharding.classes)
    for index, change in found.classes.items():
        classes[index] = _with_stream(classes[index], change, graph.classes[index])
    marked = sorted(found.scattered | found.islands)
    scattered = {fqn: replace(sharding.styles.get(fqn, Style("replicate")), output="sequence") for fqn in marked}
    return replace(
        sharding,
        classes=tuple(classes),
        styles={**sharding.styles, **scattered},
        parts=(*sharding.parts, (found.tokens, f"the stream ({found.tokens} tokens)")),
        stream_split=True,
    )


def _with_stream(own: ClassSharding, change: ClassSequence, cls: UnitClass) -> ClassSharding:
    streams = change.streams - change.gathered
    return ClassSharding(
        op_split=tuple("elements" if how is None and i in change.works else how for i, how in enumerate(own.op_split)),
        tensor_split=tuple(split or t.id in streams for split, t in zip(own.tensor_split, cls.tensors, strict=True)),
        collectives=change.collectives,
        gradient_sums=change.gradient_sums,
        gathered=change.gathered,
    )


def _sharding(search: Search) -> Sharding:
    """What the search found, in the planner's terms."""
    styles: dict[str, Style] = {}
    split: dict[str, int] = {}
    attention: set[str] = set()
    for unit in search.graph.units:
        outcome = search.outcomes[unit.class_index]
        attention |= {absolute(unit.fqn, fqn) for fqn in outcome.attention}
        for module, style, parameters in unit_styles(search, unit):
            styles[module] = style
            split.update(parameters)
    for name, canonical in search.aliases.items():
        known = split.get(name, split.get(canonical))
        if known is not None:
            split.update({name: known, canonical: known})
    return Sharding(
        classes=tuple(_class_sharding(o, search.graph.classes[i]) for i, o in enumerate(search.outcomes)),
        styles=styles,
        attention=frozenset(attention),
        loss_parallel=any(o.loss for o in search.outcomes),
        parameter_split=split,
        parts=_parts(search),
        reasons=tuple(_reasons(search, split)),
        sharded_share=_share(search, split),
        sequence=sequence_parallel(search),
        whole=dict(_whole(search)),
    )


def _parts(search: Search) -> tuple[tuple[int, str], ...]:
    """The smallest label for each size that tp must divide."""
    parts: dict[int, str] = {}
    for outcome in search.outcomes:
        for _, size, label in outcome.limits:
            if size not in parts or "head" in label:
                parts[size] = label
    return tuple(sorted(parts.items()))


def _share(search: Search, split: Mapping[str, int]) -> float:
    total = divided = 0
    for name, p in search.graph.parameters.items():
        if not p.is_buffer and search.aliases.get(name, name) == name:
            n_bytes = p.numel * DTYPE_BYTES[p.dtype]
            total += n_bytes
            divided += n_bytes * (name in split)
    return divided / total if total else 0.0


def _reasons(search: Search, split: Mapping[str, int]) -> Iterable[str]:
    share, parts = _share(search, split), _parts(search)
    if share < _ENOUGH:
        yield f"only {share:.0%} of the parameter bytes could be split over tp (half is the least)"
    else:
        common = math.gcd(*(size for size, _ in parts))
        tight = [label for size, label in parts if size == parts[0][0] or size % parts[0][0]]
        yield f"tp must divide {', '.join(tight[:3])}: their common divisor is {common}"
    total, said = search.total(), dict[tuple[str, str], str]()
    for (index, fqn), reason in search.why.items():
        count = sum(u.class_index == index for u in search.graph.units)
        layer = search.layers[index].get(fqn)
        if layer is not None and not is_split(search, index, layer) and layer.numel * count >= 0.01 * total:
            said.setdefault((fqn, reason), f"{_name(search.prefix[index], fqn)} stays whole: {reason}")
    yield from list(said.values())[:_REASONS]
    yield from list(dict.fromkeys(_without_rule(search, split)))[:_REASONS]


def _without_rule(search: Search, split: Mapping[str, int]) -> Iterator[str]:
    """Large parameters that no product, convolution or look-up with a rule reads (recurrent layers, for one)."""
    total = search.total()
    for index, cls in enumerate(search.graph.classes):
        known = {layer.weight for layer in search.layers[index].values()}
        for op in cls.ops:
            for weight in (search.views[index][t] for t in op.inputs if t in search.views[index]):
                spec = search.graph.parameters.get(weight.name)
                large = spec is not None and spec.numel >= 0.01 * total
                if large and weight.name not in split and weight.name not in known and op.forward.kind != "free":
                    module = weight.name.rpartition(".")[0]
                    yield f"{module} stays whole: no rule splits the weights that {op.name.split('.')[-2]} reads"


def _whole(search: Search) -> Iterator[tuple[str, str]]:
    for unit in search.graph.units:
        for (index, fqn), reason in search.why.items():
            layer = search.layers[index].get(fqn)  # None: in an opaque part
            if index == unit.class_index and (layer is None or not is_split(search, index, layer)):
                yield _name(unit.fqn, fqn), reason


def _name(prefix: str, fqn: str) -> str:
    return absolute(prefix, fqn).replace(":", ".")


def _class_sharding(outcome: Outcome, cls: UnitClass) -> ClassSharding:
    return ClassSharding(
        op_split=tuple(outcome.op_split),
        tensor_split=tuple(isinstance(state, Split) for state in outcome.states),
        collectives=tuple(outcome.collectives),
    )
