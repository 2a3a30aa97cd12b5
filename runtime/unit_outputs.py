"""What every unit of a model returns, found by one forward on fake tensors: no memory, no arithmetic.

A pipeline stage replays these structures for the units of other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import ModelError, TpplanError
from ..planner.construct import parameters_on_meta
from ..planner.forward_once import forward_with_values
from ..planner.inputs import Inputs
from ..planner.run_once import same_draws
from ..planner.stand_in import FakeModel
from ..planner.target import Target
from ..planner.values import BufferRead
from .compat import FakeTensorMode, TreeSpec, tree_flatten, tree_map_only, tree_unflatten


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that a unit returns: shape, dtype, whether gradients flow through it.

    `written`: code behind the unit changes it in place. `first`: the (FQN, call, leaf) that returned this very tensor
    first, where this unit only hands it on.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    written: bool = False
    first: tuple[str, int, int] | None = None


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
    model: nn.Module, units: Collection[str], inputs: Inputs, compute_dtype: torch.dtype, target: Target
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
    target : Target
        What builds the model.

    Raises
    ------
    ModelError
        If the model's forward fails on fake tensors.
    """
    plain = _Watch(units, compute_dtype)
    try:
        with plain.on(model):
            _run_plainly(model, inputs, compute_dtype)
        return plain.outputs
    except TpplanError:
        raise
    except Exception:
        if plain.is_complete:
            return plain.outputs  # behind the last unit: a loss that no fake tensor can compute
    # Its code looks at data: once more as the planner traces it, with values for what it reads.
    valued = _Watch(units, compute_dtype)
    try:
        _run_with_values(model, inputs, compute_dtype, target, valued)
    except TpplanError:
        raise
    except Exception as error:
        if not valued.is_complete:
            raise ModelError(
                f"The model's forward failed on fake tensors: {type(error).__name__}: {_first_line(error)}.",
                "Pipeline stages need it to find what crosses their borders; run a plan with pp=1.",
            ) from error
    return valued.outputs


class _Watch:
    """Hooks that note what each call of each unit returns, and cast what it is given to the compute dtype."""

    def __init__(self, units: Collection[str], compute_dtype: torch.dtype) -> None:
        self._returned: dict[tuple[str, int], tuple[Any, list[int]]] = {}
        self._units, self._dtype = units, compute_dtype
        self._calls = dict.fromkeys(units, 0)
        self._inside = 0

    @property
    def outputs(self) -> UnitOutputs:
        """What was noted, once the forward is through."""
        first: dict[int, tuple[str, int, int]] = {}
        for (fqn, call), (output, _) in self._returned.items():
            for index, leaf in enumerate(tree_flatten(output)[0]):
                if isinstance(leaf, torch.Tensor):
                    first.setdefault(id(leaf), (fqn, call, index))
        return {key: describe(*returned, key, first) for key, returned in self._returned.items()}

    @property
    def is_complete(self) -> bool:
        """Whether every unit has run, and none is running."""
        return bool(self._returned) and all(self._calls.values()) and not self._inside

    def restart(self) -> None:
        """Forget what was noted."""
        self._returned, self._inside = {}, 0
        self._calls = dict.fromkeys(self._units, 0)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch `model` inside."""
        handles = []
        for fqn in self._units:
            module = model.get_submodule(fqn)
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._after, fqn)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._inside += 1
        return tree_map_only(torch.Tensor, partial(_cast, self._dtype), (args, kwargs))

    def _after(self, fqn: str, module: nn.Module, args: Any, output: Any) -> None:
        self._returned[fqn, self._calls[fqn]] = output, _versions(output)
        self._calls[fqn] += 1
        self._inside -= 1


def _cast(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _run_plainly(model: nn.Module, inputs: Inputs, compute_dtype: torch.dtype) -> None:
    """The forward on fake tensors that have no values, which is quick."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _fake_state(model, mode, compute_dtype)
    # Integers stay real: code may decide by them (lengths of targets, positions of images in a text).
    made = inputs.map(lambda t: _cast(compute_dtype, mode.from_tensor(t)) if t.is_floating_point() else t)
    # The fake mode is not active around the forward: constants that the model makes stay real.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        functional_call(model, fakes, made.args, made.kwargs)


def _run_with_values(
    model: nn.Module, inputs: Inputs, compute_dtype: torch.dtype, target: Target, watch: _Watch
) -> None:
    cast = inputs.map(partial(_cast, compute_dtype))
    batch = next(iter(inputs.tensors().values())).shape[0]
    precision = "bf16" if compute_dtype is torch.bfloat16 else "fp32"
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    saved = [dict(table) for table in tables]
    try:
        with watch.on(model):
            forward_with_values(FakeModel(model, precision), target, cast, batch)
    except BufferRead:  # built again with buffers that have values
        with same_draws(), parameters_on_meta():
            own = target.build("cpu").train()
        if compute_dtype is torch.float64:
            own = own.to(compute_dtype)
        watch.restart()
        with watch.on(own):
            forward_with_values(FakeModel(own, precision), target, cast, batch)
    finally:
        for table, before in zip(tables, saved, strict=True):
            table.clear()
            table.update(before)


def describe(
    output: Any, versions: Sequence[int], key: tuple[str, int], first: Mapping[int, tuple[str, int, int]]
) -> UnitOutput:
    """The structure of the `output` of a call (`key`) with its tensors replaced by descriptions.

    `versions` they had as it was returned; `first` who returned each tensor first, by its identity.
    """
    leaves, structure = tree_flatten(output)
    before = iter(versions)

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        written, source = leaf._version != next(before), first[id(leaf)]
        handed_on = source if source[:2] != key else None
        return Leaf(tuple(leaf.shape), leaf.dtype, leaf.requires_grad, written, handed_on)

    return UnitOutput(structure, tuple(map(described, leaves)))


def _versions(output: Any) -> list[int]:
    return [leaf._version for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]


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
