"""The main job: target -> graph -> sharding -> costs -> search -> Plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from ..errors import InfeasibleError, UsageError
from ..hardware_profiles.catalog import Profile, load_profile, match_gpu
from ..units import GIB, gib
from .assemble import build_plan, model_section
from .baselines import plain_fsdp, rule_of_thumb
from .choices import CostModel
from .graph import ModelGraph
from .local_gpus import local_gpu_names
from .mesh import Mesh, enumerate_meshes
from .pins import parse_pins
from .plan import Plan, SolverSection
from .request import Request
from .search import Candidate, SearchResult, search
from .sharding import Sharding, analyse

DEFAULT_HARDWARE = "h100-sxm"
Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A plan with what it was made from, for reports."""

    plan: Plan
    graph: ModelGraph
    sharding: Sharding
    profile: Profile
    request: Request
    result: SearchResult
    seconds: Mapping[str, float]


def suggest(target: str, **options: Any) -> Plan:
    """Plan a model for a number of GPUs; the options are those of `suggest_in_detail`.

    Raises
    ------
    TpplanError
        `TargetError`, `ModelError`, `HardwareError`, `UsageError` for bad input, `InfeasibleError` if nothing fits.
    """
    return suggest_in_detail(target, **options).plan


def suggest_in_detail(
    target: str,
    *,
    gpus: int,
    gpus_per_node: int | None = None,
    hardware: str | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str = "bf16",
    optimizer: str = "adamw",
    memory_limit_gib: float | None = None,
    fix: Sequence[str] = (),
    time_limit_s: float | None = None,
    gap: float = 0.005,
    model_args: Mapping[str, str] | None = None,
    inputs: Sequence[str] = (),
    say: Say | None = None,
    on_progress: Callable[[Any], None] | None = None,
) -> Suggestion:
    """Plan a model, and keep what the plan was made from.

    Parameters
    ----------
    target : str
        ``model.py``, ``model.py:attr``, ``pkg.mod:attr``, a Hugging Face folder or config.json.
    gpus, gpus_per_node : int
        Devices; the node's size is the profile's by default.
    hardware : str, optional
        Profile name or file; by default the local GPUs' profile, else h100-sxm.
    seq_len, global_batch : int, optional
        Defaults: min(4096, the model's maximum), and max(256, gpus) samples.
    precision : {"bf16", "fp32"}
    optimizer : {"adamw", "sgd"}
    memory_limit_gib : float, optional
        GiB of one device, everything included; by default what the profile's device offers.
    fix : sequence of "axis=value"
        Pins: tp, pp, dp_replicate, dp_shard, microbatch_size, recompute, schedule, zero_stage.
    time_limit_s, gap : float
        When the search stops.
    say, on_progress : callable, optional
        Told what starts (name, text), and the search's events.

    Raises
    ------
    TpplanError
        See `suggest`.
    """
    say = say or (lambda name, text: None)
    clock = _Clock()
    pins = parse_pins(fix)
    profile, why = choose_profile(hardware)
    if gpus < 1:
        raise UsageError(f"--gpus is {gpus}; a plan needs at least one GPU.", "Give --gpus 1 or more.")
    say("hardware", f"{profile.name} ({why})")

    from .opaque import opaque_notes
    from .target import load_target
    from .trace import trace

    clock.lap("imports")
    loaded = load_target(target, model_args=dict(model_args or {}), inputs=tuple(inputs), precision=precision)
    default = loaded.sequence_default()
    length = seq_len or default.length
    request = Request(
        gpus=gpus,
        gpus_per_node=gpus_per_node or profile.gpus_per_node,
        sequence_length=length,
        global_batch=global_batch if global_batch is not None else max(256, gpus),
        precision=precision,
        optimizer=optimizer,
        memory_limit_bytes=round(memory_limit_gib * GIB) if memory_limit_gib is not None else profile.memory_bytes,
        pins=pins,
        gap=gap,
        time_limit_s=time_limit_s,
    )
    say("trace", f"tracing {loaded.name} at sequence length {length}")
    graph = trace(loaded, sequence_length=length, precision=precision)
    clock.lap("trace")
    sharding = analyse(graph)
    model = CostModel(graph, sharding, profile, request)
    meshes = meshes_of(model, request)
    say("search", f"searching {len(meshes)} meshes")
    clock.lap("costs")
    result = search(
        [Candidate(astuple(mesh), partial(model.problem, mesh)) for mesh in meshes],
        gap=gap,
        time_limit_s=time_limit_s,
        on_progress=on_progress,
    )
    clock.lap("search")
    if result.best is None:
        raise no_plan(model, result)
    best = result.best
    fields = {
        "tpplan_version": _tpplan_version(),
        "torch_version": _torch_version(),
        "model": model_section(
            graph,
            layers=len(graph.units),
            target=target,
            model_args=dict(model_args or {}),
            input_spec=list(inputs),
            loss=graph.loss or loaded.loss_description,
            loss_weighting=loaded.loss_weighting,
        ),
        "solver": solver_section(model, result, clock.total()),
        "baselines": [b for b in (rule_of_thumb(model, meshes), plain_fsdp(model, meshes)) if b is not None],
        "assumptions": assumptions(
            request, profile, why, "" if seq_len else default.source, global_batch is None, memory_limit_gib is None
        ),
        "notes": opaque_notes(graph) + list(graph.notes) + notes(graph, sharding, loaded.loss_weighting),
    }
    plan = build_plan(model, Mesh(*best.key), best.assignment, best.evaluation, fields)
    clock.lap("plan")
    return Suggestion(plan, graph, sharding, profile, request, result, clock.seconds)


