"""Which modules are looked into, so that the calls inside them are the units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .chain import children_of, unit_calls
from .recording import Recording
from .signature import LISTS

LARGEST_SHARE = 4  # a unit with more than 1/4 of the FLOPs leaves no choice of pipeline stages


class Borders:
    """Which modules are looked into, so that the calls inside them are units.

    Lists, and whatever holds a list of repeated blocks; and, after the first run (which shows the FLOPs), every
    module that holds more than a quarter of the model's and spends most of them in composite modules of its own.

    Parameters
    ----------
    model : nn.Module
    repeated : mapping
        What `repeated_lists` found.

    Attributes
    ----------
    opened : set of str
        FQNs of the modules that are looked into.
    """

    def __init__(self, model: nn.Module, repeated: Mapping[str, Sequence[Sequence[nn.Module]]]) -> None:
        self.opened = {""}
        self._blocks: set[str] = set()
        self._settled = False
        members = {id(m) for groups in repeated.values() for group in groups for m in group}
        for fqn in repeated:
            parts = fqn.split(".")
            self.opened.update(".".join(parts[: i + 1]) for i in range(len(parts)))
        self._open_lists(model, "", members)

    def _open_lists(self, module: nn.Module, fqn: str, members: set[int]) -> None:
        for name, child in module.named_children():
            path = f"{fqn}.{name}" if fqn else name
            if id(child) in members or isinstance(module, LISTS):
                self._blocks.add(path)
            if id(child) in members:
                continue
            if isinstance(child, LISTS):
                self.opened.add(path)
            if path in self.opened:
                self._open_lists(child, path, members)

    def settle(self, rec: Recording) -> None:
        """Open what is too large, by the FLOPs of a first run; later runs change nothing."""
        if self._settled:
            return
        self._settled = True
        flops, children = _inclusive_flops(rec), children_of(rec)
        total = sum(flops[c] for c in children.get(-1, []))
        large = True
        while large:
            large = {
                rec.calls[u].fqn
                for u in unit_calls(rec, self.opened)
                if flops[u] * LARGEST_SHARE > total
                and rec.calls[u].fqn not in self._blocks
                and 2 * sum(flops[c] for c in children.get(u, []) if c in children) > flops[u]
            }
            self.opened |= large


def _inclusive_flops(rec: Recording) -> list[float]:
    """Forward FLOPs of each call with all that runs inside it; a replayed call has those of its template."""
    flops = [0.0] * len(rec.calls)
    for op in rec.ops:
        if op.call >= 0:
            flops[op.call] += op.kernel.flops.base
    for call in reversed(rec.calls):
        if call.replay_of < 0 and call.parent >= 0:
            flops[call.parent] += flops[call.index]
    for call in rec.calls:
        if call.replay_of >= 0:
            flops[call.index] = flops[call.replay_of]
            parent = call.parent
            while parent >= 0:
                flops[parent] += flops[call.index]
                parent = rec.calls[parent].parent
    return flops
