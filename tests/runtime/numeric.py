"""The oracle of the runtime tests: one process that runs the same microbatches, and the comparison with it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from tpplan.planner.inputs import Inputs
from tpplan.planner.plan import Plan
from tpplan.planner.target import Target, load_target
from tpplan.runtime.data import Samples
from tpplan.runtime.initialise import build_seeded, named_tensors

SEED = 5
IGNORED = {"labels": -100, "targets": -1}


@contextmanager
def keep_float64() -> Iterator[None]:
    """Models that ask for float32 in norms, softmax or losses keep float64 tensors as they are.

    The functions are replaced, as a torch function mode is not active in a recomputed forward.
    """
    spaces: list[tuple[Any, str]] = [(torch.Tensor, "float"), (torch.Tensor, "to"), (torch.Tensor, "type")]
    spaces += [(torch.Tensor, "softmax"), (torch.Tensor, "sum"), (torch.Tensor, "mean"), (torch.Tensor, "log_softmax")]
    spaces += [(F, "softmax"), (F, "log_softmax"), (torch, "softmax"), (torch, "log_softmax"), (torch, "sum")]
    saved = [(space, name, getattr(space, name)) for space, name in spaces]

    def wide(function: Any, name: str) -> Any:
        def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64:
                if name == "float":
                    return tensor
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return function(tensor, *args, **kwargs)

        return run

    for space, name, function in saved:
        setattr(space, name, wide(function, name))
    saved.append((F, "grouped_mm", F.grouped_mm))
    F.grouped_mm = functools.update_wrapper(functools.partial(_grouped_product, F.grouped_mm), F.grouped_mm)
    try:
        yield
    finally:
        for space, name, function in saved:
            setattr(space, name, function)


def _grouped_product(torch_function: Any, a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` of rows with one matrix a group, also in float64, which torch's own does not take."""
    if a.dtype is not torch.float64:
        return torch_function(a, b, offs=offs)
    if isinstance(offs, FakeTensor):
        return a @ b[0]
    bounds = [0, *offs.tolist()]
    done = [a[i:j] @ b[g] for g, (i, j) in enumerate(itertools.pairwise(bounds))]
    return torch.cat([*done, a.new_zeros(a.shape[0] - bounds[-1], b.shape[-1])])


def target_of(plan: Plan) -> Target:
    return load_target(
        plan.model.target,
        model_args=plan.model.model_args,
        inputs=plan.model.input_spec,
        precision=plan.precision.name,
    )


def with_ignored_labels(inputs: Inputs, g: int) -> Inputs:
    """The inputs with a number of ignored targets that differs between microbatches."""
    for name, value in IGNORED.items():
        if name in inputs.kwargs and inputs.kwargs[name].ndim == 2:
            labels = inputs.kwargs[name].clone()
            labels.view(-1)[: 3 + 4 * g % 9] = value
            return Inputs(inputs.args, {**inputs.kwargs, name: labels}, inputs.extra, inputs.structure)
    return inputs


def batch_of(samples: Samples, plan: Plan, replica: int, replicas: int) -> list[Inputs]:
    size, count = plan.batch.microbatch_size, plan.batch.microbatches
    numbers = [k * replicas + replica for k in range(count)]
    return [with_ignored_labels(samples.microbatch(0, g, size), g) for g in numbers]


