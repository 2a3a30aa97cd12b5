"""plan.json: the versioned schema of a plan, strict to read, deterministic to write.

`schema_version` stays 1 until a release; new fields get defaults, so that a plan once written loads for ever.
Degrees use torchtitan's names. GPUs = pp x dp_replicate x dp_shard x cp x tp; `mesh.order` says which
of these axes consecutive ranks run along.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ..errors import PlanFileError

SCHEMA_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputSection(_Section):
    """One input leaf; `shape` uses "B" for the batch and "S" for the sequence length."""

    name: str
    dtype: str
    shape: list[int | str]


class ModelSection(_Section):
    """Which model the plan is for and how to rebuild it.

    `target` is what the user typed (a path is kept relative to the working directory where possible);
    `hash` covers the traced structure: names, shapes, dtypes and operators.
    `loss_weighting`: "tokens" = sum over non-ignored targets of the global batch divided by their number;
    "equal" = the model's own mean, every microbatch with the same weight.
    """

    target: str
    model_args: dict[str, Any] = Field(default_factory=dict)
    input_spec: list[str] = Field(default_factory=list)
    name: str
    hash: str
    parameters: int
    trainable_parameters: int
    buffers: int = 0
    layers: int
    classes: int
    flops_per_sample: float
    inputs: list[InputSection] = Field(default_factory=list)
    loss: str = ""
    loss_weighting: Literal["tokens", "equal"] = "equal"
    tied: list[list[str]] = Field(default_factory=list)
    batch_norm: list[str] = Field(default_factory=list)


class HardwareSection(_Section):
    """The profile the plan was priced with; `hash` covers its content."""

    name: str
    hash: str
    gpus: int
    gpus_per_node: int
    memory_limit_bytes: int
    peak_flops: float
    peak_name: str
    file: str | None = None


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


class MeshSection(_Section):
    """Degrees of the device mesh, and which ranks lie next to each other.

    `order` names the axes outermost first: consecutive ranks differ along the last one. So the last axes are those
    whose groups lie inside a node.
    """

    pipeline_parallel_degree: int = Field(default=1, ge=1)
    data_parallel_replicate_degree: int = Field(default=1, ge=1)
    data_parallel_shard_degree: int = Field(default=1, ge=1)
    context_parallel_degree: int = Field(default=1, ge=1)
    expert_parallel_degree: int = Field(default=1, ge=1)
    tensor_parallel_degree: int = Field(default=1, ge=1)
    order: list[Literal["pp", "dp_replicate", "dp_shard", "cp", "tp"]] = Field(default_factory=lambda: [*AXES])

    @model_validator(mode="after")
    def _every_axis_once(self) -> MeshSection:
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order must name each of {', '.join(AXES)} once")
        return self

    @property
    def degrees(self) -> dict[str, int]:
        """The degree of each axis of the device mesh, by its short name in the order of `AXES`."""
        return {
            "pp": self.pipeline_parallel_degree,
            "dp_replicate": self.data_parallel_replicate_degree,
            "dp_shard": self.data_parallel_shard_degree,
            "cp": self.context_parallel_degree,
            "tp": self.tensor_parallel_degree,
        }

    @property
    def world_size(self) -> int:
        """Number of GPUs (processes)."""
        return math.prod(self.degrees.values())

    @property
    def data_parallel_degree(self) -> int:
        """Replicas that see different samples."""
        return self.data_parallel_replicate_degree * self.data_parallel_shard_degree


class BatchSection(_Section):
    """global_batch = microbatch_size x microbatches x dp_replicate x dp_shard, in samples."""

    global_batch: int = Field(ge=1)
    microbatch_size: int = Field(ge=1)
    microbatches: int = Field(ge=1)
    sequence_length: int = Field(ge=0)


class ScheduleSection(_Section):
    """Pipeline schedule and gradient synchronisation.

    `virtual_stages` chunks a rank (interleaved 1F1B); stage i of the plan runs on rank i modulo the pipeline degree.
    `runnable` is False where the runtime does not execute the schedule.

    `gradient_sync`: "every" reduces gradients after each microbatch, "last" only after the last one.
    """

    name: Literal["1f1b", "gpipe", "interleaved", "zb"] = "1f1b"
    virtual_stages: int = Field(default=1, ge=1)
    gradient_sync: Literal["every", "last"] = "last"
    runnable: bool = True


class PrecisionSection(_Section):
    """bf16 = float32 parameters, gradients and Adam, bfloat16 compute, float32 gradient reduction."""

    name: Literal["bf16", "fp32"] = "bf16"
    compute_dtype: str = "bfloat16"
    parameter_dtype: str = "float32"
    reduce_dtype: str = "float32"
    optimizer: Literal["adamw", "sgd"] = "adamw"


class StageSection(_Section):
    """One chunk of the pipeline: the units it runs, in execution order.

    `modules` are FQNs of units owned by this stage; `replicated_modules` are parameter-free units that every
    stage runs by itself. `recompute` maps the FQN of each unit that is not "none" to selective or full.
    `fsdp_units` are the FQNs wrapped one by one by fully_shard (the stage's remainder is wrapped as its root);
    `kept_gathered` are those of them that keep their gathered weights from forward to backward (ZeRO-2), where the
    plan's `sharding.reshard_after_forward` lets the others go (ZeRO-3).
    `receives` / `sends` name the tensors that cross its borders as "fqn:call:leaf".
    """

    index: int
    pipeline_rank: int
    modules: list[str]
    replicated_modules: list[str] = Field(default_factory=list)
    recompute: dict[str, Literal["selective", "full"]] = Field(default_factory=dict)
    fsdp_units: list[str] = Field(default_factory=list)
    kept_gathered: list[str] = Field(default_factory=list)
    receives: list[str] = Field(default_factory=list)
    sends: list[str] = Field(default_factory=list)


class ShardingSection(_Section):
    """ZeRO / FSDP2 level: 3 = reshard after forward, 2 = keep gathered until backward.

    With 3, single units may still keep their weights (`StageSection.kept_gathered`).
    """

    zero_stage: Literal[0, 1, 2, 3] = 3
    reshard_after_forward: bool = True


class ModuleStyle(_Section):
    """How tensor parallelism treats one parameter-owning module.

    style: col (output features or channels sharded), row (input features or channels sharded, output summed),
    vocab (embedding rows sharded, output summed), packed (col within each of `sizes` segments of the output
    features, for fused projections), channel (a batch or group norm or a grouped convolution that runs on a part
    of the channels), parameters (raw parameters sharded, the module's code as it is), heads (multi-head attention
    with raw projections on a part of the heads), region (the module's own code on plain local tensors: inputs
    whole, output summed), replicate.
    output: placement of the module's output as the rest of the model sees it: "shard" (last dimension; channels
    of convolutions and norms), "replicate", or "sequence" (dimension 1, the tokens of the stream).
    parameters: for parameters, heads and region: the dimension that tp divides, by name relative to the module;
    packed: the sizes of their segments where a dimension holds several (fused) parts; shared: parameters that a
    region adds to its partial sums, of which each rank adds 1/tp.
    """

    style: Literal["col", "row", "vocab", "packed", "channel", "parameters", "heads", "region", "replicate"]
    sizes: list[int] = Field(default_factory=list)
    output: Literal["shard", "replicate", "sequence"] = "replicate"
    parameters: dict[str, int] = Field(default_factory=dict)
    packed: dict[str, list[int]] = Field(default_factory=dict)
    shared: list[str] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = write(self)
        return {key: value for key, value in written.items() if value or key in ("style", "sizes", "output")}


class TensorParallelSection(_Section):
    """Styles by module FQN; modules not named are replicated over tp.

    `attention` lists modules that call attention on sharded heads; `loss_parallel` keeps logits sharded over
    the vocabulary through the cross-entropy. `sequence_parallel` splits the stream between row and col layers along
    its tokens: `sequence_modules` are those that then run on 1/tp of them, and what the units `sequence_ends` return
    is gathered again.
    """

    styles: dict[str, ModuleStyle] = Field(default_factory=dict)
    attention: list[str] = Field(default_factory=list)
    loss_parallel: bool = False
    sequence_parallel: bool = False
    sequence_modules: list[str] = Field(default_factory=list)
    sequence_ends: list[str] = Field(default_factory=list)


class ParameterPlacement(_Section):
    """Placement of one parameter on each mesh axis that matters, in DTensor's spelling."""

    tp: str = "Replicate()"
    dp_shard: str = "Replicate()"
    stages: list[int] = Field(default_factory=list)


