"""What the sharding analysis speaks of: states of tensors, layers, decisions, and what an interpretation finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..units import DTYPE_BYTES
from .graph import Affine, Op, Tensor


@dataclass(frozen=True, slots=True)
class Whole:
    """Equal on all tp ranks.

    `summed_from` are the col layers whose split a row layer has just summed; `zero` marks a tensor of zeros, to
    which partial sums may be added.
    """

    summed_from: frozenset[str] = frozenset()
    zero: bool = False


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
class Partial:
    """To be summed over tp at the door of the region `door` (relative module FQN) in which it was made."""

    sources: frozenset[str]
    door: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or buffer by its absolute name, as stored or after views and casts.

    dims[i] is the dimension of the parameter whose even division divides dimension i of this view evenly, in the
    same order; None where there is none. `indexed` marks rows picked by an index tensor. `segment` is the size of
    the equal segments of which this is one or several, cut out of the parameter (0: not cut).
    """

    name: str
    dims: tuple[int | None, ...] = ()
    indexed: bool = False
    segment: int = 0


State = Whole | Split | Partial | Weight


class Conflict(Exception):
    """A split that cannot go on: `modules` must change, or whatever layers split `weight`, or `keep` stays whole.

    `packed` are segment sizes that would help; `keep` is a raw parameter that may not follow a split.
    """

    def __init__(
        self,
        modules: frozenset[str],
        reason: str,
        packed: tuple[int, ...] = (),
        weight: str = "",
        keep: str = "",
    ) -> None:
        super().__init__(reason)
        self.modules, self.reason, self.packed, self.weight, self.keep = modules, reason, packed, weight, keep


@dataclass(frozen=True, slots=True)
class Collective:
    """A tp collective of a unit call.

    `bytes` is the size of the whole tensor, `module` relative to the unit, `repeat` how often a loop over time
    steps runs it.
    """

    phase: str
    collective: str
    bytes: Affine
    module: str
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that may be split, by the FQN of the module that owns it, or owner:parameter for raw parameters.

    `weight` is its absolute name. `kind`: linear, embedding, convolution (modules with a weight and perhaps a
    bias), raw (a parameter that a product reads directly). `owner` is the module whose code runs the product;
    `region` says that this code must run on plain local tensors. `out_per_sample` is the size of the output, `flops`
    those of the forward; both for one sample.
    """

    fqn: str
    weight: str
    kind: str
    out_features: int
    numel: int
    owner: str = ""
    region: bool = False
    out_per_sample: float = math.inf
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What is tried for a layer: col, packed (with sizes), gather (col, output gathered), vocab, replicate."""

    style: str
    sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What one interpretation found: see `ClassSharding` for the fields that the planner reads.

    rows : layers split along what they sum over -> the layers that split their input
    columns, consumed : layers that split their output; those of them whose split some later operator takes
    raw : split raw parameters by absolute name -> (dimension, sizes of packed segments)
    regions : modules (relative FQN) whose code runs on plain local tensors -> their parameters added to partial sums
    channels : norms and grouped convolutions that run on a part of the channels
    """

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
    raw: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    regions: dict[str, set[str]] = field(default_factory=dict)
    channels: set[str] = field(default_factory=set)


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
