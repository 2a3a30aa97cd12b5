"""Operators that DTensor has no rule for, on operands that every tp rank holds whole: each rank runs the operator.

DTensor refuses what it does not know (`as_strided_`, `nonzero`, a CTC loss, deformable sampling), even where
nothing is split. There the answer is plain: the operator on the local tensors. On split operands it stays an error,
but for element-wise operators.

Views of what a rank holds are made contiguous first where its strides do not allow them, though the whole
tensor's would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..errors import ModelError, PlanFileError
from .compat import dtensor_dispatcher, tree_flatten, tree_map_only, tree_unflatten
from .packed_products import segments_behind
from .placements import unwrap_activation
from .split_operators import is_elementwise, run_split

_METHOD = "_propagate_op_sharding_dispatch_slow_path"
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)
_TAIL = "_dispatch_fast_path_python_tail"
_LOCAL_METHOD = "_dispatch_get_local_results_slow_path"


@contextmanager
def whole_operands_run_locally() -> Iterator[None]:
    """Inside, an operator without a rule runs on each rank, if all of its operands are replicated."""
    dispatcher = dtensor_dispatcher()
    propagate, run_local = getattr(dispatcher, _METHOD), getattr(dispatcher, _LOCAL_METHOD)

    def with_fallback(operator: Any, args: Any, kwargs: Any, *rest: Any) -> Any:
        if operator in _PRODUCTS and any(segments_behind(t) for t in tree_flatten(args)[0]):
            raise ModelError(
                f"{operator} multiplies with a weight that tensor parallelism has packed.",
                "Use F.linear(x, weight) or x @ weight.t(), or plan again with --fix tp=1.",
            )
        try:
            return propagate(operator, args, kwargs, *rest)
        except (NotImplementedError, RuntimeError) as error:
            output = run_split(operator, args, kwargs) if is_elementwise(operator) else None
            return run_whole(operator, args, kwargs, error) if output is None else output

    def with_copies(operator: Any, args: Any, info: Any) -> Any:
        try:
            return run_local(operator, args, info)
        except RuntimeError as error:
            if operator not in _VIEWS or "view size is not compatible" not in str(error):
                raise
            given = (
                info.local_args if info.args_tree_spec is None else tree_unflatten(info.local_args, info.args_tree_spec)
            )
            return operator(given[0].contiguous(), *given[1:])  # the parts are redistributed by now

    tail = getattr(dispatcher, _TAIL)

    def with_plain_self(operator: Any, args: Any, kwargs: Any, mesh: Any, sharding: Any, *rest: Any) -> Any:
        in_place = rest[2]
        if not in_place or isinstance(args[0], DTensor) or sharding.output_spec is None:
            return tail(operator, args, kwargs, mesh, sharding, *rest)
        if all(placement.is_replicate() for placement in sharding.output_spec.placements):
            return args[0]  # a buffer or a new tensor of the model's, which took what all ranks hold
        raise ModelError(
            f"{operator} would write a tensor placed {sharding.output_spec.placements[0]} into a whole one.",
            "Plan again without tensor parallelism: --fix tp=1.",
        )

    setattr(dispatcher, _TAIL, with_plain_self)
    setattr(dispatcher, _METHOD, with_fallback)
    setattr(dispatcher, _LOCAL_METHOD, with_copies)
    try:
        yield
    finally:
        delattr(dispatcher, _TAIL)
        delattr(dispatcher, _METHOD)
        delattr(dispatcher, _LOCAL_METHOD)


def run_whole(operator: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> Any:
    """`operator` on the local tensors of replicated operands; its floating-point results are replicated DTensors.

    Raises
    ------
    ModelError
        If an operand is split; `error` says why DTensor could not carry it.
    """
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, DTensor)]
    if operator is torch.ops.aten.index_put.default:  # of an index's backward: small, and gathered
        args, kwargs = tree_map_only(DTensor, unwrap_activation, (args, kwargs))
        return tree_map_only(
            torch.Tensor, lambda tensor: _wrap(tensor, tensors[0].device_mesh), operator(*args, **kwargs)
        )
    split = next((t for t in tensors if any(not p.is_replicate() for p in t.placements)), None)
    cause = error
    while cause is not None:  # an error of ours, from a hook or the user's own kind, is no gap of DTensor
        if isinstance(cause, (ModelError, PlanFileError)):
            raise error
        cause = cause.__cause__
    if split is not None:
        raise ModelError(
            f"{operator} cannot run on a tensor placed {split.placements[0]}: {_first_line(error)}.",
            "Give the module in front of it the style replicate, or plan again without tensor parallelism: --fix tp=1.",
        ) from error
    mesh = tensors[0].device_mesh
    output = operator(*tree_map_only(DTensor, _local, args), **tree_map_only(DTensor, _local, kwargs))
    if str(operator).split(".")[1].endswith("_") and isinstance(args[0], DTensor):
        return args[0]  # in place
    return tree_map_only(torch.Tensor, lambda tensor: _wrap(tensor, mesh), output)


def _local(tensor: DTensor) -> torch.Tensor:
    return tensor._local_tensor  # below autograd, where `to_local` would be one operator more


def _wrap(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