def reference(plan: Plan, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process that runs all microbatches of the global batch in order."""
    target = target_of(plan)
    with keep_float64():  # as a run builds it: tables that the model computes stay exact
        model = build_seeded(target, SEED, dtype)
    samples = Samples(target, model, plan.batch.sequence_length, SEED)
    size = plan.batch.microbatch_size
    count = plan.batch.global_batch // size
    batch = [with_ignored_labels(samples.microbatch(0, g, size), g) for g in range(count)]
    tokens = target.loss_weighting == "tokens"
    items = torch.tensor(sum(target.count_targets(b) for b in batch)) if tokens else None
    total = 0.0
    for inputs in batch:
        inputs = inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        extra = target.forward_kwargs(items) if items is not None else {}
        with keep_float64():
            loss = target.loss(model(*inputs.args, **inputs.kwargs, **extra), inputs, items)
        loss = loss if tokens else loss / count
        loss.backward()
        total += loss.item()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return total, grads


def run_compiled(rank: int, world: int, plan: Plan) -> dict[str, Any]:
    """`run_plan` in float32 with blocks under torch.compile, but without generating code."""
    from torch._dynamo.utils import counters

    plain = torch.compile
    torch.compile = functools.partial(plain, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    try:
        result = run_plan(rank, world, plan, float64=False, compiled=True)
        return result | {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    finally:
        torch.compile = plain


def run_plan(rank: int, world: int, plan: Plan, float64: bool = True, compiled: bool = False) -> dict[str, Any]:
    """One training step's loss, norm and whole gradients by FQN, as this rank sees them."""
    from tpplan.runtime.api import parallelize
    from tpplan.runtime.full_tensors import full_tensor_of

    target = target_of(plan)
    with keep_float64() if float64 else nullcontext():
        parallel = parallelize(target, plan, device="cpu", seed=SEED, float64=float64, compiled=compiled)
    batch = batch_of(parallel.samples, plan, parallel.mesh.replica, parallel.mesh.replicas)
    with keep_float64() if float64 else nullcontext():
        parallel.forward_backward(batch)
    result = parallel._totals()
    grads = {
        name: full_tensor_of(p.grad, name, plan.tensor_parallel).detach().clone()
        for name, p in parallel.named_parameters().items()
        if p.grad is not None
    }
    return {"loss": result.loss.item(), "norm": result.grad_norm.item(), "grads": grads}


def check_roughly(plan: Plan, results: list[dict[str, Any]], tolerance: float) -> None:
    """Loss, norm and every large gradient's direction against the single process in float32."""
    loss, expected = reference(plan, torch.float32)
    aliases = _aliases(plan)
    norm = sum(g.norm().item() ** 2 for g in expected.values()) ** 0.5
    for result in results:
        assert abs(result["loss"] - loss) <= tolerance * abs(loss), (result["loss"], loss)
        assert abs(result["norm"] - norm) <= tolerance * norm, (result["norm"], norm)
        for name, grad in result["grads"].items():
            wanted = expected[aliases[name]]
            if wanted.norm() > 0.1 * norm:
                likeness = torch.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0).item()
                assert likeness > 1 - tolerance, (name, likeness)


def initial_state(rank: int, world: int, plan: Plan) -> dict[str, torch.Tensor]:
    """Whole initial parameters and buffers of this rank's stages."""
    from tpplan.runtime.api import parallelize
    from tpplan.runtime.full_tensors import full_tensor_of

    found = {}
    for stage in parallelize(target_of(plan), plan, device="cpu", seed=SEED).stages:
        model = stage.part.model
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        names = {name: tensor for name, tensor in named_tensors(model).items() if name in held}
        found |= {name: full_tensor_of(t, name, plan.tensor_parallel).clone() for name, t in names.items()}
    return found


@dataclass(frozen=True)
class Difference:
    """How far a run is from the single process, relative; `worst` is the parameter that is farthest."""

    loss_error: float
    norm_error: float
    gradient_error: float
    worst: str


def compare(plan: Plan, results: list[dict[str, Any]], loss: float, expected: Mapping[str, torch.Tensor]) -> Difference:
    """Loss, norm and every gradient of every rank against the single process's.

    The error of a gradient is ||g - g_ref|| / max(||g_ref||, 1e-3 x the largest gradient norm); one that only
    one side has is infinitely wrong.
    """
    aliases = _aliases(plan)
    largest = max(g.norm().item() for g in expected.values())
    norm = sum(g.norm().item() ** 2 for g in expected.values()) ** 0.5
    errors = dict.fromkeys(expected, -1.0)
    for result in results:
        for name, grad in result["grads"].items():
            if aliases[name] not in expected:  # a parameter that this loss does not reach
                errors[name] = max(errors.get(name, 0.0), 0.0 if not grad.any() else math.inf)
                continue
            wanted = expected[aliases[name]]
            error = (grad - wanted).norm().item() / max(wanted.norm().item(), 1e-3 * largest)
            errors[aliases[name]] = max(errors[aliases[name]], math.inf if math.isnan(error) else error)
    missing = {name: math.inf for name, error in errors.items() if error < 0 and expected[name].any()}
    errors |= missing
    worst = max(errors, key=lambda name: errors[name])
    return Difference(
        loss_error=max(_relative(result["loss"], loss) for result in results),
        norm_error=max(_relative(result["norm"], norm) for result in results),
        gradient_error=errors[worst],
        worst=worst,
    )


def _relative(value: float, wanted: float) -> float:
    error = abs(value - wanted) / abs(wanted) if wanted else abs(value)
    return math.inf if math.isnan(error) else error


def check_gradients(plan: Plan, results: list[dict[str, Any]], dtype: torch.dtype, tolerance: float) -> None:
    """Assert that loss, norm and every gradient of every rank equal the single process's."""
    loss, expected = reference(plan, dtype)
    found = compare(plan, results, loss, expected)
    assert max(found.loss_error, found.norm_error, found.gradient_error) <= tolerance, found


def _aliases(plan: Plan) -> dict[str, str]:
    from tpplan.runtime.stage import parameter_aliases

    return parameter_aliases(target_of(plan).build("meta"))
