"""Which modules are structurally equal, and which lists of a model hold its repeated blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FEWEST_ATTRIBUTES = 4  # an attention has three or four alike projections, but those have no submodules

_SIMPLE = (int, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)
_IGNORED = {"training", "_is_full_backward_hook", "_is_hf_initialized"}
_COUNTER = re.compile(r"(^|_)(i|idx|index|id|ids|num|number|no|depth|position)$")


def rate(value: float) -> float:
    """`value`, with all numbers but 0, 1 and -1 alike: they scale tensors or draw dropout, and change no figure.

    >>> rate(0.1) == rate(0.25), rate(0.0) == rate(0.1), rate(1.0)
    (True, False, 1.0)
    """
    if value in (0.0, 1.0, -1.0) or not math.isfinite(value):
        return -math.inf if value != value else value  # a NaN would differ from itself
    return 0.5


def plain_arguments(name: str, args: Any) -> Any:
    """Arguments of an operator without what changes no figure: scale factors, rates, and which row is selected.

    >>> plain_arguments("aten.mul.Tensor", (0.3,)) == plain_arguments("aten.mul.Tensor", (0.7,))
    True
    """
    if name == "aten.select.int":
        args = args[:2]
    return _rates(args)


def _rates(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(_rates(v) for v in value)
    return rate(value) if isinstance(value, float) else value


def _plain(value: Any) -> Iterator[Any]:
    """`value` flattened to simple items; objects by their type only."""
    if isinstance(value, float):
        yield rate(value)
    elif isinstance(value, _SIMPLE):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield ("items", len(value))
        for item in value:
            yield from _plain(item)
    elif isinstance(value, dict):
        yield ("items", len(value))
        for key, item in value.items():
            yield str(key)
            yield from _plain(item)
    elif isinstance(value, torch.Tensor):
        yield ("tensor", tuple(value.shape), str(value.dtype), value.requires_grad)
    elif callable(value):
        yield ("callable", getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__))
    else:
        yield ("object", type(value).__module__, type(value).__qualname__)


def signature(module: nn.Module) -> list[tuple[str, Any]]:
    """Type, tensors and simple attributes of `module` and all its submodules, as (name, value) pairs."""
    items: list[tuple[str, Any]] = []
    for name, child in module.named_modules(remove_duplicate=False):
        items.append((name, (type(child).__module__, type(child).__qualname__, child.training)))
        for tensors in (child._parameters, child._buffers):
            for key, tensor in tensors.items():
                items.append((key, None if tensor is None else tuple(_plain(tensor))))
        for key, value in vars(child).items():
            if not key.startswith("_") and key not in _IGNORED:
                items.extend((key, item) for item in _plain(value))
        hooks = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks
        items.append(("hooks", len(hooks)))
    return items


def equal(a: Sequence[tuple[str, Any]], index_a: int, b: Sequence[tuple[str, Any]], index_b: int) -> bool:
    """Whether two signatures agree; an integer that counts the modules of the list is no difference."""
    if len(a) != len(b):
        return False
    for (name_x, x), (name_y, y) in zip(a, b, strict=True):
        if name_x != name_y or type(x) is not type(y):
            return False
        if x != y and not (type(x) is int and _counts(name_x, x - index_a, y - index_b)):
            return False
    return True


def _counts(name: str, offset_x: int, offset_y: int) -> bool:
    """Whether an attribute is the module's index, or says by its name that it counts and follows the index."""
    return offset_x == offset_y and (offset_x == 0 or bool(_COUNTER.search(name)))


def groups(modules: Sequence[nn.Module]) -> list[list[int]]:
    """Partition the indices of `modules` into structurally equal ones, in order.

    >>> from torch import nn
    >>> groups([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)])
    [[0, 2], [1]]
    """
    found: list[list[int]] = []
    signatures = [signature(m) for m in modules]
    for i, sig in enumerate(signatures):
        for group in found:
            if equal(signatures[group[0]], group[0], sig, i):
                group.append(i)
                break
        else:
            found.append([i])
    return found