class _Clock:
    """Seconds of each part of the job."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Close the part `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin


def choose_profile(hardware: str | None) -> tuple[Profile, str]:
    """The profile to plan for, and why: named, matched to the local GPUs, or the default."""
    if hardware is not None:
        return load_profile(hardware), "as asked"
    names = local_gpu_names()
    if names:
        profile = match_gpu(names[0])
        if profile is None:
            raise UsageError(
                f"The local GPU {names[0]!r} matches no hardware profile.",
                "Name one with --hardware (see `tpplan hardware`), or a profile file.",
            )
        return profile, f"the local GPUs: {len(names)} x {names[0]}"
    return load_profile(DEFAULT_HARDWARE), "no local GPU; the default"


def meshes_of(model: CostModel, request: Request) -> list[Mesh]:
    """The meshes to search; a clear error where there is none."""
    legal = model.sharding.degrees_allowed(min(request.gpus, request.gpus_per_node))
    stages = 1 + sum(facts.cut_after for facts in model.facts)
    meshes = enumerate_meshes(request, legal, stages)
    if meshes:
        return meshes
    pins = request.pins
    tp = pins.fixed("tp")
    if isinstance(tp, int) and tp not in legal:
        reasons = "; ".join(model.sharding.reasons) or "its heads and widths do not divide"
        raise InfeasibleError(
            f"tp={tp} is not possible for {model.graph.name} on {request.gpus} GPUs: {reasons}.",
            f"Allowed: {', '.join(map(str, legal))}.",
        )
    pp = pins.fixed("pp")
    if isinstance(pp, int) and pp > stages:
        raise InfeasibleError(
            f"pp={pp} needs {pp} stages; {model.graph.name} can be cut into {stages}.",
            f"Use --fix pp={stages} or less.",
        )
    if pins:
        raise InfeasibleError(
            f"No mesh of {request.gpus} GPUs and a global batch of {request.global_batch} satisfies {pins.text()}.",
            "GPUs = tp x pp x dp_replicate x dp_shard, and dp x microbatch_size must divide the batch: drop a pin.",
        )
    nearest = request.gpus * max(1, round(request.global_batch / request.gpus))
    raise UsageError(
        f"A global batch of {request.global_batch} cannot be split over {request.gpus} GPUs.",
        f"Give --global-batch a multiple of {request.gpus}, for example {nearest}.",
    )


def no_plan(model: CostModel, result: SearchResult) -> Exception:
    """The error for a search without a plan: out of memory (by how much, where), or out of time."""
    request = model.request
    if result.status != "infeasible":
        return InfeasibleError(
            f"No plan was found within {request.time_limit_s} s.",
            "Give more time with --time-limit, or pin axes with --fix.",
        )
    if not result.shortfall_key:
        return InfeasibleError("No candidate has enough legal cuts for its stages.", "Use fewer stages: --fix pp=1.")
    mesh = Mesh(*result.shortfall_key)
    short = result.shortfall_bytes * (1 + model.device.reserve_fraction)
    return InfeasibleError(
        f"Nothing fits: the best layout ({mesh.describe()}, microbatch {mesh.microbatch_size}) lacks "
        f"{gib(short):.2f} GiB in stage {result.shortfall_stage} of {mesh.pp} "
        f"(limit {gib(request.memory_limit_bytes):.1f} GiB a GPU).",
        "Use more GPUs (--gpus), a shorter sequence (--seq-len), or a larger --memory-limit"
        + (", or drop a --fix." if request.pins else "."),
    )


def solver_section(model: CostModel, result: SearchResult, wall_s: float) -> SolverSection:
    """The certificate of the search."""
    assert result.best is not None
    import highspy

    return SolverSection(
        status="optimal" if result.status == "optimal" else "feasible",
        objective_s=result.best.evaluation.step_time_s,
        lower_bound_s=result.lower_bound_s,
        gap=result.gap,
        wall_s=wall_s,
        name="HiGHS through PuLP",
        version=highspy.Highs().version(),
        candidates=result.candidates,
        pruned=dict(result.pruned),
        solved=result.solved,
        space=space_description(),
    )


def space_description() -> list[str]:
    """What the searched space holds and leaves out."""
    return [
        "tp: divisors of one node that the model allows; pp: as many stages as it has legal cuts; "
        "dp_replicate x dp_shard: the rest",
        "microbatch sizes 1, 2, 4, ... 64; stage boundaries at any legal cut; 1F1B (GPipe where pinned)",
        "recompute none, selective or full for each block; ZeRO-2 and ZeRO-3; "
        "gradients reduced after every or the last microbatch",
        "not searched: interleaved and zero-bubble schedules, sequence, context and expert parallelism; "
        "the mesh order is fixed (tp innermost, pp outermost)",
    ]


def assumptions(
    request: Request, profile: Profile, why: str, length_from: str, default_batch: bool, default_limit: bool
) -> list[str]:
    """What was assumed, each with the flag that changes it; `length_from` says where a default length comes from."""
    length = f" ({length_from})" if length_from else ""
    batch = " (default)" if default_batch else ""
    limit = " (what the device offers)" if default_limit else ""
    return [
        f"hardware {profile.name} ({why}): --hardware",
        f"{request.gpus_per_node} GPUs a node: --gpus-per-node",
        f"sequence length {request.sequence_length}{length}: --seq-len",
        f"global batch {request.global_batch} samples{batch}: --global-batch",
        f"precision {request.precision}: --precision",
        f"optimizer {request.optimizer}: --optimizer",
        f"memory limit {gib(request.memory_limit_bytes):.1f} GiB a GPU{limit}: --memory-limit",
    ]


def notes(graph: ModelGraph, sharding: Sharding, weighting: str) -> list[str]:
    """Remarks that a reader of the plan must know."""
    said = []
    if weighting == "equal":
        said.append(
            "the loss is the model's own mean: every microbatch weighs the same, whatever its number of targets"
        )
    if graph.batch_norm:
        said.append("BatchNorm statistics are per microbatch and replica: the microbatch size changes them")
    if graph.unused:
        said.append(f"{len(graph.unused)} trainable parameter(s) are never used: {', '.join(graph.unused[:3])}")
    said += [f"tensor parallelism: {reason}" for reason in sharding.reasons]
    return said


def _tpplan_version() -> str:
    from importlib.metadata import version

    return version("tpplan")


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")
