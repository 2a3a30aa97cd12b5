"""One traced run: the model's own forward, loss and backward at one microbatch size, recorded and folded."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..errors import ModelError, TargetError
from . import rnn
from .attention import falls_apart, learned_mask_attention, stays_whole, whole_attention
from .blame import blame, describe, running_line
from .budget import Budget
from .chain import ReplayInexact, Span, build_chain
from .chance import Chance
from .fake_run import FakeRun
from .fold import Folded, fold
from .gpu_dropout import dropout
from .graph import Parameter
from .grouped import grouped_mm, takes
from .inputs import Inputs
from .own_checkpoints import checkpoint_inputs
from .pass_for_real import pass_for_real, read_out
from .recorder import Recorder
from .recording import Recording
from .replay import Replayer
from .stand_in import FakeModel, RealModel
from .target import Target
from .user_module import user_code
from .values import Values


@dataclass(slots=True)
class Run:
    """One traced run, folded."""

    recording: Recording
    spans: list[Span]
    folded: Folded
    inputs: dict[str, int]
    replayed: int
    dropout: tuple[str, ...]
    data_decides: bool
    loss: str
    chance: tuple[str, ...] = ()
    low: frozenset[str] = frozenset()


_FORMAT = torch.Tensor.__format__
_LEAVES_TORCH = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, _FORMAT)


class Steady(TorchFunctionMode):
    """Keeps the trace independent of chance: attention without dropout, layer-drop that drops no layer.

    Attention stays one operator only without dropout on the CPU; GPUs draw it inside the kernel. A draw of one
    number decides whether a layer runs (layer-drop keeps the layer when it is large).
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.dropout: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` without chance."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout:
            return dropout(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            args, kwargs = self._without_dropout(args, kwargs)
        if func in (F.grouped_mm, torch._grouped_mm) and takes(*args, **kwargs):  # pyright: ignore[reportPrivateImportUsage]
            return grouped_mm(*args, **kwargs)
        if (whole := rnn.stand_in_for(func)) is not None:
            return whole(*args, **kwargs)
        if func in _LEAVES_TORCH and self.recorder.fake is not None and (func is not _FORMAT or args[0].dim() == 0):
            return read_out(self.recorder, func, args, kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], (list, tuple)):
            args = (tree_map(_as_number, args[0]), *args[1:])  # torch reads tensors within a list by their memory
        if func is torch.Tensor.to and len(args) > 1 and _is_gpu(args[1]):
            args = (args[0], "cpu", *args[2:])
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if self.recorder.fake is None and func is torch.rand and result.dim() == 0:
            return torch.ones_like(result)
        return result

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attn_mask is not None and falls_apart(query, attn_mask):
            return learned_mask_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        if dropout_p:
            self._leave_out_dropout()
        kernel = F.scaled_dot_product_attention if stays_whole(query, value, attn_mask) else whole_attention
        return kernel(query, key, value, attn_mask, 0.0, is_causal, **kwargs)

    def _without_dropout(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of nn.MultiheadAttention's function without dropout: the attention inside it is out of sight."""
        bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given = bound.arguments
        if given["dropout_p"] and given.get("training", True) and not given.get("need_weights", True):
            self._leave_out_dropout()
            given["dropout_p"] = 0.0
        return bound.args, bound.kwargs

    def _leave_out_dropout(self) -> None:
        call = self.recorder.current_call
        self.dropout[self.recorder.recording.calls[call].fqn if call >= 0 else ""] = None


def _as_number(value: Any) -> Any:
    """The number in a tensor of one element."""
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def _is_gpu(device: Any) -> bool:
    """Whether an argument names a device that this machine may lack: the model is traced on the CPU."""
    return isinstance(device, (str, torch.device)) and str(device).startswith(("cuda", "xpu", "mps"))


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """The same random draws every time, the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from logging a traceback of its own for an error that we report."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _blaming(doing: str, target: Target) -> Iterator[None]:
    """Turn an error of the model's code into one line that names the innermost line outside torch."""
    try:
        yield
    except (ModelError, TargetError):
        raise
    except Exception as error:
        where = blame(error, target._source.folder)
        if target.kind not in ("file", "module"):
            own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
            frames = [f for f in extract_tb(error.__traceback__) if not f.filename.startswith(own)]
            if frames:
                where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {describe(error)}"
        raise ModelError(
            f"{doing}. {where}",
            "Correct the model's code or the shapes of its inputs; --debug shows the whole traceback.",
        ) from error


def run_once(
    stand_in: RealModel,
    target: Target,
    batch: int,
    seq: int,
    parameters: Mapping[str, Parameter],
    full: bool,
    low: frozenset[str] = frozenset(),
) -> Run:
    """Forward, loss and backward at one microbatch size; `low` are places whose single draws are small (`Chance`)."""
    model = stand_in.model
    recorder, chance = Recorder(model, stand_in.empty), Chance(low)
    recorder.on_call = chance.reset
    limits = stand_in.limits
    if limits.bounded or limits.until is not None:
        recorder.on_operator = Budget(recorder, stand_in.borders.opened, limits.until).operator
    for name, tensor in model.named_parameters():
        recorder.storage_of(recorder.register(tensor, "parameter", name)).weight_like = True
    for name, tensor in model.named_buffers():
        recorder.register(tensor, "buffer", name)
    replayer = Replayer(stand_in.repeated, stand_in.borders.opened, recorder, stand_in.empty)
    steady = Steady(recorder)
    with same_draws():
        inputs = target.example_inputs(model, batch, seq).map(stand_in.input)
        named = {name: recorder.register(tensor, "input", name) for name, tensor in inputs.tensors().items()}
        if isinstance(stand_in, FakeModel):
            recorder.fake = fake_run(stand_in, recorder, batch, chance, target)
        doing = f"{target.name} failed while being traced"
        try:
            with (
                _quiet_torch(),
                pass_for_real(recorder),
                chance.active(),
                user_code(doing, target._source.folder),
                _blaming(doing, target),
            ):
                loss = _forward_backward(recorder, replayer, steady, target, inputs, full)
        except ModelError as error:
            if replayer.replayed:  # perhaps it misses what a replayed layer did not do
                raise ReplayInexact(error.message) from error
            raise
    for parameter in model.parameters():
        parameter.grad = None
    if isinstance(stand_in, FakeModel) and recorder.fake is not None:
        stand_in.values += recorder.fake.cached(model, [fake for fake, _ in stand_in.values])
    stand_in.borders.settle(recorder.recording)
    spans = build_chain(recorder.recording, stand_in.borders.opened, limits.looped)
    decided = [read.fqn for read in recorder.recording.reads if read.sizes]
    data_decides = stand_in.data_decides or bool(decided)
    by_structure = {
        fqn
        for fqn in {span.call.fqn for span in spans}
        if stand_in.data_decides or any(name == fqn or name.startswith(fqn + ".") for name in decided)
    }
    folded = fold(recorder.recording, spans, parameters, by_structure)
    return Run(
        recording=recorder.recording,
        spans=spans,
        folded=folded,
        inputs=named,
        replayed=replayer.replayed,
        dropout=tuple(steady.dropout),
        data_decides=data_decides,
        loss=loss,
        chance=tuple(chance.places),
        low=low,
    )


def fake_run(stand_in: FakeModel, recorder: Recorder, batch: int, chance: Chance, target: Target) -> FakeRun:
    """What runs operators on fake tensors, told the values that are known."""
    values = Values(recorder.recording, batch, chance)
    for fake, real in stand_in.values:
        values.tell(recorder.known(fake), real)
    tensors = recorder.recording.tensors  # inputs are this run's only
    stand_in.values = [pair for pair in stand_in.values if tensors[recorder.known(pair[0])].kind != "input"]

    def place() -> tuple[str, str]:
        call = recorder.current_call
        return recorder.recording.calls[call].fqn if call >= 0 else "", running_line(target.folder)

    return FakeRun(stand_in.mode, recorder.registry, values, place)


def _forward_backward(
    recorder: Recorder, replayer: Replayer, steady: Steady, target: Target, inputs: Inputs, full: bool
) -> str:
    """Run the model, and say which loss was taken."""
    model = recorder.model
    with recorder.watch(), steady, checkpoint_inputs(recorder.keep):
        if full:
            output = model(*inputs.args, **inputs.kwargs)
        else:
            with replayer.active():
                output = model(*inputs.args, **inputs.kwargs)
        loss, described = target.loss_and_description(output, inputs)
        del output
        if not loss.requires_grad:
            raise ModelError(
                f"The loss of {target.name} depends on no trainable parameter.",
                "Return a loss computed from the model's output, without detach() or no_grad().",
            )
        recorder.begin_backward(loss)
        loss.backward()
    return described
