"""The layouts found beside those that transformers ships (`base_model_tp_plan`): `python benchmarks/tp_plans.py`.

For each architecture whose config class has a plan, a small variant is traced, both layouts are written as bytes a
rank holds and collectives of one layer, priced by the planner's cost functions, and each difference is explained.
Writes docs/tp-plans.md.
"""

from __future__ import annotations

import fnmatch
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpplan.costmodels.collectives import LinkModel, collective_s
from tpplan.errors import TpplanError
from tpplan.hardware_profiles.catalog import load_profile
from tpplan.planner.graph import ModelGraph, Op, Unit
from tpplan.planner.sharding import Sharding, analyse
from tpplan.planner.sharding_states import absolute, tensor_bytes
from tpplan.planner.target import load_target
from tpplan.planner.trace import trace
from tpplan.units import DTYPE_BYTES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "zoo"))

TP = 2
STREAM = 4096 * 4096  # elements of one hidden state: 4,096 tokens of width 4,096
COLUMNS = ("colwise", "packed_colwise", "colwise_gather_output", "mla_kv_a_proj")
SPLIT = (*COLUMNS, "rowwise", "packed_rowwise", "rowwise_split_input", "embedding_rowwise")
PRODUCTS = ("aten.mm.default", "aten.addmm.default")


@dataclass
class Layout:
    """What a layout costs: parameter bytes a rank holds, and collectives of the layers that the plan names."""

    styles: dict[str, str] = field(default_factory=dict)
    rank_bytes: float = 0.0
    collective_bytes: float = 0.0
    collective_s: float = 0.0

    def add(self, kind: str, n_bytes: float, links: LinkModel) -> None:
        """One collective, `n_bytes` the whole tensor."""
        self.collective_bytes += n_bytes
        self.collective_s += collective_s(kind, n_bytes, TP, 1, links)


@dataclass
class Comparison:
    """Both layouts of one architecture, over the units that the shipped plan names, and what differs."""

    name: str
    theirs: Layout
    ours: Layout
    differences: list[str]

    @property
    def verdict(self) -> str:
        """Ours against theirs: bytes a rank first, then the time of the collectives."""
        bytes_ratio = self.ours.rank_bytes / self.theirs.rank_bytes
        time_ratio = self.ours.collective_s / self.theirs.collective_s if self.theirs.collective_s else math.inf
        if bytes_ratio <= 1.001 and time_ratio <= 1.001:
            return "as good or better"
        if bytes_ratio <= 1.001:
            return "fewer bytes, more collectives" if bytes_ratio < 0.999 else "more collectives"
        return "more bytes, fewer collectives" if time_ratio < 0.999 else "worse"


def compare(name: str, graph: ModelGraph, sharding: Sharding, plan: Mapping[str, str], links: LinkModel) -> Comparison:
    """Both layouts of one traced model; `plan` maps patterns of module (or parameter) names to transformers' styles."""
    theirs, ours = Layout(), Layout()
    batch = _batch(graph)
    named = {unit.position for unit in graph.units if any(_style(plan, n) for n in _names(graph, unit))}
    for unit in graph.units:
        if unit.position in named:
            _their_collectives(theirs, graph, sharding, unit, plan, links, batch)
            for item in sharding.of_class(unit.class_index).collectives:
                for _ in range(item.repeat):
                    ours.add(item.collective, item.bytes.at(batch), links)
    in_layers = {n for u in graph.units if u.position in named for n in _parameters(graph, u)}
    for parameter in sorted(in_layers):
        spec = graph.parameters[parameter]
        n_bytes = spec.numel * DTYPE_BYTES[spec.dtype]
        ours.rank_bytes += n_bytes / TP if parameter in sharding.parameter_split else n_bytes
        theirs.rank_bytes += n_bytes / TP if _splits_parameter(plan, parameter) else n_bytes
        if parameter.endswith(".bias"):
            continue
        module = parameter.removesuffix(".weight")
        theirs.styles[module] = _style(plan, module) or ""
        ours.styles[module] = _ours(sharding, parameter)
    return Comparison(name, theirs, ours, list(_differences(graph, theirs.styles, ours.styles, sharding)))


