"""The model that a user names: how to build it, what to feed it, where its loss is.

target = load_target("model.py", model_args={"n_layer": "4"})
model  = target.build("meta")                       # no memory; "cpu" for the user's own weights
inputs = target.example_inputs(model, batch=2, seq=1024)
loss   = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TargetError, UsageError
from .locate import locate

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .inputs import Inputs
    from .sequence import SequenceDefault
    from .sources import Source

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class Target:
    """A model target; make one with `load_target`.

    Attributes
    ----------
    spec : str
        As typed.
    model_args : mapping
        As given (`--model-arg`), before parsing.
    input_specs : tuple of str
        As given (`--input`).
    precision : str
        "bf16" or "fp32", of the run; parameters are built in the dtype that the model's own code gives them,
        those of a config in float32.
    """

    spec: str
    model_args: Mapping[str, Any]
    input_specs: tuple[str, ...]
    precision: str
    _source: Source = field(repr=False)

    @property
    def name(self) -> str:
        """A short name: the file's, the module's or the config's folder."""
        return self._source.name

    @property
    def kind(self) -> str:
        """file, module, huggingface or diffusers."""
        return self._source.kind

    @property
    def source_hash(self) -> str:
        """sha256 of the file's text, or of the config's JSON with sorted keys."""
        return self._source.content_hash

    @property
    def folder(self) -> Path | None:
        """Where the user's code lives, to tell its lines from a library's (`blame`); None for a config."""
        return self._source.folder

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about how the model is built; complete once `build` has run."""
        return tuple(self._source.notes)

    def build(self, device: str = "meta") -> nn.Module:
        """The model, in training mode as its constructor leaves it.

        Parameters
        ----------
        device : {"meta", "cpu"}
            "meta": parameters (and, where the constructor allows it, buffers) without memory. "cpu": the
            user's own construction with its own weights; seed the random generators before.

        Raises
        ------
        TargetError
            If nothing in it can be trained.
        ModelError
            If the user's code fails.
        """
        if device not in ("meta", "cpu"):
            raise UsageError(f"A target is built on meta or cpu, not on {device!r}.", "Build it, then move it.")
        model = self._source.construct(device)
        self._check_trainable(model)
        return model

    def example_inputs(self, model: nn.Module, batch: int, seq: int) -> Inputs:
        """One batch of CPU tensors, drawn from torch's current random state.

        From `--input`, else from the file's ``example_inputs(batch, seq)`` or ``(batch, seq, model)``, else
        from the config of a Hugging Face or diffusers model.

        Raises
        ------
        TargetError
            If nothing says what the model eats, or it does not fit the model's forward.
        ModelError
            If the file's function fails.
        """
        from . import diffusers_models, huggingface, huggingface_inputs, inputs

        has_loss_fn = self._source.hooks.loss_fn is not None
        if self.input_specs:
            return inputs.from_specs(self.input_specs, model, batch, seq, has_loss_fn)
        if self._source.hooks.example_inputs is not None:
            value = self._call_example_inputs(self._source.hooks.example_inputs, model, batch, seq)
            return inputs.from_user(value, model, has_loss_fn, self.name)
        if huggingface.is_hf_model(model):
            return huggingface_inputs.dummy_inputs(model, batch, seq)
        if diffusers_models.is_diffusers_model(model):
            return diffusers_models.dummy_inputs(model, batch, seq)
        needed = ", ".join(inputs.required_names(model) or inputs.forward_names(model) or ["..."])
        raise TargetError(
            f"What to feed {type(model).__name__}.forward({needed}) is unknown.",
            'Define example_inputs(batch, seq) beside the model, or pass --input "name=int64[B,S]<N".',
        )

    def loss(self, output: Any, inputs: Inputs, num_items: int | torch.Tensor | None = None) -> torch.Tensor:
        """The 0-dim loss of one forward.

        Parameters
        ----------
        output : Any
            What ``model(*inputs.args, **inputs.kwargs)`` returned.
        num_items : int or tensor, optional
            Global number of targets, for a `loss_fn` that takes it (`loss_weighting` "tokens"); a Hugging
            Face model gets it through `forward_kwargs` instead.
        """
        from .losses import GLOBAL_COUNT, as_scalar, find_loss, takes_global_count
        from .user_module import user_code

        loss_fn = self._source.hooks.loss_fn
        if loss_fn is None:
            return find_loss(output)[0]
        extra = {GLOBAL_COUNT: num_items} if takes_global_count(loss_fn) else {}
        with user_code(f"loss_fn of {self.name} failed", self._source.folder):
            return as_scalar(loss_fn(output, inputs.as_user(), **extra), "The result of loss_fn")

    def loss_and_description(self, output: Any, inputs: Inputs) -> tuple[torch.Tensor, str]:
        """The loss of one forward, and in words which one it is."""
        from .losses import find_loss

        if self._source.hooks.loss_fn is not None:
            return self.loss(output, inputs), self.loss_description
        return find_loss(output)

    def describe_loss(self, output: Any) -> str:
        """In words, which loss `loss` takes from this output."""
        from .losses import find_loss

        return self.loss_description if self._source.hooks.loss_fn is not None else find_loss(output)[1]

    @property
    def loss_description(self) -> str:
        """In words, which loss is used, as far as it is known without an output (see `describe_loss`)."""
        if self._source.hooks.loss_fn is not None:
            return f"loss_fn of {self.name}"
        return "the model's own loss if it returns one, else the sum of the mean squares of its float outputs"

    @property
    def loss_weighting(self) -> str:
        """How microbatches weigh in the loss.

        "tokens": the loss is a sum over targets divided by a number that is given to it; "equal": each
        microbatch's own mean.
        """
        from .losses import takes_global_count

        if self._source.hooks.loss_fn is not None:
            return "tokens" if takes_global_count(self._source.hooks.loss_fn) else "equal"
        return "tokens" if self._hf_skeleton is not None else "equal"

    def forward_kwargs(self, num_items: int | torch.Tensor) -> dict[str, Any]:
        """What forward gets beside the inputs so that its loss is divided by `num_items`; {} for "equal"."""
        from .losses import GLOBAL_COUNT

        by_forward = self._source.hooks.loss_fn is None and self.loss_weighting == "tokens"
        return {GLOBAL_COUNT: num_items} if by_forward else {}

    def count_targets(self, inputs: Inputs) -> int:
        """Number of targets in `inputs` that count in the loss, for `loss_weighting` "tokens".

        A Hugging Face model: labels other than -100 (without the first of each row for a causal model). A
        `loss_fn`: the file's ``count_targets(inputs)``, else entries other than -100 of the input called
        labels, targets, target, label or y.

        Raises
        ------
        TargetError
            If the file has neither.
        """
        from .huggingface import target_count
        from .user_module import user_code

        if self._source.hooks.loss_fn is None:
            if self._hf_skeleton is None:
                raise UsageError(f"{self.name} weights microbatches equally; it has no target count.")
            return target_count(self._hf_skeleton, inputs)
        if self._source.hooks.count_targets is not None:
            with user_code(f"count_targets of {self.name} failed", self._source.folder):
                return int(self._source.hooks.count_targets(inputs.as_user()))
        tensors = inputs.tensors()
        for name in ("labels", "targets", "target", "label", "y"):
            if name in tensors:
                return int((tensors[name] != -100).sum())
        raise TargetError(
            f"loss_fn of {self.name} takes num_items_in_batch, but which input holds its targets is unknown.",
            "Define count_targets(inputs) beside it, or call the input labels.",
        )

    def default_sequence_length(self, model: nn.Module | None = None) -> int:
        """``sequence_default(model).length``."""
        return self.sequence_default(model).length

    def sequence_default(self, model: nn.Module | None = None) -> SequenceDefault:
        """The length for a user who gives none, its meaning and where it comes from (see `sequence`)."""
        from .sequence import sequence_default

        return sequence_default(self._skeleton if model is None else model, self._source.hooks.example_inputs)

    @cached_property
    def _skeleton(self) -> nn.Module:
        """The model on meta, for questions about its class and config; never handed out, so never changed."""
        return self.build("meta")

    @cached_property
    def _hf_skeleton(self) -> nn.Module | None:
        """The skeleton, if it is a transformers model whose loss can be given the number of targets."""
        from .huggingface import counts_tokens, is_hf_model

        return self._skeleton if is_hf_model(self._skeleton) and counts_tokens(self._skeleton) else None

    def _call_example_inputs(self, function: Callable[..., Any], model: nn.Module, batch: int, seq: int) -> Any:
        """Call the file's function with as many of (batch, seq, model) as it takes."""
        from .user_module import user_code

        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in positional for kind in kinds)
        with user_code(f"example_inputs of {self.name} failed", self._source.folder):
            return function(*(batch, seq, model)[: max(1, takes)])

    def _check_trainable(self, model: nn.Module) -> None:
        from .construct import lazy_parameters

        lazy = lazy_parameters(model)
        if lazy:
            raise TargetError(
                f"{self.name}: the shape of {lazy[0]} is only known after a first forward.",
                "Give lazy modules their sizes (nn.Linear for nn.LazyLinear).",
            )
        if not any(p.requires_grad for p in model.parameters()):
            frozen = sum(1 for _ in model.parameters())
            raise TargetError(
                f"{self.name} has no trainable parameters ({frozen} frozen)."
                if frozen
                else f"{self.name} has no parameters to train.",
                "Set requires_grad on what shall be trained." if frozen else "Name another model: model.py:NAME.",
            )


def load_target(
    spec: str,
    *,
    model_args: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    inputs: Sequence[str] = (),
    precision: str = "bf16",
) -> Target:
    """The model that `spec` names.

    Parameters
    ----------
    spec : str
        ``model.py``, ``model.py:NAME``, ``package.module:NAME``, a Hugging Face folder or ``config.json``.
    model_args : mapping of str to str
        Arguments of the factory or class (of the config, for a config.json); read as Python literals, else
        as strings.
    inputs : sequence of str
        ``--input`` specs, such as ``"ids=int64[B,S]<32000"``.

    Raises
    ------
    TargetError
        Missing (with near names), ambiguous or no model, missing arguments.
    ModelError
        The file fails while being imported.
    EnvironmentFailure
        transformers or diffusers is needed and not installed.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"Unknown precision {precision!r}.", f"Choose {' or '.join(PRECISIONS)}.")
    location = locate(spec)
    from .sources import from_location

    given = dict(model_args)
    source = from_location(location, spec, {key: _literal(value) for key, value in given.items()})
    return Target(spec, given, tuple(inputs), precision, source)


def _literal(value: Any) -> Any:
    """A flag's value as a Python literal where it is one, else the string itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
