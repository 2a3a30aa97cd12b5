"""What the sharding analysis speaks of: states of tensors, layers, decisions, and what an interpretation finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..units import DTYPE_BYTES
from .graph import Affine, Op, Tensor


@dataclass(frozen=True, slots=True)
class Whole:
    """Equal on all tp ranks; `summed_from` are the col layers whose split a row layer has just summed."""

    summed_from: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Split:
    """Divided along `dim`, because of the layers `sources`.

    `segments` are the sizes of a packed projection's parts while they are still in one tensor. `outer` > 1: the
    dimension was merged from (outer, size / outer) and only the second is divided, as when (batch, heads) become
    one for a batched product. `loss` marks log-probabilities split over the classes.
    """

    dim: int
    sources: frozenset[str]
    segments: tuple[int, ...] = ()
    outer: int = 1
    loss: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter by its absolute name, as stored or transposed."""

    name: str


State = Whole | Split | Weight


class Conflict(Exception):
    """A split that cannot go on: `modules` must change, or whatever layers split `weight`.

    `packed` are segment sizes that would help.
    """

    def __init__(self, modules: frozenset[str], reason: str, packed: tuple[int, ...] = (), weight: str = "") -> None:
        super().__init__(reason)
        self.modules, self.reason, self.packed, self.weight = modules, reason, packed, weight


@dataclass(frozen=True, slots=True)
class Collective:
    """One tp collective of a unit call; `bytes` is the size of the whole tensor, `module` relative to the unit."""

    phase: str
    collective: str
    bytes: Affine
    module: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear or embedding that owns its weight: `weight` by absolute name, rows = dimension of size out."""

    fqn: str
    weight: str
    kind: str
    out_features: int
    numel: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is tried for a layer: col, packed (with sizes), gather (col, output gathered), vocab, replicate."""

    style: str
    sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What one interpretation found: see `ClassSharding` for the fields that the planner reads."""

    states: list[State]
    op_split: list[str | None]
    rows: dict[str, frozenset[str]] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    consumed: set[str] = field(default_factory=set)
    loss: set[str] = field(default_factory=set)
    whole_loss: bool = False
    attention: set[str] = field(default_factory=set)
    collectives: list[Collective] = field(default_factory=list)
    inputs_summed: dict[tuple[int, str], str] = field(default_factory=dict)
    limits: list[tuple[frozenset[str], int, str]] = field(default_factory=list)


def is_transpose(op: Op) -> bool:
    """Whether `op` swaps the two dimensions of a matrix: t(), transpose, or permute as .T makes it."""
    return op.name in ("aten.t.default", "aten.transpose.int") or (
        op.name == "aten.permute.default" and op.args[1] == (1, 0)
    )


def tensor_bytes(tensor: Tensor) -> Affine:
    """Bytes of a tensor as a function of the microbatch size."""
    total = Affine(DTYPE_BYTES[tensor.dtype])
    for d in tensor.shape:
        total = total.times(d)
    return total


def absolute(prefix: str, fqn: str) -> str:
    """The absolute FQN of a name relative to the unit `prefix` (a leading "/" marks an absolute one).

    >>> absolute("h.0", "attn.c_proj"), absolute("h.0", "/wte.weight"), absolute("", "head")
    ('h.0.attn.c_proj', 'wte.weight', 'head')
    """
    if fqn.startswith("/"):
        return fqn[1:]
    return ".".join(part for part in (prefix, fqn) if part)
