"""From graph, sharding, profile and request to the `Problem` of each mesh: the only place where costs meet layers.

    unit x (tp, microbatch)          -> UnitTimes, UnitMemory           (unit_costs.py, remembered)
    unit x mesh x recomputation      -> Parts (seconds by part) -> Choice
    mesh                             -> Problem

`Parts` of a choice sum to its times, so that the plan's breakdown and its step time are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..costmodels.collectives import collective_s
from ..costmodels.compute import clip_s, kernel_s, optimizer_s
from ..costmodels.fully_shard import Traffic
from ..costmodels.memory import (
    DataParallel,
    UnitParameters,
    backward_transient_bytes,
    ceil_div,
    kept_gathered_bytes,
    sharded_state_bytes,
)
from ..hardware_profiles.catalog import Profile
from ..units import DTYPE_BYTES
from .graph import ModelGraph
from .mesh import Mesh
from .pins import RECOMPUTE
from .problem import Choice, Layer, Problem
from .request import Request
from .sharding import Sharding
from .unit_costs import KernelClock, UnitMemory, UnitTimes, unit_memory, unit_times
from .unit_facts import unit_facts


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one layer by part: per microbatch (forward + backward), and once a step."""

    compute_s: float = 0.0
    recompute_s: float = 0.0
    tp_comm_s: float = 0.0
    dp_comm_s: float = 0.0
    once_dp_comm_s: float = 0.0
    optimizer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StaticParts:
    """Bytes of one layer that stay, by part."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    buffers: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.buffers


class CostModel:
    """Prices every layer of one traced model on one hardware profile for one request.

    `compiled` says whether the runtime compiles the blocks; by default it does on GPUs.
    """

    def __init__(
        self,
        graph: ModelGraph,
        sharding: Sharding,
        profile: Profile,
        request: Request,
        compiled: bool | None = None,
    ) -> None:
        self.graph = graph
        self.sharding = sharding
        self.profile = profile
        self.request = request
        self.device = profile.device.shared_by(request.gpus)
        self.links = profile.links.with_node_size(request.gpus_per_node)
        self.compiled = self.device.kind == "cuda" if compiled is None else compiled
        self.clocks = {piped: self._clock(piped) for piped in (False, True)}
        self.facts = unit_facts(graph)
        self._times: dict[tuple[int, int, int, bool], UnitTimes] = {}
        self._memory: dict[tuple[int, int, int], UnitMemory] = {}
        self._parameters: dict[tuple[int, int, bool], UnitParameters] = {}
        self._buffer_bytes = [
            sum(graph.parameters[n].numel * DTYPE_BYTES[graph.parameters[n].dtype] for n in facts.buffer_names)
            for facts in self.facts
        ]
        self._groups: dict[tuple[int, bool], list[int]] = {}
        self._wires: dict[int, list[int]] = {}
        self._layers: dict[tuple[object, ...], tuple[tuple[Choice, ...], tuple[Parts, ...]]] = {}

    def _clock(self, piped: bool) -> KernelClock:
        """Kernel times without or within a pipeline.

        A pipeline's gaps leave the GPU below its power limit, so products run at their burst rate there (measured:
        28 % faster than under FSDP); and nothing is gathered per microbatch, so the host issues operators faster.
        """
        gathers = self.request.gpus > 1 and not piped
        return KernelClock(self.device, self.compiled, "fully_shard" if gathers else "eager", sustained=not piped)

    def times(self, position: int, tp: int, b: int, piped: bool) -> UnitTimes:
        """Seconds of the unit at `position` (see `UnitTimes`); `piped` = one stage of several."""
        unit = self.graph.units[position]
        key = (unit.class_index, tp, b, piped)
        if key not in self._times:
            cls = self.graph.classes[unit.class_index]
            fused = self.facts[position].may_recompute  # the units that the runtime compiles
            self._times[key] = unit_times(
                cls, self.sharding.of_class(unit.class_index), tp, b, self.clocks[piped], self.links, fused
            )
        return self._times[key]

    def memory(self, position: int, tp: int, b: int) -> UnitMemory:
        """Bytes kept by the unit at `position` (see `UnitMemory`)."""
        facts = self.facts[position]
        key = (facts.kind, tp, b)
        if key not in self._memory:
            index = self.graph.units[position].class_index
            self._memory[key] = unit_memory(
                self.graph.classes[index],
                self.sharding.of_class(index),
                tp,
                b,
                facts.elsewhere,
                self.compiled and facts.may_recompute,
            )
        return self._memory[key]

    def parameters(self, position: int, mesh: Mesh) -> UnitParameters:
        """Elements of the unit's parameters on one tp rank; tied ones count once where one stage has them all."""
        key = (position, mesh.tp, mesh.pp > 1)
        if key not in self._parameters:
            self._parameters[key] = self._count_parameters(position, mesh)
        return self._parameters[key]

    def _count_parameters(self, position: int, mesh: Mesh) -> UnitParameters:
        facts = self.facts[position]
        names = facts.parameter_names if mesh.pp == 1 else facts.parameter_names + facts.shared_names
        trainable = frozen = 0
        for name in names:
            parameter = self.graph.parameters[name]
            divided = mesh.tp > 1 and name in self.sharding.parameter_split
            local = ceil_div(parameter.numel, mesh.tp) if divided else parameter.numel
            if parameter.requires_grad:
                trainable += local
            else:
                frozen += local
        return UnitParameters(trainable, frozen)

    def data_parallel(self, mesh: Mesh, position: int) -> DataParallel:
        """How the unit's parameters live on the data-parallel ranks."""
        resharded = mesh.zero_stage == 3 and self.facts[position].own_group
        return DataParallel(
            dp_shard=mesh.dp_shard,
            dp_replicate=mesh.dp_replicate,
            reshard_after_forward=resharded,
            sync_every=mesh.gradient_sync == "every",
            compute_bytes=2 if self.request.precision == "bf16" else 4,
            optimizer_states=2 if self.request.optimizer == "adamw" else 0,
        )

    def layer(self, position: int, mesh: Mesh) -> tuple[tuple[Choice, ...], tuple[Parts, ...]]:
        """Choices of the unit at `position` under `mesh`, and the parts of each."""
        first = self.groups(mesh)[position]
        degrees = (mesh.tp, mesh.microbatch_size, mesh.dp_shard, mesh.dp_replicate)
        key = (first, *degrees, mesh.zero_stage, mesh.gradient_sync, mesh.pp > 1, self.gradients_stay(mesh))
        if key not in self._layers:
            self._layers[key] = self._price(first, mesh, *self.neighbourhood(first, mesh))
        return self._layers[key]

    def neighbourhood(self, position: int, mesh: Mesh) -> tuple[UnitParameters, UnitParameters, UnitParameters]:
        """Parameters of a unit, of the one before it and of the one after it."""
        nothing, last = UnitParameters(0), len(self.facts) - 1
        before = self.parameters(position - 1, mesh) if position else nothing
        after = self.parameters(position + 1, mesh) if position < last else nothing
        return self.parameters(position, mesh), before, after

    def groups(self, mesh: Mesh) -> list[int]:
        """For every unit the first unit that is priced like it (the same under all meshes of equal tp)."""
        key = (mesh.tp, mesh.pp > 1)
        if key not in self._groups:
            first: dict[object, int] = {}
            self._groups[key] = []
            for position, facts in enumerate(self.facts):
                own = (facts.kind, facts.may_recompute, facts.own_group, self._buffer_bytes[position], position == 0)
                own += self.request.pins.layer_key(self.graph.units[position].fqn)
                group = first.setdefault((own, self.neighbourhood(position, mesh)), position)
                self._groups[key].append(group)
        return self._groups[key]

    @staticmethod
    def gradients_stay(mesh: Mesh) -> bool:
        """Whether all gradients exist while activations are at their peak.

        With one microbatch they do not: when a unit's gradient is made, its activations are freed, so a unit holds
        the larger of the two (and both only while it runs).
        """
        return mesh.microbatches > 1

    def _price(
        self, position: int, mesh: Mesh, p: UnitParameters, before: UnitParameters, after: UnitParameters
    ) -> tuple[tuple[Choice, ...], tuple[Parts, ...]]:
        dp = self.data_parallel(mesh, position)
        times = self.times(position, mesh.tp, mesh.microbatch_size, mesh.pp > 1)
        memory = self.memory(position, mesh.tp, mesh.microbatch_size)
        traffic = self._traffic(p, dp, mesh)
        static = self.static_parts(position, mesh).total
        gradients = 0 if self.gradients_stay(mesh) else 4 * ceil_div(p.trainable, dp.dp_shard)
        choices, parts = [], []
        for mode in RECOMPUTE if self.facts[position].may_recompute else ("none",):
            fqn, may = self.graph.units[position].fqn, self.facts[position].may_recompute
            if may and not self.request.pins.allows_layer(fqn, recompute=mode):
                continue
            again = {"none": 0.0, "selective": times.again_selective_s, "full": times.again_full_s}[mode]
            again_tp = times.tp_forward_s if mode == "full" else 0.0
            forward = times.forward_s + times.tp_forward_s
            backward = times.backward_s + times.tp_backward_s + again + again_tp
            f, b, f_once, b_once = traffic.exposed(forward, backward, dp, first=position == 0)
            kept = {"none": memory.none, "selective": memory.selective, "full": memory.full}[mode]
            workspace = memory.workspace + (memory.none - kept)
            optimizer = self._optimizer_s(p, dp)
            choices.append(
                Choice(
                    name=mode,
                    forward_s=f,
                    backward_s=b,
                    first_forward_extra_s=f_once,
                    last_backward_extra_s=b_once,
                    tail_s=optimizer,
                    static_bytes=static,
                    saved_bytes=max(kept, gradients),
                    transient_bytes=min(kept, gradients) + backward_transient_bytes(workspace, p, before, after, dp),
                )
            )
            parts.append(
                Parts(
                    compute_s=times.forward_s + times.backward_s,
                    recompute_s=again,
                    tp_comm_s=times.tp_forward_s + times.tp_backward_s + again_tp,
                    dp_comm_s=f + b - forward - backward,
                    once_dp_comm_s=f_once + b_once,
                    optimizer_s=optimizer,
                )
            )
        return tuple(choices), tuple(parts)

    def static_parts(self, position: int, mesh: Mesh) -> StaticParts:
        """Bytes of the unit that stay on one rank, by part (gradients only where they stay)."""
        p, dp = self.parameters(position, mesh), self.data_parallel(mesh, position)
        per_copy = 4 * ceil_div(p.trainable, dp.dp_shard)
        state = sharded_state_bytes(p, dp)
        return StaticParts(
            parameters=state - per_copy * (1 + dp.optimizer_states),
            gradients=per_copy if self.gradients_stay(mesh) else 0,
            optimizer=per_copy * dp.optimizer_states,
            gathered=kept_gathered_bytes(p, dp),
            buffers=self.buffer_bytes(position),
        )

    def buffer_bytes(self, position: int) -> int:
        """Bytes of the buffers that the unit is the first to use."""
        return self._buffer_bytes[position]

    def _optimizer_s(self, p: UnitParameters, dp: DataParallel) -> float:
        """The optimizer's step and the gradient norm on this rank's shard."""
        local = ceil_div(p.trainable, dp.dp_shard)
        return optimizer_s(local, self.device) + clip_s(local, self.device)

    def _traffic(self, p: UnitParameters, dp: DataParallel, mesh: Mesh) -> Traffic:
        links, device = self.links, self.device
        gather = collective_s("all_gather", dp.compute_bytes * p.total, dp.dp_shard, mesh.tp, links)
        reduce = collective_s("reduce_scatter", dp.reduce_bytes * p.trainable, dp.dp_shard, mesh.tp, links)
        shard = dp.reduce_bytes * ceil_div(p.trainable, dp.dp_shard)
        reduce += collective_s("all_reduce", shard, dp.dp_replicate, mesh.tp * dp.dp_shard, links)

        def copy_s(n_bytes: float) -> float:
            if not n_bytes:
                return 0.0
            return kernel_s("memory", 0.0, n_bytes, (), "bfloat16", "forward", device)

        return Traffic(
            gather_s=gather,
            reduce_s=reduce,
            gather_copy_s=copy_s(2 * dp.compute_bytes * p.total),
            reduce_copy_s=copy_s((dp.compute_bytes + dp.reduce_bytes) * p.trainable),
            accumulate_s=copy_s((dp.compute_bytes + 2 * dp.reduce_bytes) * p.trainable),
            compute_slowdown=device.overlap_compute_slowdown,
            comm_slowdown=device.overlap_communication_slowdown,
        )

    def problem(self, mesh: Mesh) -> Problem:
        """The planning problem of one mesh."""
        stride = mesh.tp * mesh.dp
        wires = self.wires(mesh.microbatch_size)
        layers: list[Layer] = []
        equal: dict[tuple[int, bool, int], Layer] = {}
        for position, group in enumerate(self.groups(mesh)):
            cut = self.facts[position].cut_after and mesh.pp > 1
            key = (group, cut, wires[position] if cut else 0)
            if key not in equal:
                send = collective_s("send_recv", key[2], 2, stride, self.links) if cut else 0.0
                choices, _ = self.layer(position, mesh)
                equal[key] = Layer(kind=len(equal), choices=choices, cut_after=cut, send_s=send, cut_bytes=key[2])
            layers.append(equal[key])
        return Problem(
            layers=tuple(layers),
            stages=mesh.pp,
            microbatches=mesh.microbatches,
            schedule=mesh.schedule,
            memory_bytes=self.active_limit(mesh),
            step_fixed_s=self.step_fixed_s(mesh),
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
        active = math.floor(room / (1 + self.device.reserve_fraction))
        while active > 0 and active + self.reserve_bytes(active) > room:
            active -= 1
        return max(active, 0)

    def step_fixed_s(self, mesh: Mesh) -> float:
        """Once a step: the all-reduce of the gradient norm over all ranks."""
        return collective_s("all_reduce", 4, mesh.world_size, 1, self.links)

    def wires(self, b: int) -> list[int]:
        """`wire_bytes` of every position."""
        if b not in self._wires:
            self._wires[b] = [self.wire_bytes(position, b) for position in range(len(self.facts))]
        return self._wires[b]

    def wire_bytes(self, position: int, b: int) -> int:
        """Bytes that a cut right after the unit sends forward for one microbatch."""
        total = 0.0
        for source, output in self.graph.units[position].wire:
            cls = self.graph.classes[self.graph.units[source].class_index]
            spec = cls.tensors[cls.outputs[output]]
            elements = 1.0
            for d in spec.shape:
                elements *= d.at(b)
            total += elements * DTYPE_BYTES[spec.dtype]
        return round(total)


def breakdown(
    model: CostModel, mesh: Mesh, boundaries: Sequence[int], choices: Sequence[int], step_time_s: float
) -> dict[str, float]:
    """The step time by part on the busiest stage; the parts sum to `step_time_s`.

    "bubble" is what remains: waiting for other stages, transfers, and the fixed cost of a step.
    """
    stages = []
    begin = 0
    for end in boundaries:
        total = dict.fromkeys(("compute", "recompute", "tp_comm", "dp_comm", "optimizer"), 0.0)
        for position in range(begin, end):
            parts = model.layer(position, mesh)[1][choices[position]]
            m = mesh.microbatches
            total["compute"] += m * parts.compute_s
            total["recompute"] += m * parts.recompute_s
            total["tp_comm"] += m * parts.tp_comm_s
            total["dp_comm"] += m * parts.dp_comm_s + parts.once_dp_comm_s
            total["optimizer"] += parts.optimizer_s
        stages.append(total)
        begin = end
    busiest = max(stages, key=lambda t: sum(t.values()))
    return {**busiest, "bubble": step_time_s - sum(busiest.values())}
