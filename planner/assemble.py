"""From the search's answer to a `Plan`: names, placements, predictions and the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..costmodels.compute import peak_flops
from .choices import CostModel, breakdown
from .evaluate import Evaluation
from .graph import ModelGraph
from .mesh import Mesh
from .plan import (
    BatchSection,
    HardwareSection,
    InputSection,
    MeshSection,
    ModelSection,
    ModuleStyle,
    ParameterPlacement,
    Plan,
    PrecisionSection,
    PredictedSection,
    Redistribute,
    ScheduleSection,
    ShardingSection,
    StageSection,
    TensorParallelSection,
)
from .problem import Assignment
from .unit_facts import absolute_name


def mesh_section(mesh: Mesh) -> MeshSection:
    """The degrees under their long names."""
    return MeshSection(
        pipeline_parallel_degree=mesh.pp,
        data_parallel_replicate_degree=mesh.dp_replicate,
        data_parallel_shard_degree=mesh.dp_shard,
        tensor_parallel_degree=mesh.tp,
        order=mesh_order(mesh),
    )


def mesh_order(mesh: Mesh) -> list[Any]:
    """The axes outermost first; cp, always of degree 1, stands where it stands by default."""
    order = list(mesh.axes)
    order.insert(order.index("tp"), "cp")
    return order


def stage_spans(boundaries: Sequence[int]) -> list[range]:
    """Unit positions of each stage."""
    return [range(begin, end) for begin, end in zip((0, *boundaries), boundaries, strict=False)]


def stage_sections(model: CostModel, mesh: Mesh, assignment: Assignment) -> list[StageSection]:
    """One entry a chunk: its units, recomputation, FSDP groups and what crosses its borders."""
    units = model.graph.units
    spans = stage_spans(assignment.boundaries)
    keeps = plan_zero_stage(model, mesh, assignment) == 3
    sections = []
    for index, span in enumerate(spans):
        modules, recompute, groups, kept = [], {}, [], []
        for position in span:
            unit, facts = units[position], model.facts[position]
            if unit.replicated or not unit.fqn:
                continue
            if unit.fqn not in modules:
                modules.append(unit.fqn)
            choice = model.layer(position, mesh)[assignment.choices[position]]
            if choice.name != "none":
                recompute[unit.fqn] = choice.name
            if facts.own_group:
                groups.append(unit.fqn)
                if keeps and choice.zero_stage == 2:
                    kept.append(unit.fqn)
        sections.append(
            StageSection(
                index=index,
                pipeline_rank=index % mesh.pp,
                modules=modules,
                replicated_modules=[u.fqn for u in units if u.replicated],
                recompute=recompute,
                fsdp_units=groups,
                kept_gathered=kept,
                receives=wire_names(model.graph, span.start - 1) if index else [],
                sends=wire_names(model.graph, span.stop - 1) if index + 1 < len(spans) else [],
            )
        )
    return sections


def plan_zero_stage(model: CostModel, mesh: Mesh, assignment: Assignment) -> int:
    """3 where some unit lets its gathered weights go after forward, else 2."""
    levels = {
        model.layer(position, mesh)[choice].zero_stage
        for position, choice in enumerate(assignment.choices)
        if model.facts[position].own_group
    }
    return 3 if 3 in levels else 2


def whole_units(model: CostModel, mesh: Mesh, assignment: Assignment) -> list[str]:
    """Units that run whole on every tp rank although tp could cut them."""
    return [
        model.graph.units[position].fqn
        for position, choice in enumerate(assignment.choices)
        if model.layer(position, mesh)[choice].sharding == "replicate"
    ]


def _inside(name: str, units: Sequence[str]) -> bool:
    """Whether a module or parameter belongs to one of the units."""
    return any(name == unit or name.startswith(f"{unit}.") for unit in units)


def wire_names(graph: ModelGraph, position: int) -> list[str]:
    """Tensors that a cut after `position` sends, as fqn:call:leaf of the module that returns them."""
    leaves = [graph.units[source].output_leaves[output] for source, output in graph.units[position].wire]
    return [f"{fqn}:{call}:{leaf}" for fqn, call, leaf in leaves]


def tensor_parallel_section(model: CostModel, mesh: Mesh, whole: Sequence[str]) -> TensorParallelSection:
    """Styles of every sharded module (none where tp is 1); `whole` units have none."""
    sharding = model.sharding_of(mesh)
    if mesh.tp == 1:
        return TensorParallelSection()
    return TensorParallelSection(
        styles={
            fqn: ModuleStyle.model_validate(
                {
                    "style": s.style,
                    "sizes": list(s.sizes),
                    "output": s.output,
                    "parameters": dict(s.parameters),
                    "packed": {name: list(sizes) for name, sizes in s.packed},
                    "shared": list(s.shared),
                }
            )
            for fqn, s in sorted(sharding.styles.items())
            if not _inside(fqn, whole)
        },
        attention=sorted(fqn for fqn in sharding.attention if not _inside(fqn, whole)),
        loss_parallel=sharding.loss_parallel,
        sequence_parallel=mesh.sequence_parallel,
        sequence_modules=list(sharding.sequence.modules) if mesh.sequence_parallel else [],
        sequence_ends=list(sharding.sequence.ends) if mesh.sequence_parallel else [],
    )


def parameter_placements(
    model: CostModel, mesh: Mesh, stages: Sequence[StageSection], whole: Sequence[str]
) -> dict[str, ParameterPlacement]:
    """Placement of every parameter on the axes that shard it, and the stages that hold it."""
    placements = {}
    users = parameter_positions(model)
    spans = position_to_stage(model, stages)
    for name, parameter in sorted(model.graph.parameters.items()):
        if parameter.is_buffer:
            continue
        cut = mesh.tp > 1 and not _inside(name, whole)
        dim = model.sharding.parameter_split.get(name) if cut else None
        placements[name] = ParameterPlacement(
            tp="Replicate()" if dim is None else f"Shard(dim={dim})",
            dp_shard="Shard(dim=0)" if mesh.dp_shard > 1 else "Replicate()",
            stages=sorted({spans[p] for p in users.get(name, [0]) if p in spans}),
        )
    return placements


def parameter_positions(model: CostModel) -> dict[str, list[int]]:
    """Canonical parameter name -> positions of the units that read it."""
    users: dict[str, list[int]] = {}
    for position, facts in enumerate(model.facts):
        for name in facts.parameter_names + facts.shared_names:
            users.setdefault(name, []).append(position)
    return users


def position_to_stage(model: CostModel, stages: Sequence[StageSection]) -> dict[int, int]:
    """Unit position -> stage index, for units that one stage owns."""
    owner = {fqn: stage.index for stage in stages for fqn in stage.modules}
    return {u.position: owner.get(u.fqn, 0) for u in model.graph.units if not u.replicated}


def redistributes(model: CostModel, mesh: Mesh, assignment: Assignment) -> list[Redistribute]:
    """Every change of placement that the plan pays for, per microbatch, in execution order."""
    found = []
    b = mesh.microbatch_size
    if mesh.tp > 1:
        for unit in model.graph.units:
            if model.layer(unit.position, mesh)[assignment.choices[unit.position]].sharding == "replicate":
                continue
            for item in model.class_sharding(unit.position, mesh.sequence_parallel).collectives:
                found.append(
                    Redistribute.model_validate(
                        {
                            "module": absolute_name(unit.fqn, item.module),
                            "axis": "tp",
                            "collective": item.collective,
                            "phase": item.phase,
                            "bytes_per_microbatch": round(item.bytes.at(b)) * item.repeat,
                        }
                    )
                )
    for position in assignment.boundaries[:-1]:
        unit = model.graph.units[position - 1]
        n_bytes = model.wire_bytes(unit.position, mesh)
        for phase in ("forward", "backward"):
            found.append(
                Redistribute(
                    module=unit.fqn,
                    axis="pp",
                    collective="send_recv",
                    phase=phase,
                    bytes_per_microbatch=n_bytes,
                )
            )
    return found


def memory_parts(model: CostModel, mesh: Mesh, assignment: Assignment, evaluation: Evaluation) -> list[dict[str, int]]:
    """Bytes of each pipeline rank by part; the parts of a rank sum to its device bytes."""
    fixed = model.fixed_bytes(mesh)
    spans = stage_spans(assignment.boundaries)
    result = []
    for rank, memory in enumerate(evaluation.memory):
        parts: dict[str, int] = {}
        for position in (p for span in spans[rank :: mesh.pp] for p in span):
            choice = model.layer(position, mesh)[assignment.choices[position]]
            for name, size in model.static_parts(position, mesh, choice).items():
                parts[name] = parts.get(name, 0) + size
        parts["activations"] = memory.kept_bytes
        parts["transient"] = memory.transient_bytes
        assert sum(parts.values()) == memory.total_bytes
        result.append({**parts, "reserve": model.reserve_bytes(memory.total_bytes), **fixed})
    return result


def predicted_section(model: CostModel, mesh: Mesh, assignment: Assignment, evaluation: Evaluation) -> PredictedSection:
    """What the cost model expects; `step_time_s` is the evaluation's own float."""
    request, step = model.request, evaluation.step_time_s
    memory = memory_parts(model, mesh, assignment, evaluation)
    samples = request.global_batch / step
    flops = model_flops(model.graph, request.global_batch, mesh.microbatch_size)
    return PredictedSection(
        step_time_s=step,
        tokens_per_s_per_gpu=samples * tokens_per_sample(model.graph) / mesh.world_size,
        samples_per_s=samples,
        mfu=flops / (step * mesh.world_size * peak_flops(request.compute_dtype, model.profile.device)),
        peak_memory_bytes=list(evaluation.stage_bytes),
        device_bytes=[sum(parts.values()) for parts in memory],
        breakdown_s=breakdown(model, mesh, assignment.boundaries, assignment.choices, step),
        memory_bytes=memory,
        bubble_fraction=evaluation.timeline.bubble_fraction,
    )


