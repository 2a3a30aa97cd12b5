"""The oracle of the runtime tests: one process that runs the same microbatches, and the comparison with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tpplan.planner.inputs import Inputs
from tpplan.planner.plan import Plan
from tpplan.planner.target import Target, load_target
from tpplan.runtime.data import Samples
from tpplan.runtime.initialise import build_seeded, named_tensors

SEED = 5
IGNORED = {"labels": -100, "targets": -1}


@contextmanager
def keep_float64() -> Iterator[None]:
    """Models that ask for float32 in their norms and losses (Llama) keep float64 tensors as they are.

    The methods are replaced, as a torch function mode is not active in a recomputed forward.
    """
    plain_float, plain_to = torch.Tensor.float, torch.Tensor.to

    def to_float(self: torch.Tensor) -> torch.Tensor:
        return self if self.dtype is torch.float64 else plain_float(self)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype is torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return plain_to(self, *args, **kwargs)

    torch.Tensor.float, torch.Tensor.to = to_float, to
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = plain_float, plain_to


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
    parallel = parallelize(target, plan, device="cpu", seed=SEED, float64=float64, compiled=compiled)
    batch = batch_of(parallel.samples, plan, parallel.mesh.replica, parallel.mesh.replicas)
    with keep_float64() if float64 else nullcontext():
        parallel.forward_backward(batch)
    result = parallel._totals()
    grads = {
        name: full_tensor_of(p.grad, name, plan.tensor_parallel).detach().clone()
        for name, p in parallel.stage.named_parameters().items()
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
    """Whole initial parameters and buffers of this rank's stage."""
    from tpplan.runtime.api import parallelize
    from tpplan.runtime.full_tensors import full_tensor_of

    stage = parallelize(target_of(plan), plan, device="cpu", seed=SEED).stage
    names = named_tensors(stage.part.model)
    held = dict(stage.part.model.named_parameters(remove_duplicate=False)) | dict(stage.part.model.named_buffers())
    return {n: full_tensor_of(t, n, plan.tensor_parallel).clone() for n, t in names.items() if n in held}


def check_gradients(plan: Plan, results: list[dict[str, Any]], dtype: torch.dtype, tolerance: float) -> None:
    """Loss, norm and every gradient of every rank against the single process.

    ||g - g_ref|| <= tolerance x max(||g_ref||, 1e-3 x the largest gradient norm).
    """
    loss, expected = reference(plan, dtype)
    aliases = _aliases(plan)
    largest = max(g.norm().item() for g in expected.values())
    norm = sum(g.norm().item() ** 2 for g in expected.values()) ** 0.5
    seen = set()
    for result in results:
        assert abs(result["loss"] - loss) <= tolerance * abs(loss), (result["loss"], loss)
        assert abs(result["norm"] - norm) <= tolerance * norm, (result["norm"], norm)
        for name, grad in result["grads"].items():
            wanted = expected[aliases[name]]
            seen.add(aliases[name])
            error = (grad - wanted).norm().item()
            assert error <= tolerance * max(wanted.norm().item(), 1e-3 * largest), (name, error, wanted.norm())
    assert seen == set(expected)


def _aliases(plan: Plan) -> dict[str, str]:
    from tpplan.runtime.stage import parameter_aliases

    return parameter_aliases(target_of(plan).build("meta"))
