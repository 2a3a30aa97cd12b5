"""Example inputs of a model: one batch of CPU tensors, from the user's function or from --input specs."""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, TargetError
from .locate import did_you_mean

SPEC_FORM = '--input takes "name=dtype[dims]<bound", for example "ids=int64[B,S]<32000" or "x=float32[B,3,S,S]".'
_SPEC = re.compile(r"(?:(?P<name>\w+)=)?(?:torch\.)?(?P<dtype>\w+)\[(?P<dims>[^\]]*)\](?:<(?P<bound>\d+))?")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one forward is called with: ``model(*args, **kwargs)``.

    `extra` is given to the file's `loss_fn` only (labels that forward does not take). `structure` is how the
    user's own `example_inputs` returned them: "dict", "tuple" or "tensor".
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    structure: str = "dict"

    def as_user(self) -> Any:
        """The inputs in the structure of the user's `example_inputs`, as their `loss_fn` expects them."""
        if self.structure == "tensor":
            return self.args[0]
        if self.structure == "tuple":
            return (*self.args, *self.extra.values())
        return {**self.kwargs, **self.extra}

    def map(self, change: Callable[[torch.Tensor], Any]) -> Inputs:
        """The same inputs with `change` applied to every tensor."""
        return Inputs(_map(self.args, change), _map(self.kwargs, change), _map(self.extra, change), self.structure)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: keyword names, positions of args ("0", "1"), names of `extra`."""
        found: dict[str, torch.Tensor] = {}
        for prefix, value in [*enumerate(self.args), *self.kwargs.items(), *self.extra.items()]:
            _collect(str(prefix), value, found)
        return found


def take(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Samples `start` to `stop` of a batch: along dimension 0 of every tensor, and of lists with a dict a sample.

    A tensor with several rows a sample (the patches of all images, one after another) gives all rows of its samples:
    the number of samples is the smallest dimension 0 (or length of such a list) above 1 among the inputs. A tensor
    with one row belongs to every sample.
    """
    parts = (inputs.args, inputs.kwargs, inputs.extra)
    samples = min((count for part in parts for count in _sample_counts(part) if count > 1), default=1)
    args, kwargs, extra = (_take(part, start, stop, samples) for part in parts)
    return Inputs(args, kwargs, extra, inputs.structure)