def repeated_lists(model: nn.Module) -> dict[str, list[list[nn.Module]]]:
    """Lists of blocks: FQN of the list (or of the module whose attributes they are) -> groups of equal members.

    A list holds blocks if two members are equal, or if two are of one type with two weight matrices or more and none
    holds such a list itself. A member of such a list is one block, and lists inside it are not looked at; unless
    it is a stage, which does little but run a list of its own.
    """
    found: dict[str, list[list[nn.Module]]] = {}

    def walk(module: nn.Module, fqn: str) -> None:
        members = _candidates(module)
        blocks: list[nn.Module] = []
        if _holds_blocks(members) and not any(_is_stage(m) for m in members):
            found[fqn] = [[members[i] for i in g] for g in groups(members)]
            blocks = members
        for name, child in module.named_children():
            if not any(child is block for block in blocks):
                walk(child, f"{fqn}.{name}" if fqn else name)

    walk(model, "")
    return found


def _candidates(module: nn.Module) -> list[nn.Module]:
    """Children that may repeat each other: all of a list, or attributes (h0, h1, ...) that are most of a module."""
    children = list(module.children())
    if isinstance(module, LISTS):
        return children
    kinds: dict[type, list[nn.Module]] = {}
    for child in children:
        if composite(child) and not isinstance(child, LISTS) and not _holds_lists(child):
            kinds.setdefault(type(child), []).append(child)
    most = max(kinds.values(), key=len, default=[])
    large = 2 * sum(_numel(m) for m in most) > _numel(module)
    return most if len(most) >= FEWEST_ATTRIBUTES and large else []


def composite(module: nn.Module) -> bool:
    """Whether it has submodules of its own."""
    return any(True for _ in module.children())


def _holds_blocks(members: Sequence[nn.Module]) -> bool:
    if len(members) < 2:
        return False
    signatures = [signature(m) for m in members]
    for i, sig in enumerate(signatures):
        if any(equal(signatures[j], j, sig, i) for j in range(i)):
            return True
    return _repeats_a_type(members) and not any(_holds_lists(m) for m in members)


def _repeats_a_type(members: Sequence[nn.Module]) -> bool:
    """Whether two members of one type have submodules and more than one weight matrix (no convolution and its norm)."""
    kinds = [type(m) for m in members if composite(m) and sum(p.dim() > 1 for p in m.parameters()) > 1]
    return len(set(kinds)) < len(kinds)


def _holds_lists(module: nn.Module) -> bool:
    """Whether a list that repeats a type is somewhere inside."""
    return any(isinstance(inner, LISTS) and _repeats_a_type(list(inner.children())) for inner in module.modules())


def _is_stage(module: nn.Module) -> bool:
    """Whether `module` does little but run lists of blocks (a level of a U-Net, a stage of a Swin or ResNet).

    The lists are its own children and hold most of its parameters, and at most two other children have any (what
    changes the resolution), none of them a router of experts. A block has more: attention, its norms.
    """
    if type(module) is nn.ModuleDict:
        return False
    if isinstance(module, LISTS):
        return _repeats_a_type(list(module.children()))
    children = list(module.children())
    lists = [c for c in children if isinstance(c, LISTS) and _repeats_a_type(list(c.children()))]
    others = [c for c in children if not isinstance(c, LISTS) and _numel(c)]
    if any(_routes(module, others, len(inner)) for inner in lists):
        return False
    return len(others) <= 2 and 2 * sum(_numel(inner) for inner in lists) > _numel(module)


def _routes(module: nn.Module, others: Sequence[nn.Module], experts: int) -> bool:
    """Whether a matrix beside a list has one row or column for each of its members: a router's."""
    beside = [*module.parameters(recurse=False), *(p for other in others for p in other.parameters(recurse=False))]
    return any(p.dim() == 2 and experts in p.shape for p in beside)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
