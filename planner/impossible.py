"""Why no mesh is left: the smallest set of pins that rules all out, and the constraint that they break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import InfeasibleError, TpplanError, UsageError
from .mesh import LARGEST_TP, Space
from .pins import Pin, Pins
from .request import Request
from .sharding import Sharding

PRODUCT = "tp x pp x dp_replicate x dp_shard = GPUs"
BATCH = "dp x microbatch_size x microbatches = global batch"


def no_mesh(
    request: Request, name: str, sharding: Sharding, space: Space, meshes: Callable[[Request], Sequence[object]]
) -> TpplanError:
    """The error for a request whose space is empty.

    Parameters
    ----------
    request : Request
    name : str
        The model's.
    sharding : Sharding
        Why only some tp degrees are legal.
    space : Space
        What the model allows.
    meshes : callable
        The meshes of a request.
    """
    legal, stages = space.tp_degrees, space.stages

    def empty(pins: Pins) -> bool:
        return not meshes(replace(request, pins=pins))

    if empty(Pins(request.pins.layers())):
        nearest = request.gpus * max(1, round(request.global_batch / request.gpus))
        return UsageError(
            f"A global batch of {request.global_batch} cannot be split over {request.gpus} GPUs.",
            f"Give --global-batch a multiple of {request.gpus}, for example {nearest}.",
        )
    core = smallest_core(request.pins, empty)
    if len(core.pins) == 1:
        alone = core.pins[0]
        broken, remedy = _constraint(alone, request, name, sharding, space), _allowed(alone, request, legal, stages)
        return InfeasibleError(f"{core.text()} is not possible: {broken}.", remedy)
    broken = "; ".join(_together(core, request))
    return InfeasibleError(f"{core.text()} cannot hold together: {broken}.", "Drop one of these pins.")


def smallest_core(pins: Pins, empty: Callable[[Pins], bool]) -> Pins:
    """A set of pins that leaves nothing while any part of it would leave something (deletion, one by one).

    >>> pins = Pins(tuple(Pin("fix", axis, 2) for axis in ("tp", "pp", "dp")))
    >>> smallest_core(pins, lambda p: {"tp", "dp"} <= {pin.axis for pin in p}).text()
    'tp=2, dp=2'
    """
    core = pins
    for pin in pins:
        less = core.without(pin)
        if empty(less):
            core = less
    return core


def _together(core: Pins, request: Request) -> list[str]:
    """The equations that pins break together."""
    axes = {pin.axis for pin in core}
    dp, size = core.fixed("dp"), core.fixed("microbatch_size")
    if axes == {"dp", "microbatch_size"} and dp is not None and size is not None:
        return [f"microbatch_size={size} does not divide {request.global_batch} samples / {dp} replicas"]
    said = []
    if axes & {"tp", "pp", "dp", "dp_replicate", "dp_shard"}:
        said.append(f"{PRODUCT} = {request.gpus}")
    if axes & {"dp", "dp_replicate", "dp_shard", "microbatch_size", "microbatches"}:
        said.append(f"{BATCH} = {request.global_batch}")
    if "pp" in axes:
        said.append("a pipeline needs at least pp microbatches")
    if axes & {"virtual", "schedule"}:
        said.append("interleaved schedules have virtual of 2 or more and pp x virtual chunks of equal size, others 1")
    if "sequence_parallel" in axes:
        said.append("tp must divide the tokens for sequence parallelism")
    return said


def _constraint(pin: Pin, request: Request, name: str, sharding: Sharding, space: Space) -> str:
    """What the space demands of the pin's axis."""
    stages = space.stages
    if pin.axis == "tp":
        return _tp_constraint(pin, request, sharding)
    if pin.axis == "pp":
        if pin.kind != "max" and int(pin.value) > stages:
            return f"{name} has {stages - 1} legal cuts, so {stages} stages at most"
        if pin.kind == "fix" and request.gpus % int(pin.value):
            return f"pp={pin.value} does not divide the {request.gpus} GPUs"
        return f"{PRODUCT} = {request.gpus}, and every stage needs a microbatch ({BATCH})"
    if pin.axis in ("microbatch_size", "microbatches"):
        if pin.kind == "fix" and request.global_batch % int(pin.value):
            return f"{pin.axis}={pin.value} does not divide the global batch of {request.global_batch} samples"
        return f"{BATCH} = {request.global_batch}"
    if pin.axis in ("dp", "dp_replicate", "dp_shard"):
        if pin.kind == "fix" and request.gpus % int(pin.value):
            return f"{pin.axis}={pin.value} does not divide the {request.gpus} GPUs"
        if pin.kind == "fix" and request.global_batch % int(pin.value):
            return f"{pin.axis}={pin.value} does not divide the global batch of {request.global_batch} samples"
        return f"{PRODUCT} = {request.gpus} and {BATCH} = {request.global_batch}"
    if pin.axis in ("virtual", "schedule"):
        equal = ", ".join(str(chunks) for chunks, layouts in sorted((space.layouts or {}).items()) if layouts)
        return f"interleaved schedules need near-equal chunks: pp x virtual may be {equal or 'nothing'} for {name}"
    if pin.axis == "sequence_parallel":
        return f"sequence parallelism: {sharding.sequence.reason or 'tp must divide the tokens'}"
    return f"{PRODUCT} = {request.gpus} and {BATCH} = {request.global_batch}"


def _tp_constraint(pin: Pin, request: Request, sharding: Sharding) -> str:
    degree, most = int(pin.value), max(LARGEST_TP, request.gpus_per_node)
    if pin.kind != "fix" or sharding.degrees_allowed(1) == sharding.degrees_allowed(most):
        return "; ".join(sharding.reasons[:2]) or f"tp is {most} at most"
    said = []
    if request.gpus % degree:
        said.append(f"tp={degree} does not divide the {request.gpus} GPUs")
    broken = [label for size, label in sharding.parts if size % degree]
    if broken:
        said.append(f"tp must divide {', '.join(broken[:3])}")
    if degree > most:
        said.append(f"tp is {most} at most")
    return "; ".join(said) or "; ".join(sharding.reasons[:2])


def _allowed(pin: Pin, request: Request, legal: Sequence[int], stages: int) -> str:
    """What could be asked for instead of a single pin."""
    if pin.axis == "tp":
        return f"Allowed: {', '.join(str(t) for t in legal if request.gpus % t == 0)}."
    if pin.axis == "pp":
        return f"Allowed: {', '.join(str(p) for p in range(1, stages + 1) if request.gpus % p == 0)}."
    return "Choose another value, or drop the pin."
