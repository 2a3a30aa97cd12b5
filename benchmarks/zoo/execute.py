"""Plan a small model for 2 or 4 gloo processes, run the plan, and compare loss and gradients with one process.

    python benchmarks/zoo/execute.py config.json --layout tp=2 --layout pp=2 --seq-len 16
    python benchmarks/zoo/execute.py model.py:make --layout tp=2,pp=2 --model-arg depth=4

Everything is in float64 without dropout, so that equal means equal to 1e-9. Rank 0 plans and runs the single
process; many models use the same processes one after the other, which are replaced if a model kills or hangs them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path += [path for path in (str(_TESTS), str(_TESTS / "runtime")) if path not in sys.path]

if TYPE_CHECKING:
    from worker_pool import WorkerPool

TOLERANCE = 1e-9
TIMEOUT_S = 180.0
_MICROBATCH, _MICROBATCHES = 2, 2


def execute(
    target_spec: str,
    model_args: Mapping[str, str],
    input_specs: Sequence[str],
    seq_len: int,
    layout: Mapping[str, int],
    workers: WorkerPool,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Run one model under one layout; what goes wrong is in the result, nothing is raised.

    Parameters
    ----------
    target_spec, model_args, input_specs, seq_len
        As on the command line of `tpplan suggest`; the model is run as it is, so it must be small.
    layout : mapping
        Degrees of "tp" and "pp"; the others are 1.
    workers : WorkerPool
        Of at least tp x pp processes.

    Returns
    -------
    dict
        layout; sharded_share (of the parameter bytes, over tp); loss (one process's); loss_error (relative);
        worst_gradient_error, by the rule of tests/runtime/numeric.py, and worst_gradient, its parameter; equal;
        error (empty if it ran) and trace (of the error); seconds.
    """
    from worker_pool import WorkerError

    world, start = layout.get("tp", 1) * layout.get("pp", 1), time.monotonic()
    result: dict[str, Any] = {
        "layout": " ".join(f"{axis}={degree}" for axis, degree in layout.items()),
        "sharded_share": 0.0,
        "loss": None,
        "loss_error": None,
        "worst_gradient_error": None,
        "worst_gradient": "",
        "equal": False,
        "error": "",
        "trace": "",
    }
    try:
        answers = workers.run(
            run_member,
            world=world,
            timeout_s=timeout_s,
            target=target_spec,
            model_args=dict(model_args),
            input_specs=list(input_specs),
            seq_len=seq_len,
            layout=dict(layout),
        )
        result |= answers[0]
        result["equal"] = max(result["loss_error"], result["worst_gradient_error"]) <= TOLERANCE
    except WorkerError as error:
        text = str(error).strip()
        # The message's last line that says what happened: a chained error ends with the last one raised.
        result |= {"error": _headline(text), "trace": text}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def run_member(
    rank: int,
    world: int,
    target: str,
    model_args: dict[str, str],
    input_specs: list[str],
    seq_len: int,
    layout: dict[str, int],
) -> dict[str, Any]:
    """One rank's part of `execute`; rank 0 answers with the comparison."""
    import torch.distributed as dist
    from numeric import compare, reference, run_plan
    from tpplan.planner.plan import Plan

    texts: list[Any] = [None]
    if rank == 0:
        texts = [plan_member(target, model_args, input_specs, seq_len, layout).to_json()]
    dist.broadcast_object_list(texts, src=0)
    plan = Plan.parse(texts[0])
    with _no_dropout():
        mine = run_plan(rank, world, plan)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    if rank:
        return {}
    import torch

    with _no_dropout():
        loss, expected = reference(plan, torch.float64)
    found = compare(plan, everyone, loss, expected)
    return {
        "sharded_share": sharded_share(plan, expected),
        "loss": loss,
        "loss_error": found.loss_error,
        "worst_gradient_error": found.gradient_error,
        "worst_gradient": found.worst,
    }


@contextmanager
def _no_dropout() -> Iterator[None]:
    """Dropout whose rate a model's code fixes draws nothing, so that runs are alike."""
    import torch.nn.functional as F

    drop = F.dropout
    F.dropout = lambda input, p=0.5, training=True, inplace=False: input
    try:
        yield
    finally:
        F.dropout = drop


def plan_member(
    target: str, model_args: Mapping[str, str], input_specs: Sequence[str], seq_len: int, layout: Mapping[str, int]
) -> Any:
    """The planner's plan with the layout pinned, on the profile of gloo processes."""
    from tpplan.planner.suggest import suggest_in_detail

    degrees = {"tp": layout.get("tp", 1), "pp": layout.get("pp", 1), "microbatch_size": _MICROBATCH}
    return suggest_in_detail(
        target,
        gpus=degrees["tp"] * degrees["pp"],
        hardware="cpu-gloo",
        precision="fp32",
        seq_len=seq_len,
        global_batch=_MICROBATCH * _MICROBATCHES,
        model_args=model_args,
        inputs=input_specs,
        fix=[*(f"{axis}={degree}" for axis, degree in degrees.items()), "recompute=none"],
    ).plan


def sharded_share(plan: Any, gradients: Mapping[str, Any]) -> float:
    """Share of the trained parameters' numbers that tp divides."""
    total = sum(gradient.numel() for gradient in gradients.values())
    divided = sum(
        gradient.numel()
        for name, gradient in gradients.items()
        if name in plan.parameters and "Replicate" not in plan.parameters[name].tp
    )
    return divided / total if total and plan.mesh.tensor_parallel_degree > 1 else 0.0


def _headline(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "Traceback"))]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    return (errors or lines or [text])[-1][:400]


def _layout(text: str) -> dict[str, int]:
    return {axis: int(degree) for axis, _, degree in (part.partition("=") for part in text.split(","))}


def main() -> None:
    """Run one target under each layout given, one JSON line each."""
    from worker_pool import WorkerPool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--layout", action="append", help="tp=2, pp=2 or tp=2,pp=2; may be given several times")
    parser.add_argument("--seq-len", type=int, default=16)
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S)
    parser.add_argument("--trace", action="store_true", help="print the traceback of a failure")
    given = parser.parse_args()
    layouts = [_layout(text) for text in given.layout or ["tp=2", "pp=2"]]
    arguments = dict(pair.split("=", 1) for pair in given.model_arg)
    workers = WorkerPool(max(layout.get("tp", 1) * layout.get("pp", 1) for layout in layouts))
    try:
        for layout in layouts:
            result = execute(given.target, arguments, given.input, given.seq_len, layout, workers, given.timeout)
            trace = result.pop("trace")
            print(json.dumps(result), flush=True)
            if given.trace and trace:
                print(trace, flush=True)
    finally:
        workers.close()


if __name__ == "__main__":
    main()
