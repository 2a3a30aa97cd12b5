"""What every unit of a model returns, found by one forward on fake tensors: no memory, no arithmetic.

A pipeline stage replays these structures for the units of other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import ModelError, TpplanError
from ..planner.inputs import Inputs
from .compat import FakeTensorMode, TreeSpec, tree_flatten, tree_map_only, tree_unflatten


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that a unit returns: shape, dtype, and whether gradients flow through it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """The nested structure that one call of a unit returns; what is no tensor is kept as it is."""

    structure: TreeSpec
    leaves: tuple[Any, ...]

    def rebuild(self, make: Callable[[int, Leaf], torch.Tensor]) -> Any:
        """The structure with ``make(index, leaf)`` in place of each tensor."""
        values = [make(i, leaf) if isinstance(leaf, Leaf) else leaf for i, leaf in enumerate(self.leaves)]
        return tree_unflatten(values, self.structure)


UnitOutputs = Mapping[tuple[str, int], UnitOutput]


def record_unit_outputs(
    model: nn.Module, units: Collection[str], inputs: Inputs, compute_dtype: torch.dtype
) -> UnitOutputs:
    """Outputs of each call of each of `units`, keyed by (FQN, call).

    Parameters
    ----------
    model : nn.Module
        The whole model, on meta; it is left as it was.
    units : collection of str
        FQNs of the modules to record.
    inputs : Inputs
        One microbatch of real CPU tensors.
    compute_dtype : torch.dtype
        What floating-point parameters, inputs and unit arguments are cast to, as in the run.

    Raises
    ------
    ModelError
        If the model's forward fails on fake tensors.
    """
    outputs: dict[tuple[str, int], UnitOutput] = {}
    calls = dict.fromkeys(units, 0)
    inside: list[nn.Module] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(compute_dtype) if tensor.is_floating_point() else tensor

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        inside.append(module)
        return tree_map_only(torch.Tensor, cast, (args, kwargs))

    def after(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[fqn, calls[fqn]] = describe(output)
            calls[fqn] += 1
            inside.pop()

        return hook

    handles = []
    for fqn in units:
        module = model.get_submodule(fqn)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after(fqn)))
    fakes = _fake_state(model, mode, compute_dtype)
    # Integers stay real: code may decide by them (lengths of targets, positions of images in a text).
    fake_inputs = inputs.map(lambda t: cast(mode.from_tensor(t)) if t.is_floating_point() else t)
    try:
        # The fake mode is not active around the forward: constants that the model makes stay real.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            functional_call(model, fakes, fake_inputs.args, fake_inputs.kwargs)
    except TpplanError:
        raise
    except Exception as error:
        if all(calls.values()) and not inside:
            return outputs  # behind the last unit: a loss that no fake tensor can compute
        raise ModelError(
            f"The model's forward failed on fake tensors: {type(error).__name__}: {_first_line(error)}.",
            "Pipeline stages need it to find what crosses their borders; run a plan with pp=1.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def describe(output: Any) -> UnitOutput:
    """The structure of `output` with its tensors replaced by their descriptions."""
    leaves, structure = tree_flatten(output)
    described = (Leaf(tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x for x in leaves)
    return UnitOutput(structure, tuple(described))


def _fake_state(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Fake CPU twins of all parameters (cast to `dtype`) and buffers; tied ones share a twin."""
    twins: dict[int, torch.Tensor] = {}
    state = {}
    with mode:
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            if id(tensor) not in twins:
                is_parameter = isinstance(tensor, nn.Parameter)
                to = dtype if is_parameter and tensor.is_floating_point() else tensor.dtype
                twin = torch.empty(tensor.shape, dtype=to, device="cpu")
                twins[id(tensor)] = twin.requires_grad_(tensor.requires_grad)
            state[name] = twins[id(tensor)]
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
