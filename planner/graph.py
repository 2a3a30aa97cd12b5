"""The traced model as data: operators, tensors, units, classes, and the networkx graph over them.

A *unit* is one module call that the planner treats as one piece: a transformer block, a residual block, an
embedding, a norm, a head. Units form a chain in execution order; pipeline stages are cut between them. Units
whose operators, shapes and relative names are equal share one *class* (folding), which holds the operators.

    ModelGraph
      classes: UnitClass[]   operators (forward, with their backward kernels), tensors, parameters, memory
      units:   Unit[]        one a call: FQN, class, where its inputs come from
      graph    networkx.DiGraph: node = forward operator of one unit, edge = tensor

Every size is an `Affine` function of the microbatch size b (quadratic where samples are compared in pairs), at the
traced sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import networkx as nx


class Affine(NamedTuple):
    """base + per_sample * b + per_pair * b^2, with b the microbatch size in samples.

    Almost every figure is affine; `per_pair` is for losses that compare each sample of a microbatch with every
    other (contrastive ones make b x b scores).

    >>> Affine(10, 2).at(3), Affine(10, 2, 1).at(3)
    (16, 25)
    >>> Affine(10, 2) + Affine(1, 1)
    Affine(base=11, per_sample=3)
    """

    base: float = 0
    per_sample: float = 0
    per_pair: float = 0

    def at(self, b: int) -> float:
        """The value at microbatch size `b`."""
        return self.base + self.per_sample * b + self.per_pair * b * b

    def __add__(self, other: Affine) -> Affine:  # type: ignore[override]
        return Affine(self.base + other.base, self.per_sample + other.per_sample, self.per_pair + other.per_pair)

    def times(self, other: Affine) -> Affine:
        """The product of two figures, of which at most one may be quadratic.

        >>> Affine(0, 1).times(Affine(1, 1))
        Affine(base=0, per_sample=1, per_pair=1)

        Raises
        ------
        ValueError
            If the product is of the third degree.
        """
        (a0, a1, a2), (b0, b1, b2) = self, other
        if a1 * b2 or a2 * b1 or a2 * b2:
            raise ValueError(f"{self} times {other} grows faster than the square of the microbatch size")
        return Affine(a0 * b0, a0 * b1 + a1 * b0, a0 * b2 + a1 * b1 + a2 * b0)

    def scaled(self, factor: float) -> Affine:
        """Every coefficient times `factor`."""
        return Affine(self.base * factor, self.per_sample * factor, self.per_pair * factor)

    def __repr__(self) -> str:
        pairs = f", per_pair={self.per_pair!r}" if self.per_pair else ""
        return f"Affine(base={self.base!r}, per_sample={self.per_sample!r}{pairs})"


NOTHING = Affine()
LARGEST_OPAQUE = 0.2  # share of the FLOPs in opaque parts of a model that counts as captured


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a unit class (ids are local to the class).

    `kind` is one of: input (activation from outside the unit), activation, parameter, buffer, constant
    (made from no model input). `fqn` is, for parameters and buffers, the name relative to the unit's module
    (absolute, with a leading "/", if the parameter lives outside the unit); `base` is the id of the tensor
    whose storage this one views (itself when it owns it, or is the first to show a storage from outside), and
    `storage_bytes` the size of that storage. In a loop over time steps one tensor stands for `repeat` alike, each
    with a storage of its own where it is its own base.
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
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Ref:
    """The place of a tensor argument inside `Op.args`."""

    tensor: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One device kernel, as the cost model prices it.

    `kind`: gemm | attention | conv | embedding | memory | free (views, no kernel).
    `dims` as functions of b: gemm (batch, m, n, k) with out[m, n] = a[m, k] b[k, n];
    attention (batch, heads, kv_heads, q_len, kv_len, head_dim, causal 0/1); conv, of the forward operator in its
    backward kernels too, (n, c_in, c_out, groups, output elements of one channel, kernel elements of one channel
    pair, transposed 0/1); otherwise empty. Recurrent layers (cuDNN) are gemms of one step each, `batch` of them.
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
    backward because of this operator. An operator inside a loop over time steps stands for `repeat` launches of
    its forward and backward kernels, one a step, whose figures are those of one launch.
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
    repeat: int = 1

    @property
    def forward_flops(self) -> Affine:
        """FLOPs of all repetitions of the forward kernel."""
        return self.forward.flops.scaled(self.repeat)

    @property
    def backward_flops(self) -> Affine:
        """FLOPs of all repetitions of the backward kernels."""
        total = Affine()
        for kernel in self.backward:
            total += kernel.flops
        return total.scaled(self.repeat)


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
    that such a cut sends to the next stage. `output_leaves` names each class output as (module FQN, call, index
    among the tensors that this call returns, in pytree order): the unit's own call, or that of a module around
    earlier units that has ended (its own operators after them are this unit's glue); ("", 0, -1) for one that no
    such call returns. `shared_saved` says how many of the class's `saved_bytes` are storages that an earlier unit keeps
    too, as (that unit's position, bytes) with the nearest such unit: units a to b together keep the sum of their
    `saved_bytes` less what is shared with a unit at or after a.
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
    shared_saved: tuple[tuple[int, Affine], ...] = ()


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
    `unused` are trainable parameters that no operator reads. `opaque` lists (fqn, reason, flops share) of the
    parts whose figures depend on data or have no formula; "/" and an FQN is what that module runs between units.
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

    @property
    def captured(self) -> bool:
        """Whether the figures are the model's own: opaque parts have at most a fifth of its FLOPs."""
        return sum(share for _, _, share in self.opaque) <= LARGEST_OPAQUE

    @property
    def parameter_count(self) -> int:
        """Elements of all distinct parameters."""
        return sum(p.numel for p in self.parameters.values() if not p.is_buffer)

    @property
    def trainable_count(self) -> int:
        """Elements of the distinct parameters that require a gradient."""
        return sum(p.numel for p in self.parameters.values() if p.requires_grad and not p.is_buffer)

    @property
    def buffer_count(self) -> int:
        """Elements of all buffers, non-persistent ones too."""
        return sum(p.numel for p in self.parameters.values() if p.is_buffer)

    @property
    def flops_forward(self) -> Affine:
        """FLOPs of the forward of the whole model (2 per multiply-add)."""
        return self._sum("flops_forward")

    @property
    def flops_backward(self) -> Affine:
        """FLOPs of the backward, without recomputation by the planner (attention kernels recompute scores)."""
        return self._sum("flops_backward")

    @property
    def saved_bytes(self) -> Affine:
        """Bytes kept from forward to backward, each storage once even where several units keep it."""
        total = self._sum("saved_bytes")
        for unit in self.units:
            for _, shared in unit.shared_saved:
                total += shared.scaled(-1)
        return total

    @property
    def graph(self) -> nx.DiGraph:
        """The operators of all units as a networkx graph (built anew at each access)."""
        from .graph_view import to_networkx

        return to_networkx(self)

    @property
    def hash(self) -> str:
        """sha256 of names, shapes, dtypes, operators and figures: equal for equal models, on one torch version."""
        from .graph_view import content_hash

        return content_hash(self)

    def _sum(self, name: str) -> Affine:
        total = Affine()
        for unit in self.units:
            total += getattr(self.classes[unit.class_index], name)
        return total

    def verify(self) -> ModelGraph:
        """Check ids, edges and order.

        Raises
        ------
        ValueError
            Naming everything that is inconsistent.
        """
        from .graph_checks import problems

        found = problems(self)
        if found:
            raise ValueError(f"inconsistent graph of {self.name}: " + "; ".join(found[:10]))
        return self

    def summary(self, batch: int) -> dict[str, Any]:
        """Totals at microbatch size `batch`; `layers` counts units, `opaque` lists fqn, reason, flops_share."""
        return {
            "parameters": self.parameter_count,
            "trainable_parameters": self.trainable_count,
            "buffers": self.buffer_count,
            "flops_forward": int(self.flops_forward.at(batch)),
            "flops_backward": int(self.flops_backward.at(batch)),
            "saved_bytes": int(self.saved_bytes.at(batch)),
            "layers": len(self.units),
            "classes": len(self.classes),
            "opaque": [{"fqn": f, "reason": r, "flops_share": s} for f, r, s in self.opaque],
        }
