"""The traced model as data: operators, tensors, units, classes, and the networkx graph over them.

A *unit* is one module call that the planner treats as one piece: a transformer block, a residual block, an
embedding, a norm, a head. Units form a chain in execution order; pipeline stages are cut between them. Units
whose operators, shapes and relative names are equal share one *class* (folding), which holds the operators.

    ModelGraph
      classes: UnitClass[]   operators (forward, with their backward kernels), tensors, parameters, memory
      units:   Unit[]        one a call: FQN, class, where its inputs come from
      graph    networkx.DiGraph: node = forward operator of one unit, edge = tensor

Every size is an `Affine` function of the microbatch size b, at the traced sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Affine(NamedTuple):
    """base + per_sample * b, with b the microbatch size in samples.

    >>> Affine(10, 2).at(3)
    16
    >>> Affine(10, 2) + Affine(1, 1)
    Affine(base=11, per_sample=3)
    """

    base: float = 0
    per_sample: float = 0

    def at(self, b: int) -> float:
        """The value at microbatch size `b`."""
        return self.base + self.per_sample * b

    def __add__(self, other: Affine) -> Affine:  # type: ignore[override]
        return Affine(self.base + other.base, self.per_sample + other.per_sample)

    def scaled(self, factor: float) -> Affine:
        """Both coefficients times `factor`."""
        return Affine(self.base * factor, self.per_sample * factor)


NOTHING = Affine()


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a unit class (ids are local to the class).

    `kind` is one of: input (activation from outside the unit), activation, parameter, buffer, constant
    (made from no model input). `fqn` is, for parameters and buffers, the name relative to the unit's module
    (absolute, with a leading "/", if the parameter lives outside the unit); `base` is the id of the tensor
    whose storage this one views (itself when it owns it, or is the first to show a storage from outside), and
    `storage_bytes` the size of that storage.
    """

    id: int
    shape: tuple[Affine, ...]
    dtype: str
    kind: str
    base: int
    requires_grad: bool = False
    fqn: str = ""
    strides_contiguous: bool = True
    storage_bytes: Affine = NOTHING


@dataclass(frozen=True, slots=True)
class Ref:
    """The place of a tensor argument inside `Op.args`."""

    tensor: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One device kernel, as the cost model prices it.

    `kind`: gemm | attention | conv | embedding | memory | free (views, no kernel).
    `dims` as functions of b: gemm (batch, m, n, k) with out[m, n] = a[m, k] b[k, n];
    attention (batch, heads, kv_heads, q_len, kv_len, head_dim, causal 0/1); otherwise empty.
    `wrt` is "forward", or for a backward kernel what it computes: "input", "weight" or "other".
    `bytes_moved` is the least traffic of a perfect kernel: distinct inputs read once, outputs written once.
    """

    name: str
    kind: str
    flops: Affine
    bytes_moved: Affine
    dims: tuple[Affine, ...] = ()
    dtype: str = "float32"
    wrt: str = "forward"


@dataclass(frozen=True, slots=True)
class Op:
    """One forward operator of a unit class with the backward kernels that belong to it.

    `fqn` is relative to the unit's module ("" = the unit's own forward); `module_type` the class name of the
    module that owns the call. `args` are the operator's arguments with tensors replaced by `Ref` and lists by
    tuples; numbers that follow the microbatch size are `Affine`, dtypes are names, and keyword arguments are
    (name, value) pairs at the end. Operators run directly by a parent module (glue) have a `fqn` that starts
    with "/" and goes on with the parent's absolute FQN. `saved` are ids of tensors that autograd keeps for
    backward because of this operator.
    """

    index: int
    name: str
    fqn: str
    call: int
    module_type: str
    args: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    forward: Kernel
    backward: tuple[Kernel, ...] = ()
    saved: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter (or buffer) used by a unit class; `fqn` relative to the unit's module as in `Tensor`."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    module_type: str
    is_buffer: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True, slots=True)
class UnitClass:
    """What equal units have in common. Tensor ids index `tensors` (tensors[i].id == i).

    `inputs` are the external tensors a unit reads (order of first use), `outputs` those read after it.
    `saved_bytes` are the storages kept from forward to backward (parameters and buffers excluded, each storage
    once; the unit's inputs are included only when saved); `saved` has one tensor id for each.
    `workspace_forward` / `workspace_backward` are the peak bytes above (what is saved + the unit's inputs and
    outputs) while the unit runs; backward counts the gradients of the unit's inputs as workspace, those of its
    outputs and of parameters not.
    """

    index: int
    module_type: str
    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    parameters: tuple[Parameter, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    saved_bytes: Affine
    workspace_forward: Affine
    workspace_backward: Affine
    flops_forward: Affine
    flops_backward: Affine
    saved: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """One module call on the chain.

    `fqn` is the user's own module name; `call` counts calls of that module (a module called twice is two
    units). `sources[i]` says where class input i comes from: (unit position, output index), or
    (-1, k) for model input leaf k. `modules` are the FQNs of all modules that this unit executes for the first time
    (itself, and for glue executed in a parent, none). `replicated` marks cheap parameter-free units computed
    from the model's inputs alone (rotary tables, masks): every stage runs them. `cut_after` says whether the
    pipeline may be cut right after this unit, and `wire` are the (unit position, output index) pairs
    that such a cut sends to the next stage.
    """

    position: int
    fqn: str
    call: int
    class_index: int
    sources: tuple[tuple[int, int], ...]
    replicated: bool = False
    cut_after: bool = False
    wire: tuple[tuple[int, int], ...] = ()
    modules: tuple[str, ...] = ()
    output_leaves: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One leaf of the model's inputs: keyword or position, shape as a function of b, dtype."""

    name: str
    shape: tuple[Affine, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A traced model.

    `tied` groups parameter FQNs that are one tensor; the first name is the one of `named_parameters()`.
    `parameters` maps every distinct parameter and buffer FQN (absolute) to its description;
    `unused` are trainable parameters that no operator reads. `opaque` lists (fqn, reason, flops share).
    `notes` are remarks for the user (what ran on real data, what was replayed).
    """

    name: str
    precision: str
    sequence_length: int
    classes: tuple[UnitClass, ...]
    units: tuple[Unit, ...]
    inputs: tuple[ModelInput, ...]
    parameters: Mapping[str, Parameter]
    tied: tuple[tuple[str, ...], ...] = ()
    unused: tuple[str, ...] = ()
    opaque: tuple[tuple[str, str, float], ...] = ()
    batch_norm: tuple[str, ...] = ()
    loss: str = ""
    traced_batches: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