def _style(plan: Mapping[str, str], name: str) -> str | None:
    """Transformers' style of a module or raw parameter, by pattern (its names are relative to the base model)."""
    for pattern, style in plan.items():
        if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}"):
            inner = pattern.split(".")
            mine = name.split(".")[-len(inner) :]
            if all(a == b or (a == "*" and b.isdigit()) for a, b in zip(inner, mine, strict=True)):
                return style
    return None


def _names(graph: ModelGraph, unit: Unit) -> Iterator[str]:
    for op in graph.classes[unit.class_index].ops:
        yield absolute(unit.fqn, op.fqn)


def _parameters(graph: ModelGraph, unit: Unit) -> Iterator[str]:
    for tensor in graph.classes[unit.class_index].tensors:
        name = absolute(unit.fqn, tensor.fqn)
        if tensor.kind == "parameter" and name in graph.parameters:
            yield name


def _splits_parameter(plan: Mapping[str, str], parameter: str) -> bool:
    module, _, leaf = parameter.rpartition(".")
    style = _style(plan, parameter) or (_style(plan, module) if leaf in ("weight", "bias") else None)
    return style in SPLIT and not (leaf == "bias" and "row" in (style or "")) and style != "mla_kv_a_proj"


def _batch(graph: ModelGraph) -> int:
    """Samples of the small variant whose hidden states are as large as those of a real model."""
    cls = max((graph.classes[u.class_index] for u in graph.units), key=lambda c: c.flops_forward.at(1))
    return max(1, round(STREAM / math.prod(d.at(1) for d in cls.tensors[cls.outputs[0]].shape)))


def _their_collectives(
    layout: Layout,
    graph: ModelGraph,
    sharding: Sharding,
    unit: Unit,
    plan: Mapping[str, str],
    links: LinkModel,
    batch: int,
) -> None:
    """What transformers' hooks run: a sum of gradients at each col layer, a sum after each row layer, gathers."""
    cls = graph.classes[unit.class_index]

    def size(tensor: int) -> float:
        return tensor_bytes(cls.tensors[tensor]).at(batch)

    for op in cls.ops:
        style = _style(plan, absolute(unit.fqn, op.fqn))
        if op.name not in PRODUCTS or style not in SPLIT or style == "mla_kv_a_proj":
            continue
        if style in COLUMNS:
            layout.add("all_reduce", size(_input(op)), links)
        if style == "colwise_gather_output":
            layout.add("all_gather", size(op.outputs[0]), links)
        if style in ("rowwise", "packed_rowwise", "rowwise_split_input"):
            layout.add("all_reduce", size(op.outputs[0]), links)
        if style == "rowwise_split_input":
            layout.add("all_gather", size(_input(op)), links)
    experts = {fqn for fqn in _names(graph, unit) if _style(plan, fqn) == "moe_tp_experts"}
    for item in sharding.of_class(unit.class_index).collectives:
        if absolute(unit.fqn, item.module) in experts:  # the same sums at the door of the experts
            layout.add(item.collective, item.bytes.at(batch), links)


def _input(op: Op) -> int:
    return op.inputs[-2]


def _ours(sharding: Sharding, parameter: str) -> str:
    """Our style of the module (or raw parameter), in words of the plan."""
    module, _, leaf = parameter.rpartition(".")
    style = sharding.styles.get(module) if leaf == "weight" else None
    if style is not None:
        gathered = style.style == "col" and style.output == "replicate"
        return f"{style.style}, output gathered" if gathered else style.style
    if parameter in sharding.parameter_split:
        return f"dimension {sharding.parameter_split[parameter]}"
    return ""


_EQUAL = {
    "colwise": ("col", "packed"),
    "packed_colwise": ("packed", "dimension 1", "dimension 2"),
    "packed_rowwise": ("dimension 1", "dimension 2"),
    "colwise_gather_output": ("col, output gathered",),
    "rowwise": ("row", "dimension 1", "dimension 2"),
    "embedding_rowwise": ("vocab",),
    "replicated_with_grad_allreduce": ("",),
    "": ("",),
}


