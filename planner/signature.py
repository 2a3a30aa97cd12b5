"""Which modules of a list are structurally equal, so that one can stand for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_SIMPLE = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)
_IGNORED = {"training", "_is_full_backward_hook", "_is_hf_initialized"}


def _plain(value: Any) -> Any:
    """`value` as nested tuples of simple items; objects by their type only."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((str(k), _plain(v)) for k, v in value.items())
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype), value.requires_grad)
    if callable(value):
        return ("callable", getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__))
    return ("object", type(value).__module__, type(value).__qualname__)


def signature(module: nn.Module) -> list[Any]:
    """Type, tensors and simple attributes of `module` and all its submodules, as a flat list."""
    items: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        items.append((name, type(child).__module__, type(child).__qualname__, child.training))
        for kind, tensors in (("parameter", child._parameters), ("buffer", child._buffers)):
            for key, tensor in tensors.items():
                items.append((kind, key, None if tensor is None else _plain(tensor)))
        for key, value in vars(child).items():
            if not key.startswith("_") and key not in _IGNORED:
                items.append(key)
                items.extend(_flat(_plain(value)))
        hooks = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks
        items.append(("hooks", len(hooks)))
    return items


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [len(value), *(item for v in value for item in _flat(v))]
    return [value]


def equal(a: Sequence[Any], index_a: int, b: Sequence[Any], index_b: int) -> bool:
    """Whether two signatures agree, an integer that is the module's own index counting as equal."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if type(x) is not type(y):
            return False
        if x != y and not (type(x) is int and x == index_a and y == index_b):
            return False
    return True


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
    """Outermost lists of blocks: FQN of the list -> groups of equal members.

    A list holds blocks if two members are equal but for floats (rates of stochastic depth), or if two are of one
    type with submodules of its own and none holds such a list itself. A member of such a list is one block: lists
    inside it are not looked at.
    """
    found: dict[str, list[list[nn.Module]]] = {}

    def walk(module: nn.Module, fqn: str) -> None:
        members = list(module.children())
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and _holds_blocks(members):
            found[fqn] = [[members[i] for i in g] for g in groups(members)]
            return
        for name, child in module.named_children():
            walk(child, f"{fqn}.{name}" if fqn else name)

    walk(model, "")
    return found


def _holds_blocks(members: Sequence[nn.Module]) -> bool:
    if len(members) < 2:
        return False
    loose = [[0.0 if isinstance(x, float) else x for x in signature(m)] for m in members]
    for i in range(len(members)):
        if any(equal(loose[j], j, loose[i], i) for j in range(i)):
            return True
    composite = [type(m) for m in members if any(True for _ in m.children())]
    return len(set(composite)) < len(composite) and not any(_holds_lists(m) for m in members)


def _holds_lists(module: nn.Module) -> bool:
    """Whether a list of modules that have submodules is somewhere inside."""
    for inner in module.modules():
        if isinstance(inner, (nn.Sequential, nn.ModuleList)):
            composite = [type(m) for m in inner.children() if any(True for _ in m.children())]
            if len(set(composite)) < len(composite):
                return True
    return False