def _lists_samples(value: Any) -> bool:
    """Whether a list holds one mapping a sample (the objects in each image)."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _sample_counts(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [value.shape[0]] if value.ndim else []
    if _lists_samples(value):
        return [len(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [count for item in value for count in _sample_counts(item)] if isinstance(value, tuple | list) else []


def _take(value: Any, start: int, stop: int, samples: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or (value.shape[0] == 1 and samples > 1):
            return value
        rows = value.shape[0] // samples if value.shape[0] % samples == 0 else 1
        return value[start * rows : stop * rows]
    if _lists_samples(value):
        return value[start:stop]
    if isinstance(value, tuple | list):
        taken = [_take(item, start, stop, samples) for item in value]
        return tuple(taken) if isinstance(value, tuple) else taken
    if isinstance(value, Mapping):
        return {key: _take(item, start, stop, samples) for key, item in value.items()}
    return value


def from_user(value: Any, model: nn.Module, has_loss_fn: bool, shown: str) -> Inputs:
    """What a file's `example_inputs` returned, split into what forward takes and what only the loss takes.

    Raises
    ------
    TargetError
        If it is no dict, tuple, list or tensor, or holds what neither forward nor a `loss_fn` takes.
    """
    if isinstance(value, torch.Tensor):
        return Inputs(args=(value,), structure="tensor")
    if isinstance(value, tuple | list):
        most = _positional_count(model)
        if most is not None and len(value) > most and not has_loss_fn:
            raise TargetError(
                f"example_inputs of {shown} returns {len(value)} values; forward takes {most}.",
                "Return only what forward takes, or define loss_fn(output, inputs) that uses the others.",
            )
        cut = len(value) if most is None else min(most, len(value))
        extra = {str(i): item for i, item in enumerate(value) if i >= cut}
        return Inputs(args=tuple(value[:cut]), extra=extra, structure="tuple")
    if isinstance(value, Mapping):
        names = forward_names(model)
        extra = {} if names is None else {k: v for k, v in value.items() if k not in names}
        if extra and not has_loss_fn:
            first = next(iter(extra))
            raise TargetError(
                f"example_inputs of {shown} returns {first!r}, which forward does not take.",
                did_you_mean(first, names or ()) or "Define loss_fn(output, inputs) in the file that uses it.",
            )
        return Inputs(kwargs={k: v for k, v in value.items() if k not in extra}, extra=extra, structure="dict")
    raise TargetError(
        f"example_inputs of {shown} returned a {type(value).__name__}.", "Return a dict, a tuple or a tensor."
    )


def from_specs(specs: Sequence[str], model: nn.Module, batch: int, seq: int, has_loss_fn: bool) -> Inputs:
    """Tensors as the `--input` flags describe them; integers uniform below the bound, floats normal.

    A name that forward takes becomes a keyword argument; a spec without a name is positional; another name
    is for the file's `loss_fn`.

    Raises
    ------
    TargetError
        If a spec is malformed, or names what neither forward nor a loss function takes.
    """
    names = forward_names(model)
    takes_any_position = names == [] and _positional_count(model) is None  # forward(*args)
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    extra: dict[str, torch.Tensor] = {}
    for spec in specs:
        name, tensor = draw(spec, batch, seq)
        if not name or takes_any_position:
            args.append(tensor)
        elif names is None or name in names:
            kwargs[name] = tensor
        elif has_loss_fn:
            extra[name] = tensor
        else:
            raise TargetError(
                f"--input {name}: forward takes no {name!r}.",
                did_you_mean(name, names) or f"It takes: {', '.join(names)}.",
            )
    return Inputs(tuple(args), kwargs, extra, "dict" if kwargs or not args else "tuple")


def draw(spec: str, batch: int, seq: int) -> tuple[str, torch.Tensor]:
    """Name and tensor of one `--input` spec.

    Examples
    --------
    >>> name, tensor = draw("ids=int64[B,S/2]<100", batch=2, seq=8)
    >>> name, tuple(tensor.shape), tensor.dtype
    ('ids', (2, 4), torch.int64)
    """
    match = _SPEC.fullmatch(spec.strip().replace(" ", ""))
    if match is None:
        raise TargetError(f"Cannot read --input {spec!r}.", SPEC_FORM)
    dtype = getattr(torch, match["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        known = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
        raise TargetError(
            f"--input {spec!r}: {match['dtype']!r} is no torch dtype.",
            did_you_mean(match["dtype"], known) or SPEC_FORM,
        )
    shape = [_size(dim, spec, batch, seq) for dim in match["dims"].split(",") if dim]
    return match["name"] or "", _random(shape, dtype, match["bound"], spec)


def _random(shape: list[int], dtype: torch.dtype, bound: str | None, spec: str) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, device="cpu").bool()
    if dtype.is_floating_point or dtype.is_complex:
        if bound is not None:
            raise TargetError(f"--input {spec!r}: a bound is for integers; floats are normal.", SPEC_FORM)
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        return torch.randn(shape, dtype=wide, device="cpu").to(dtype)
    if bound is None or int(bound) < 1:
        raise TargetError(f"--input {spec!r}: integers need an upper bound, such as <32000.", SPEC_FORM)
    return torch.randint(0, int(bound), shape, device="cpu").to(dtype)


def _size(text: str, spec: str, batch: int, seq: int) -> int:
    """A dimension: B, S, an integer, or sums, products and quotients of them."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Name) and node.id in ("B", "S"):
            return batch if node.id == "B" else seq
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    try:
        size = value(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        size = 0
    if size < 1:
        raise TargetError(f"--input {spec!r}: cannot make a size of {text!r} (B is {batch}, S is {seq}).", SPEC_FORM)
    return size


def forward_names(model: nn.Module) -> list[str] | None:
    """Keyword names that `forward` takes; None if it takes any (``**kwargs``)."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _positional_count(model: nn.Module) -> int | None:
    """How many positional arguments `forward` takes; None if any number (``*args``)."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def required_names(model: nn.Module) -> list[str]:
    """Arguments of `forward` that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _map(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        mapped = [_map(item, change) for item in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _collect(name: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        if name in found:
            raise ModelError(f"Two inputs are both called {name}.", "Give every input its own name.")
        found[name] = value
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            _collect(f"{name}.{i}", item, found)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}.{key}", item, found)