class Redistribute(_Section):
    """One change of placement that the plan pays for: after `module`, in `phase`, over `axis`."""

    module: str
    axis: Literal["tp", "dp_shard", "dp_replicate", "pp"]
    collective: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
    phase: Literal["forward", "backward"]
    bytes_per_microbatch: int


class PredictedSection(_Section):
    """What the cost model expects of this plan.

    `breakdown_s` parts sum to `step_time_s`; `memory_bytes` has one object a pipeline rank whose parts sum to
    `device_bytes` of that rank; `peak_memory_bytes` is the peak of active bytes, `device_bytes` adds
    reserve, context and NCCL and is what the limit is judged on.
    """

    step_time_s: float
    tokens_per_s_per_gpu: float
    samples_per_s: float
    mfu: float
    peak_memory_bytes: list[int]
    device_bytes: list[int]
    breakdown_s: dict[str, float] = Field(default_factory=dict)
    memory_bytes: list[dict[str, int]] = Field(default_factory=list)
    bubble_fraction: float = 0.0


class SolverSection(_Section):
    """The certificate: gap = (objective_s - lower_bound_s) / objective_s over the whole modelled space.

    `objective` is what was minimised; `proofs` say what was proven where that is not (only) the step time.
    `infeasible` combinations were proven not to fit; `seconds` are the wall time by phase.
    """

    status: Literal["optimal", "feasible"]
    objective_s: float
    lower_bound_s: float
    gap: float
    wall_s: float
    name: str = ""
    version: str = ""
    candidates: int = 0
    pruned: dict[str, int] = Field(default_factory=dict)
    solved: int = 0
    infeasible: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    objective: Literal["time", "memory", "gpus", "cost"] = "time"
    proofs: list[str] = Field(default_factory=list)
    space: list[str] = Field(default_factory=list)