def _differences(
    graph: ModelGraph, theirs: Mapping[str, str], ours: Mapping[str, str], sharding: Sharding
) -> Iterator[str]:
    """One line for each kind of difference, with the reason."""
    said: set[str] = set()
    for module, style in theirs.items():
        mine = ours[module]
        if mine in _EQUAL.get(style, ()) or (style == "colwise" and mine.startswith("dimension")):
            continue
        short = ".".join("*" if part.isdigit() else part for part in module.split("."))
        why = _why(graph, module, style, mine, sharding)
        line = f"`{short}`: theirs {style or 'whole'}, ours {mine or 'whole'}: {why}"
        if line not in said:
            said.add(line)
            yield line


def _why(graph: ModelGraph, module: str, style: str, mine: str, sharding: Sharding) -> str:
    if not mine:
        return sharding.whole.get(module, "no product that can be split reads it")
    if style == "mla_kv_a_proj":
        return "theirs keeps the weight whole too, and only marks its gradient"
    if style == "colwise_gather_output":
        return "what follows is done on each rank's part, so its output need not be gathered"
    if style == "rowwise_split_input":
        return "its input arrives split, where theirs has just been gathered"
    name = module if module in graph.parameters else f"{module}.weight"
    spec = graph.parameters.get(name)
    saved = "" if spec is None else f" ({(1 - 1 / TP) * spec.numel * DTYPE_BYTES[spec.dtype]:,.0f} bytes fewer a rank)"
    return f"the operators allow it{saved}"


def shipped_plan(model_type: str) -> Mapping[str, str]:
    """`base_model_tp_plan` of a config class, empty if it has none."""
    from transformers import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None) or {}


def traced(target: str, sequence_length: int, precision: str = "fp32") -> ModelGraph:
    """A traced target, in bfloat16 where grouped products want it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return trace(load_target(target), sequence_length=sequence_length, precision=precision)
        except TpplanError:
            return trace(load_target(target), sequence_length=sequence_length, precision="bf16")


def main() -> None:
    from members import MEMBERS

    links = load_profile("h100-sxm").links
    rows, details = [], []
    wanted = set(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for member in MEMBERS:
            plan = shipped_plan(member.model_type) if member.model_type else {}
            if not plan or (wanted and member.name not in wanted):
                continue
            try:
                graph = traced(member.target(Path(folder), small=True)[0], member.small_seq)
            except TpplanError as error:
                rows.append(f"| {member.name} | not traced: {error.message.splitlines()[0][:80]} | | | | |")
                continue
            found = compare(member.name, graph, analyse(graph), plan, links)
            rows.append(_row(found))
            details += [f"\n**{found.name}**\n", *(f"- {line}" for line in found.differences or ["no difference"])]
            print(rows[-1], *found.differences, sep="\n  ", flush=True)
    if not wanted:
        text = _HEAD + "\n".join(rows) + "\n\n## Differences\n" + "\n".join(details) + "\n"
        (ROOT / "docs" / "tp-plans.md").write_text(text)


def _row(found: Comparison) -> str:
    ours, theirs = found.ours, found.theirs
    moved = [f"{x.collective_bytes / 1e6:,.0f} MB, {x.collective_s * 1e3:.2f} ms" for x in (theirs, ours)]
    held = [f"{x.rank_bytes:,.0f}" for x in (theirs, ours)]
    return f"| {' | '.join([found.name, *held, *moved, found.verdict])} |"


_HEAD = f"""# Layouts found, beside those that transformers ships

Written by `python benchmarks/tp_plans.py`; do not edit. Each architecture of the zoo whose config class ships a
`base_model_tp_plan`, in its small variant, tp = {TP}. Counted are the units that the shipped plan names: the layers,
without embeddings and head. *Bytes a rank* are of parameters. *Collectives* are the bytes of whole tensors that one
microbatch moves, forward and backward, and their time by the cost model of the H100 profile, with as many samples as
make one hidden state as large as 4,096 tokens of width 4,096; theirs as transformers' hooks run them (every col layer
sums the gradient of its own input).

| model | bytes a rank, theirs | ours | collectives, theirs | ours | ours is |
|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    main()
