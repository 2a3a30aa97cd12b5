"""From graph, sharding, profile and request to the `Problem` of each mesh: the only place where costs meet layers.

    unit x (tp, microbatch)      -> UnitTimes, UnitMemory        (unit_costs.py, remembered)
    unit x meshes x variants     -> arrays of seconds and bytes  (pricing.py)
    mesh                         -> Problem

The parts of a choice sum to its times, so that the plan's breakdown and its step time are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..costmodels.memory import UnitParameters, ceil_div
from ..hardware_profiles.catalog import Profile
from ..units import DTYPE_BYTES
from .graph import ModelGraph
from .mesh import LARGEST_TP, LAYOUTS, Mesh, Space, interleaved_ends
from .pricing import (
    BYTES,
    PARTS,
    SECONDS,
    Flags,
    GroupPrices,
    Point,
    Points,
    Variant,
    data_parallel,
    price_group,
    static_parts,
)
from .problem import Choice, Layer, Problem
from .request import Request
from .sharding import ClassSharding, Sharding
from .unit_costs import KernelClock, LinkClock, UnitMemory, UnitTimes, unit_memory, unit_times
from .unit_facts import unit_facts
from .unit_launches import Launches, unit_launches


@dataclass(slots=True)
class _Batch:
    """Prices of all groups at the points asked for so far, with equal flags."""

    flags: Flags
    places: dict[Point, int]
    groups: dict[int, GroupPrices]
    choices: dict[tuple[int, int], tuple[Choice, ...]] = field(default_factory=dict)


class CostModel:
    """Prices every layer of one traced model on one hardware profile for one request.

    `compiled` says whether the runtime compiles the blocks; by default it does on GPUs. `sequence` is the sharding
    under sequence parallelism, None where that is not possible.
    """

    def __init__(
        self,
        graph: ModelGraph,
        sharding: Sharding,
        profile: Profile,
        request: Request,
        compiled: bool | None = None,
        sequence: Sharding | None = None,
    ) -> None:
        self.graph = graph
        self.sharding = sharding
        self.sequence = sequence
        self.profile = profile
        self.request = request
        self.device = profile.device.shared_by(request.gpus)
        self.links = profile.links.with_node_size(request.gpus_per_node).within(request.gpus)
        self.compiled = self.device.kind == "cuda" if compiled is None else compiled
        self.clocks = {piped: self._clock(piped) for piped in (False, True)}
        self.link_clock = LinkClock(self.links)
        self.facts = unit_facts(graph)
        self._far = max((level.size for level in self.links.levels if level.size is not None), default=1)
        self._launches: dict[tuple[int, bool, bool], Launches] = {}
        self._times: dict[tuple[object, ...], UnitTimes] = {}
        self._memory: dict[tuple[object, ...], UnitMemory] = {}
        self._parameters: dict[tuple[int, int, bool], UnitParameters] = {}
        self._buffer_bytes = [
            sum(graph.parameters[n].numel * DTYPE_BYTES[graph.parameters[n].dtype] for n in facts.buffer_names)
            for facts in self.facts
        ]
        self._groups: dict[tuple[int, bool], list[int]] = {}
        self._wires: dict[tuple[int, int], list[int]] = {}
        self._batches: dict[Flags, list[_Batch]] = {}
        self._places: dict[Mesh, tuple[_Batch, int]] = {}
        self._ends: dict[tuple[int, int], tuple[int, ...] | None] = {}
        self._limits: dict[int, int] = {}

    def _clock(self, piped: bool) -> KernelClock:
        """Kernel times without or within a pipeline.

        A pipeline's gaps leave the GPU below its power limit, so products run at their burst rate there (measured:
        28 % faster than under FSDP); and nothing is gathered per microbatch, so the host issues operators faster.
        """
        gathers = self.request.gpus > 1 and not piped
        return KernelClock(self.device, self.compiled, "fully_shard" if gathers else "eager", sustained=not piped)

    def times(self, position: int, tp: int, b: int, piped: bool, sequence: bool = False) -> UnitTimes:
        """Seconds of the unit at `position` (see `UnitTimes`); `piped` = one stage of several."""
        unit = self.graph.units[position]
        fused = self.facts[position].may_recompute  # the units that the runtime compiles
        key = (unit.class_index, tp, b, piped, sequence and tp > 1, fused)
        if key not in self._times:
            launches = self._unit_launches(position, tp > 1, sequence and tp > 1)
            self._times[key] = unit_times(launches, tp, b, self.clocks[piped], fused)
        return self._times[key]

    def _unit_launches(self, position: int, divided: bool, sequence: bool) -> Launches:
        """What the unit at `position` launches, cut by tensor parallelism or whole."""
        key = (self.graph.units[position].class_index, divided, sequence)
        if key not in self._launches:
            sharding = self.class_sharding(position, sequence) if divided else None
            self._launches[key] = unit_launches(self.graph.classes[key[0]], sharding)
        return self._launches[key]

    def memory(self, position: int, tp: int, b: int, sequence: bool = False) -> UnitMemory:
        """Bytes kept by the unit at `position` (see `UnitMemory`)."""
        facts = self.facts[position]
        key = (facts.kind, facts.may_recompute, tp, b, sequence and tp > 1)
        if key not in self._memory:
            cls = self.graph.classes[self.graph.units[position].class_index]
            sharding = self.class_sharding(position, sequence)
            compiled = self.compiled and facts.may_recompute
            self._memory[key] = unit_memory(cls, sharding, tp, b, facts.elsewhere, compiled)
        return self._memory[key]

    def sharding_of(self, mesh: Mesh) -> Sharding:
        """The tensor-parallel layout under a mesh."""
        return self.sequence if mesh.sequence_parallel and self.sequence is not None else self.sharding

    def class_sharding(self, position: int, sequence: bool = False) -> ClassSharding:
        """What tp does to the unit at `position`."""
        sharding = self.sequence if sequence and self.sequence is not None else self.sharding
        return sharding.of_class(self.graph.units[position].class_index)

    def may_replicate(self, position: int) -> bool:
        """Whether the unit may run whole on every tp rank while others are cut.

        It must have weights that tp would cut, share none of them, and neither take nor give a tensor in parts.
        """
        facts, unit = self.facts[position], self.graph.units[position]
        cls, sharding = self.graph.classes[unit.class_index], self.class_sharding(position)
        borders = any(sharding.tensor_split[t] for t in (*cls.inputs, *cls.outputs))
        cut = any(name in self.sharding.parameter_split for name in facts.parameter_names)
        return facts.own_group and cut and not borders

    def parameters(self, position: int, tp: int, piped: bool) -> UnitParameters:
        """Elements of the unit's parameters on one tp rank; tied ones count once where one stage has them all."""
        key = (position, tp, piped)
        if key not in self._parameters:
            facts = self.facts[position]
            trainable = frozen = 0
            for name in facts.parameter_names + (facts.shared_names if piped else ()):
                parameter = self.graph.parameters[name]
                divided = tp > 1 and name in self.sharding.parameter_split
                local = ceil_div(parameter.numel, tp) if divided else parameter.numel
                if parameter.requires_grad:
                    trainable += local
                else:
                    frozen += local
            self._parameters[key] = UnitParameters(trainable, frozen)
        return self._parameters[key]

    def neighbourhood(
        self, position: int, tp: int, piped: bool, whole: bool = False
    ) -> tuple[UnitParameters, UnitParameters, UnitParameters]:
        """Parameters of a unit (`whole`: not cut by tp), of the one before it and of the one after it."""
        nothing, last = UnitParameters(0), len(self.facts) - 1
        before = self.parameters(position - 1, tp, piped) if position else nothing
        after = self.parameters(position + 1, tp, piped) if position < last else nothing
        return self.parameters(position, 1 if whole else tp, piped), before, after

    def groups(self, tp: int, piped: bool) -> list[int]:
        """For every unit the first unit that is priced like it."""
        key = (tp, piped)
        if key not in self._groups:
            first: dict[object, int] = {}
            self._groups[key] = []
            for position, facts in enumerate(self.facts):
                own = (facts.kind, facts.may_recompute, facts.own_group, self._buffer_bytes[position], position == 0)
                own += self.request.pins.layer_key(self.graph.units[position].fqn)
                own += (self.may_replicate(position), self.parameters(position, 1, piped))
                group = first.setdefault((own, self.neighbourhood(position, tp, piped)), position)
                self._groups[key].append(group)
        return self._groups[key]

    @cached_property
    def space(self) -> Space:
        """What the model allows: degrees, stages, and near-equal chunks."""
        most = min(self.request.gpus, max(LARGEST_TP, self.request.gpus_per_node))
        degrees = self.sharding.degrees_allowed(most)
        split = self.sequence.degrees_allowed(most) if self.sequence is not None else []
        stages = 1 + sum(facts.cut_after for facts in self.facts)
        layouts: dict[int, tuple[int, ...]] = {}
        for chunks in range(2, stages + 1):
            found = tuple(k for k in range(len(LAYOUTS)) if self.ends(chunks, k) is not None)
            if found:
                layouts[chunks] = found
        return Space(tuple(degrees), stages, tuple(d for d in split if d > 1), layouts)

    @cached_property
    def blocks(self) -> list[int]:
        """Positions of the blocks: what repeats, the working members of lists, or all working units without any."""
        working = [p for p, facts in enumerate(self.facts) if facts.may_recompute]
        listed = [p for p in working if self.graph.units[p].fqn.rpartition(".")[2].isdigit()]
        return listed or working

    def ends(self, chunks: int, layout: int) -> tuple[int, ...] | None:
        """Where near-equal chunks end (see `interleaved_ends`)."""
        key = (chunks, layout)
        if key not in self._ends:
            cuts = [p for p, facts in enumerate(self.facts) if facts.cut_after]
            self._ends[key] = interleaved_ends(self.blocks, cuts, len(self.facts), chunks, layout)
        return self._ends[key]

    @staticmethod
    def flags(mesh: Mesh) -> Flags:
        """What decides which formulas hold for a mesh.

        With one microbatch not all gradients exist at once: when a unit's gradient is made, its activations are
        freed, so a unit holds the larger of the two (and both only while it runs).
        """
        every = mesh.gradient_sync == "every"
        stays = mesh.microbatches > 1
        return Flags(mesh.tp, mesh.pp > 1, mesh.sequence_parallel, every, stays, mesh.dp_shard > 1)

    def point(self, mesh: Mesh) -> Point:
        """The numbers of a mesh that prices depend on; strides beyond every domain are all alike."""
        strides = (min(self._far, mesh.stride(axis)) for axis in ("tp", "dp_shard", "dp_replicate"))
        return Point(mesh.microbatch_size, mesh.dp_shard, mesh.dp_replicate, *strides)

    def prepare(self, meshes: Iterable[Mesh]) -> None:
        """Price all groups for these meshes at once, where they have no prices yet."""
        wanted: dict[Flags, dict[Point, list[Mesh]]] = {}
        for mesh in meshes:
            if mesh in self._places:
                continue
            flags, point = self.flags(mesh), self.point(mesh)
            known = next((batch for batch in self._batches.get(flags, ()) if point in batch.places), None)
            if known is not None:
                self._places[mesh] = known, known.places[point]
            else:
                wanted.setdefault(flags, {}).setdefault(point, []).append(mesh)
        for flags, new in wanted.items():
            points = Points.of(list(new))
            heads = sorted(set(self.groups(flags.tp, flags.piped)))
            prices = {head: price_group(self, head, flags, points) for head in heads}
            batch = _Batch(flags, {p: i for i, p in enumerate(new)}, prices)
            self._batches.setdefault(flags, []).append(batch)
            self._places.update({mesh: (batch, i) for i, those in enumerate(new.values()) for mesh in those})

    def batch(self, mesh: Mesh) -> tuple[_Batch, int]:
        """The prices that hold for a mesh, and its place among them."""
        if mesh not in self._places:
            self.prepare([mesh])
        return self._places[mesh]

    def layer(self, position: int, mesh: Mesh) -> tuple[Choice, ...]:
        """Choices of the unit at `position` under `mesh`."""
        group = self.groups(mesh.tp, mesh.pp > 1)[position]
        batch, place = self.batch(mesh)
        if (group, place) not in batch.choices:
            prices = batch.groups[group]
            names = [*SECONDS, *BYTES]
            columns = [prices.numbers[name][:, place].tolist() for name in names]
            batch.choices[group, place] = tuple(
                _choice(variant, dict(zip(names, values, strict=True)))
                for variant, *values in zip(prices.variants, *columns, strict=True)
            )
        return batch.choices[group, place]

    def parts(self, position: int, mesh: Mesh, choice: int) -> dict[str, float]:
        """Seconds of one choice by part: per microbatch (forward + backward), and once a step."""
        group = self.groups(mesh.tp, mesh.pp > 1)[position]
        prices = price_group(self, group, self.flags(mesh), Points.of([self.point(mesh)]), with_parts=True)
        return {name: float(prices.parts[name][choice, 0]) for name in PARTS}

    def static_parts(self, position: int, mesh: Mesh, choice: Choice) -> dict[str, int]:
        """Bytes of the unit that stay on one rank, by part."""
        flags = self.flags(mesh)
        own, *_ = self.neighbourhood(position, mesh.tp, flags.piped, choice.sharding == "replicate")
        dp = data_parallel(self.request, choice.zero_stage, flags, mesh.dp_shard, mesh.dp_replicate)
        return {**static_parts(own, dp), "buffers": self.buffer_bytes(position)}

    def buffer_bytes(self, position: int) -> int:
        """Bytes of the buffers that the unit is the first to use."""
        return self._buffer_bytes[position]

    def problem(self, mesh: Mesh) -> Problem:
        """The planning problem of one mesh."""
        stride = mesh.stride("pp")
        wires = self.wires(mesh)
        layers: list[Layer] = []
        equal: dict[tuple[int, bool, int], Layer] = {}
        for position, group in enumerate(self.groups(mesh.tp, mesh.pp > 1)):
            cut = self.facts[position].cut_after and mesh.pp > 1
            key = (group, cut, wires[position] if cut else 0)
            if key not in equal:
                send = self.link_clock.seconds("send_recv", key[2], mesh.pp, stride) if cut else 0.0
                choices = self.layer(position, mesh)
                equal[key] = Layer(kind=len(equal), choices=choices, cut_after=cut, send_s=send, cut_bytes=key[2])
            layers.append(equal[key])
        return Problem(
            layers=tuple(layers),
            stages=mesh.pp,
            microbatches=mesh.microbatches,
            schedule=mesh.schedule,
            memory_bytes=self.active_limit(mesh),
            step_fixed_s=self.step_fixed_s(mesh),
            virtual=mesh.virtual,
            ends=self.ends(mesh.pp * mesh.virtual, mesh.layout) if mesh.virtual > 1 else None,
        )

    def fixed_bytes(self, mesh: Mesh) -> dict[str, int]:
        """Bytes on every device before the first tensor: CUDA context, and NCCL by its communicators."""
        device = self.device
        groups = sum(degree > 1 for degree in (mesh.tp, mesh.pp, mesh.dp_shard, mesh.dp_replicate))
        nccl = device.nccl_base_bytes + groups * device.nccl_communicator_bytes
        return {"context": device.context_bytes, "nccl": nccl if groups else 0}

    def reserve_bytes(self, active_bytes: int) -> int:
        """What the allocator reserves above the peak of active bytes."""
        return math.ceil(self.device.reserve_fraction * active_bytes)

    def active_limit(self, mesh: Mesh) -> int:
        """The largest peak of active bytes whose device bytes (reserve, context, NCCL) stay within the limit."""
        room = self.request.memory_limit_bytes - sum(self.fixed_bytes(mesh).values())
        if room not in self._limits:
            active = math.floor(room / (1 + self.device.reserve_fraction))
            while active > 0 and active + self.reserve_bytes(active) > room:
                active -= 1
            self._limits[room] = max(active, 0)
        return self._limits[room]

    def step_fixed_s(self, mesh: Mesh) -> float:
        """Once a step: the all-reduce of the gradient norm over all ranks."""
        return self.link_clock.seconds("all_reduce", 4, mesh.world_size, 1)

    def wires(self, mesh: Mesh) -> list[int]:
        """`wire_bytes` of every position."""
        key = (mesh.microbatch_size, mesh.tp if mesh.sequence_parallel else 1)
        if key not in self._wires:
            self._wires[key] = [self.wire_bytes(position, mesh) for position in range(len(self.facts))]
        return self._wires[key]

    def wire_bytes(self, position: int, mesh: Mesh) -> int:
        """Bytes that each rank sends forward for one microbatch where the pipeline is cut right after the unit.

        A stream that is split along its tokens is sent in its parts.
        """
        total, b = 0.0, mesh.microbatch_size
        split = self.sequence.sequence.streams if mesh.sequence_parallel and self.sequence is not None else ()
        for source, output in self.graph.units[position].wire:
            cls = self.graph.classes[self.graph.units[source].class_index]
            spec = cls.tensors[cls.outputs[output]]
            elements = 1.0
            for d in spec.shape:
                elements *= d.at(b)
            total += elements * DTYPE_BYTES[spec.dtype] / (mesh.tp if (source, output) in split else 1)
        return round(total)