def model_flops(graph: ModelGraph, samples: int, microbatch_size: int) -> float:
    """FLOPs of forward and backward over `samples` (attention not halved for causality), without recomputation."""
    _, per_sample, per_pair = graph.flops_forward + graph.flops_backward
    return (per_sample + per_pair * microbatch_size) * samples


def tokens_per_sample(graph: ModelGraph) -> int:
    """Sequence length for models that read token ids, 1 for the others (a sample is an image, a row)."""
    length = graph.sequence_length
    for item in graph.inputs:
        if item.dtype.startswith("int") and len(item.shape) == 2 and item.shape[1].at(1) == length:
            return length
    return 1


def input_sections(graph: ModelGraph) -> list[InputSection]:
    """The model's inputs with "B" and "S" in place of the batch and the sequence length."""
    sections = []
    for item in graph.inputs:
        shape: list[int | str] = []
        for d in item.shape:
            if d.per_sample == 1 and d.base == 0:
                shape.append("B")
            elif d.per_sample == 0 and d.base == graph.sequence_length:
                shape.append("S")
            else:
                shape.append(int(d.at(1)))
        sections.append(InputSection(name=item.name, dtype=item.dtype, shape=shape))
    return sections


def build_plan(
    model: CostModel, mesh: Mesh, assignment: Assignment, evaluation: Evaluation, fields: Mapping[str, Any]
) -> Plan:
    """The plan of one assignment; `fields` are the sections that do not depend on it (model, solver, ...)."""
    request, profile = model.request, model.profile
    stages = stage_sections(model, mesh, assignment)
    whole = whole_units(model, mesh, assignment)
    zero_stage = plan_zero_stage(model, mesh, assignment)
    return Plan(
        hardware=HardwareSection(
            name=profile.name,
            hash=profile.hash,
            file=profile.file,
            gpus=request.gpus,
            gpus_per_node=request.gpus_per_node,
            memory_limit_bytes=request.memory_limit_bytes,
            peak_flops=peak_flops(request.compute_dtype, profile.device),
            peak_name=f"{profile.name} dense {request.compute_dtype}",
        ),
        mesh=mesh_section(mesh),
        batch=BatchSection(
            global_batch=request.global_batch,
            microbatch_size=mesh.microbatch_size,
            microbatches=mesh.microbatches,
            sequence_length=request.sequence_length,
        ),
        schedule=ScheduleSection.model_validate(
            {
                "name": mesh.schedule,
                "virtual_stages": mesh.virtual,
                "gradient_sync": mesh.gradient_sync,
                "runnable": mesh.schedule != "zb",
            }
        ),
        precision=PrecisionSection.model_validate(
            {"name": request.precision, "compute_dtype": request.compute_dtype, "optimizer": request.optimizer}
        ),
        sharding=ShardingSection.model_validate({"zero_stage": zero_stage, "reshard_after_forward": zero_stage == 3}),
        stages=stages,
        tensor_parallel=tensor_parallel_section(model, mesh, whole),
        parameters=parameter_placements(model, mesh, stages, whole),
        redistributes=redistributes(model, mesh, assignment),
        predicted=predicted_section(model, mesh, assignment, evaluation),
        **fields,
    )


def model_section(graph: ModelGraph, layers: int, **fields: Any) -> ModelSection:
    """What the plan says of the model; `fields` come from the target (spec, arguments, loss)."""
    per_sample = graph.flops_forward + graph.flops_backward
    distinct = [p for p in graph.parameters.values() if not p.is_buffer]
    return ModelSection(
        name=graph.name,
        hash=graph.hash,
        parameters=sum(p.numel for p in distinct),
        trainable_parameters=sum(p.numel for p in distinct if p.requires_grad),
        buffers=sum(p.numel for p in graph.parameters.values() if p.is_buffer),
        layers=layers,
        classes=len(graph.classes),
        flops_per_sample=per_sample.per_sample,
        inputs=input_sections(graph),
        tied=[list(group) for group in graph.tied],
        batch_norm=list(graph.batch_norm),
        **fields,
    )