class Baseline(_Section):
    """A layout the plan is compared with: rule of thumb, best plain FSDP."""

    name: str
    mesh: MeshSection
    microbatch_size: int
    recompute: str
    zero_stage: int
    step_time_s: float | None
    fits: bool


class Alternative(_Section):
    """Another layout of the ranking: what it is, what it costs, and the pins (`--fix`) that make it the plan.

    `tied`: its step time lies within the cost model's interval of the best, so that the model cannot tell them apart.
    `device_bytes` are those of its fullest device.
    """

    mesh: MeshSection
    microbatch_size: int
    microbatches: int
    schedule: str
    virtual_stages: int = 1
    recompute: str
    zero_stage: int
    step_time_s: float
    device_bytes: int
    tied: bool
    fix: list[str] = Field(default_factory=list)


class Plan(_Section):
    """A whole plan. `Plan.load` reads and checks a file, `save` writes one atomically."""

    schema_version: Literal[1] = 1
    tpplan_version: str = ""
    torch_version: str = ""
    model: ModelSection
    hardware: HardwareSection
    mesh: MeshSection
    batch: BatchSection
    schedule: ScheduleSection
    precision: PrecisionSection = PrecisionSection()
    sharding: ShardingSection = ShardingSection()
    stages: list[StageSection]
    tensor_parallel: TensorParallelSection = TensorParallelSection()
    parameters: dict[str, ParameterPlacement] = Field(default_factory=dict)
    redistributes: list[Redistribute] = Field(default_factory=list)
    predicted: PredictedSection
    solver: SolverSection
    baselines: list[Baseline] = Field(default_factory=list)
    alternatives: list[Alternative] = Field(default_factory=list)
    assumptions: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def to_json(self) -> str:
        """The file's text: two-space indent, keys in schema order, newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path` in one step (temporary file, then rename).

        Raises
        ------
        PlanFileError
            If `path` exists and is not a plan, or cannot be written.
        """
        target = Path(path)
        check_destination(target)
        text = self.to_json()
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        except OSError as error:
            raise PlanFileError(f"Cannot write {target}: {error.strerror}.", "Choose another file with -o.") from error
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise PlanFileError(f"Cannot write {target}: {error.strerror}.", "Choose another file with -o.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises
        ------
        PlanFileError
            If the file is missing, is not JSON, is no plan, has unknown fields, or a newer schema.
        """
        source = Path(path)
        try:
            text = source.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanFileError(
                f"No plan at {source}.", "Write one with `tpplan suggest TARGET --gpus N -o plan.json`."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"Cannot read {source}: {error}.", "Name a plan.json written by tpplan.") from None
        return cls.parse(text, str(source))

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Plan:
        """A plan from its JSON text; `source` names it in errors."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanFileError(
                f"{source} is damaged or truncated: not valid JSON ({error}).",
                "Write it again with `tpplan suggest`.",
            ) from None
        if not isinstance(data, dict) or "schema_version" not in data or "mesh" not in data:
            raise PlanFileError(f"{source} is no tpplan plan.", "Write one with `tpplan suggest TARGET --gpus N`.")
        version = data["schema_version"]
        if not isinstance(version, int) or isinstance(version, bool) or version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise PlanFileError(
                f"{source} has schema_version {version!r}; this tpplan reads {SCHEMA_VERSION}.",
                "Upgrade tpplan." if newer else "Write it again with `tpplan suggest`.",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanFileError(
                f"{source}: {where}: {first['msg']} ({error.error_count()} problem(s)).",
                "Write it again with `tpplan suggest`, or undo the edit.",
            ) from None


def check_destination(path: Path) -> None:
    """Raise `PlanFileError` if a plan must not or cannot be written to `path`."""
    remedy = "Choose another file with -o."
    if path.is_dir():
        raise PlanFileError(f"{path} is a folder.", remedy)
    if path.exists() and not looks_like_plan(path):
        raise PlanFileError(f"{path} exists and is no plan; it is left as it is.", remedy)
    if not path.parent.is_dir():
        raise PlanFileError(f"There is no folder {path.parent}.", remedy)


def looks_like_plan(path: Path) -> bool:
    """Whether `path` holds a JSON object with the marks of a plan (so that it may be overwritten)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "schema_version" in data and "mesh" in data and "solver" in data