def _choice(variant: Variant, numbers: dict[str, float]) -> Choice:
    sizes = {name: int(numbers.pop(name)) for name in BYTES}
    return Choice(variant.recompute, **numbers, **sizes, zero_stage=variant.zero_stage, sharding=variant.sharding)


def breakdown(
    model: CostModel, mesh: Mesh, boundaries: Sequence[int], choices: Sequence[int], step_time_s: float
) -> dict[str, float]:
    """The step time by part on the busiest rank; the parts sum to `step_time_s`.

    "bubble" is what remains: waiting for other stages, transfers, and the fixed cost of a step.
    """
    names = ("compute", "recompute", "tp_comm", "dp_comm", "optimizer")
    ranks = [dict.fromkeys(names, 0.0) for _ in range(mesh.pp)]
    known: dict[tuple[int, int], dict[str, float]] = {}
    groups, m = model.groups(mesh.tp, mesh.pp > 1), mesh.microbatches
    for chunk, (begin, end) in enumerate(zip((0, *boundaries), boundaries, strict=False)):
        total = ranks[chunk % mesh.pp]
        for position in range(begin, end):
            key = (groups[position], choices[position])
            if key not in known:
                known[key] = model.parts(position, mesh, choices[position])
            parts = known[key]
            total["compute"] += m * parts["compute_s"]
            total["recompute"] += m * parts["recompute_s"]
            total["tp_comm"] += m * parts["tp_comm_s"]
            total["dp_comm"] += m * parts["dp_comm_s"] + parts["once_dp_comm_s"]
            total["optimizer"] += parts["optimizer_s"]
    busiest = max(ranks, key=lambda t: sum(t.values()))
    return {**busiest, "bubble": step_time_s - sum(busiest.values())}
