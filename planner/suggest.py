"""The main job: target -> graph -> sharding -> costs -> search -> Plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hardware_profiles.catalog import Profile, load_profile, match_gpu
from ..units import GIB
from .alternatives import alternatives
from .baselines import plain_fsdp, rule_of_thumb
from .certificate import Clock, Say, audited, model_fields, solver_section, write_programme
from .graph import ModelGraph
from .infeasible import no_plan
from .local_gpus import local_gpu_names
from .objectives import Goal, interrupted, reach
from .pins import parse_pins
from .plan import Plan
from .plan_notes import assumptions, notes
from .planning import SearchOptions, Solved, Subject
from .request import Request
from .search import SearchResult
from .sharding import Sharding, analyse, with_sequence_parallel

DEFAULT_HARDWARE = "h100-sxm"
REPAIR_S = 20.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A plan with what it was made from, for reports."""

    plan: Plan
    subject: Subject
    solved: Solved
    seconds: Mapping[str, float]

    @property
    def graph(self) -> ModelGraph:
        """The traced model."""
        return self.subject.graph

    @property
    def sharding(self) -> Sharding:
        """Its tensor-parallel layout."""
        return self.subject.sharding

    @property
    def profile(self) -> Profile:
        """The hardware."""
        return self.subject.profile

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.solved.request

    @property
    def result(self) -> SearchResult:
        """What the search proved."""
        return self.solved.result


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
    most: Sequence[str] = (),
    least: Sequence[str] = (),
    forbid: Sequence[str] = (),
    pins_file: str | Path | None = None,
    time_limit_s: float | None = None,
    gap: float = 0.005,
    top: int = 1,
    objective: str = "time",
    target_step_time_s: float | None = None,
    price_per_gpu_hour: float | None = None,
    workers: int = 0,
    audit: bool = False,
    dump_lp: Path | None = None,
    repair_s: float = REPAIR_S,
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
    fix, most, least, forbid : sequence of "axis=value"
        Pins, see `pins.parse_pins`; fix and forbid also take "layer:PATTERN=value".
    pins_file : path, optional
        Pins in a TOML file, see `pins_file.read_pins_file`.
    time_limit_s, gap : float
        When the search stops.
    top : int
        How many different layouts to rank (`Plan.alternatives`); the proof then covers the last of them.
    objective, target_step_time_s, price_per_gpu_hour : str, float, float
        See `objectives.Goal`.
    workers : int
        Processes of the search; 0 is one for each core.
    audit : bool
        Solve pruned combinations again, see `audit.audit`.
    dump_lp : path, optional
        Where the integer programme of the plan's combination is written.
    repair_s : float
        If nothing fits, seconds to look for what would; 0 does not look.
    say, on_progress : callable, optional
        Told what starts (name, text), and the search's events.

    Raises
    ------
    TpplanError
        See `suggest`.
    """
    say = say or (lambda name, text: None)
    clock = Clock()
    pins = parse_pins(fix, most, least, forbid, pins_file)
    goal = Goal(objective, target_step_time_s, price_per_gpu_hour)
    profile, why = choose_profile(hardware)
    if gpus < 1:
        raise UsageError(f"--gpus is {gpus}; a plan needs at least one GPU.", "Give --gpus 1 or more.")
    say("hardware", f"{profile.name} ({why})")

    from .opaque import opaque_notes
    from .target import load_target

    loaded = load_target(target, model_args=dict(model_args or {}), inputs=tuple(inputs), precision=precision)
    clock.lap("imports")  # torch, the model's libraries and its own file
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
    subject = traced(loaded, profile, length, precision)
    clock.lap("trace")
    reached = reach(subject, request, goal, SearchOptions(top, workers, on_progress), say)
    solved = reached.solved
    clock.lap("search")
    if solved.best is None and interrupted(solved):
        raise KeyboardInterrupt
    if solved.best is None:
        raise no_plan(subject, solved, repair_s, say)
    proofs = [*reached.proofs, *audited(solved, audit, workers, say)]
    if audit:
        clock.lap("audit")
    if dump_lp is not None:
        write_programme(solved, dump_lp)
    asked = {"target": target, "model_args": dict(model_args or {}), "input_spec": list(inputs)}
    length_from = "" if seq_len else default.source
    fields = {
        **model_fields(subject.graph, loaded, asked),
        "solver": solver_section(solved, goal, proofs, clock),
        "baselines": [b for b in (rule(solved.model, solved.meshes) for rule in (rule_of_thumb, plain_fsdp)) if b],
        "assumptions": assumptions(
            solved.request, profile, why, length_from, global_batch is None, memory_limit_gib is None
        ),
        "notes": [
            *opaque_notes(subject.graph),
            *subject.graph.notes,
            *notes(subject.graph, subject.sharding, loaded.loss_weighting),
        ],
    }
    plan = solved.plan(solved.best, {**fields, "alternatives": alternatives(solved, fields)})
    clock.lap("plan")
    return Suggestion(plan, subject, solved, clock.seconds)


def traced(loaded: Any, profile: Profile, sequence_length: int, precision: str) -> Subject:
    """Trace a loaded target; the subject can trace it again at another length."""
    from .trace import trace

    graph = trace(loaded, sequence_length=sequence_length, precision=precision)
    sharding = analyse(graph)
    sequence = with_sequence_parallel(graph, sharding)
    return Subject(graph, sharding, profile, sequence, lambda length, p: traced(loaded, profile, length, p))


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
