"""The model that a user names: how to build it, what to feed it, where its loss is.

target = load_target("model.py", model_args={"n_layer": "4"})
model  = target.build("meta")                       # no memory; "cpu" for the user's own weights
inputs = target.example_inputs(model, batch=2, seq=1024)
loss   = target.loss(model(*inputs.args, **inputs.kwargs), inputs)
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TargetError, UsageError
from .blame import describe
from .locate import Location, locate, read_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .inputs import Inputs

PRECISIONS = ("bf16", "fp32")
LONGEST_DEFAULT = 4096
DEFAULT_IMAGE_SIDE = 224
# what configs and models call the longest sequence they can take
_LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_len",
    "seq_length",
    "context_length",
    "n_ctx",
    "max_target_positions",
)


@dataclass(frozen=True, slots=True)
class SequenceDefault:
    """The sequence length taken when the user gives none.

    `meaning` is "tokens" or "side" (of images); `source` says in words where it comes from.
    """

    length: int
    meaning: str
    source: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that a model's file may define beside the model."""

    example_inputs: Callable[..., Any] | None = None
    loss_fn: Callable[..., Any] | None = None
    count_targets: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Target:
    """A model target; make one with `load_target`.

    Attributes
    ----------
    spec, name, kind : str
        As typed; a short name; "file", "module", "huggingface" or "diffusers".
    source_hash : str
        sha256 of the file's text, or of the config's JSON in canonical form.
    model_args : mapping
        As given (`--model-arg`), before parsing.
    input_specs : tuple of str
        As given (`--input`).
    precision : str
        "bf16" or "fp32", of the run; parameters are built in the dtype the model's own code gives them.
    folder : Path or None
        Importable while the user's code runs.
    """

    spec: str
    name: str
    kind: str
    source_hash: str
    model_args: Mapping[str, Any]
    input_specs: tuple[str, ...]
    precision: str
    folder: Path | None
    hooks: Hooks
    _construct: Callable[[str], nn.Module] = field(repr=False)
    _notes: list[str] = field(default_factory=list, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about how the model is built; complete once `build` has run."""
        return tuple(self._notes)

    def build(self, device: str = "meta") -> nn.Module:
        """The model, in training mode as its constructor leaves it.

        Parameters
        ----------
        device : {"meta", "cpu"}
            "meta": parameters (and, where the constructor allows it, buffers) without memory. "cpu": the user's
            own construction with its own weights; seed the random generators before.

        Raises
        ------
        TargetError
            If nothing in it can be trained.
        ModelError
            If the user's code fails.
        """
        if device not in ("meta", "cpu"):
            raise UsageError(
                f"A target is built on meta or cpu, not on {device!r}.", "Build it, then move it."
            )
        model = self._construct(device)
        self._check_trainable(model)
        return model

    def example_inputs(self, model: nn.Module, batch: int, seq: int) -> Inputs:
        """One batch of CPU tensors, drawn from torch's current random state.

        From the file's ``example_inputs(batch, seq)`` (or ``(batch, seq, model)``), else from `--input`, else from a Hugging Face config;
        `--input` on the command line wins over the file.

        Raises
        ------
        TargetError
            If nothing says what the model eats, or it does not fit the model's forward.
        ModelError
            If the file's function fails.
        """
        from . import diffusers_models, huggingface, inputs

        has_loss_fn = self.hooks.loss_fn is not None
        if self.input_specs:
            return inputs.from_specs(self.input_specs, model, batch, seq, has_loss_fn)
        if self.hooks.example_inputs is not None:
            value = self._call_example_inputs(self.hooks.example_inputs, model, batch, seq)
            return inputs.from_user(value, model, has_loss_fn, self.name)
        if huggingface.is_hf_model(model):
            return huggingface.dummy_inputs(model, batch, seq)
        if self.kind == "diffusers":
            return diffusers_models.dummy_inputs(model, batch, seq)
        needed = ", ".join(inputs.required_names(model) or inputs.forward_names(model) or ["..."])
        raise TargetError(
            f"What to feed {type(model).__name__}.forward({needed}) is unknown.",
            'Define example_inputs(batch, seq) beside the model, or pass --input "name=int64[B,S]<vocabulary".',
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

        loss_fn = self.hooks.loss_fn
        if loss_fn is None:
            return find_loss(output)[0]
        extra = {GLOBAL_COUNT: num_items} if takes_global_count(loss_fn) else {}
        with user_code(f"loss_fn of {self.name} failed", self.folder):
            return as_scalar(loss_fn(output, inputs.as_user(), **extra), "The result of loss_fn")

    def describe_loss(self, output: Any) -> str:
        """In words, which loss `loss` takes from this output."""
        from .losses import find_loss

        return self.loss_description if self.hooks.loss_fn is not None else find_loss(output)[1]

    @property
    def loss_description(self) -> str:
        """In words, which loss is used, as far as it is known without an output (see `describe_loss`)."""
        if self.hooks.loss_fn is not None:
            return f"loss_fn of {self.name}"
        return "the model's own loss if it returns one, else the mean of squares of its first floating-point output"

    @property
    def loss_weighting(self) -> str:
        """ "tokens": the loss is a sum over targets divided by a number that is given to it. "equal": its own mean."""
        from .losses import takes_global_count

        if self.hooks.loss_fn is not None:
            return "tokens" if takes_global_count(self.hooks.loss_fn) else "equal"
        return "tokens" if self._hf_skeleton is not None else "equal"

    def forward_kwargs(self, num_items: int | torch.Tensor) -> dict[str, Any]:
        """What forward gets beside the inputs so that its loss is divided by `num_items`; {} for "equal"."""
        from .losses import GLOBAL_COUNT

        by_forward = self.hooks.loss_fn is None and self.loss_weighting == "tokens"
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

        if self.hooks.loss_fn is None:
            if self._hf_skeleton is None:
                raise UsageError(f"{self.name} weights microbatches equally; it has no target count.")
            return target_count(self._hf_skeleton, inputs)
        if self.hooks.count_targets is not None:
            with user_code(f"count_targets of {self.name} failed", self.folder):
                return int(self.hooks.count_targets(inputs.as_user()))
        tensors = inputs.tensors()
        for name in ("labels", "targets", "target", "label", "y"):
            if name in tensors:
                return int((tensors[name] != -100).sum())
        raise TargetError(
            f"loss_fn of {self.name} takes num_items_in_batch, but which input holds its targets is unknown.",
            "Define count_targets(inputs) beside it, or call the input labels.",
        )

    def default_sequence_length(self, model: nn.Module) -> int:
        """``sequence_default(model).length``."""
        return self.sequence_default(model).length

    def sequence_default(self, model: nn.Module) -> SequenceDefault:
        """min(4096, the model's maximum) for sequences; for images their side, 224 unless the config says.

        A default that the file gives the `seq` argument of its `example_inputs` comes first.
        """
        from .huggingface import image_side, is_hf_model, is_image_model

        config = getattr(model, "config", None)
        stated = _default_of(self.hooks.example_inputs)
        images = is_image_model(model) if is_hf_model(model) else _looks_like_images(model)
        meaning = "side" if images else "tokens"
        if stated is not None:
            return SequenceDefault(stated, meaning, "the default of example_inputs")
        if images:
            side = image_side(config)
            named = (
                "the config's image_size"
                if side
                else f"images of {DEFAULT_IMAGE_SIDE} x {DEFAULT_IMAGE_SIDE}"
            )
            return SequenceDefault(side or DEFAULT_IMAGE_SIDE, meaning, named)
        found = _longest_sequence(model)
        if found is None:
            return SequenceDefault(LONGEST_DEFAULT, meaning, f"{LONGEST_DEFAULT}: the model names no maximum")
        name, longest = found
        limit = f"min({LONGEST_DEFAULT}, {name} = {longest})"
        return SequenceDefault(min(LONGEST_DEFAULT, longest), meaning, limit)

    @cached_property
    def _hf_skeleton(self) -> nn.Module | None:
        """The model on meta if it is one of transformers whose loss can be given the number of targets."""
        from .huggingface import counts_tokens, is_hf_model

        model = self.build("meta")
        return model if is_hf_model(model) and counts_tokens(model) else None

    def _call_example_inputs(
        self, function: Callable[..., Any], model: nn.Module, batch: int, seq: int
    ) -> Any:
        """Call the file's function with as many of (batch, seq, model) as it takes."""
        from .user_module import user_code

        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in positional for kind in kinds)
        with user_code(f"example_inputs of {self.name} failed", self.folder):
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
                "Set requires_grad on what shall be trained."
                if frozen
                else "Name another model: model.py:NAME.",
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
        ``model.py``, ``model.py:NAME``, ``package.module:NAME``, a Hugging Face folder or its ``config.json``.
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
    given = dict(model_args)
    arguments = {key: _literal(value) for key, value in given.items()}
    common: dict[str, Any] = {
        "spec": spec,
        "model_args": given,
        "input_specs": tuple(inputs),
        "precision": precision,
    }
    if location.kind == "config":
        return _config_target(location, arguments, common)
    return _code_target(location, arguments, common)


def _code_target(location: Location, arguments: dict[str, Any], common: dict[str, Any]) -> Target:
    from .user_module import bind_arguments, execute, find_model, user_code

    module = execute(location)
    path = location.path or (Path(module.__file__) if getattr(module, "__file__", None) else None)
    shown = location.module or common["spec"].removesuffix(f":{location.attribute}")
    found = find_model(module, location.attribute, shown)
    bind_arguments(found, arguments, shown)
    hooks = Hooks(*(_hook(module, name) for name in ("example_inputs", "loss_fn", "count_targets")))
    folder = location.path.parent if location.path is not None else Path.cwd()
    notes: list[str] = []
    doing = f"Building {found.name} of {shown} failed"

    def construct(device: str) -> nn.Module:
        from .construct import build_on_meta, meta_copy

        with user_code(doing, folder):
            if not found.is_instance:
                make = bind_arguments(found, arguments, shown)
                return make() if device == "cpu" else _on_meta(make, build_on_meta, notes)
            if device == "meta":
                return meta_copy(found.value)
            # the file runs again, so that the seed set by the caller decides its weights
            again = find_model(execute(location), location.attribute, shown)
            return again.value

    text = path.read_bytes() if path is not None and path.is_file() else common["spec"].encode()
    name = path.stem if location.path is not None and path is not None else common["spec"]
    return Target(
        name=name if not location.attribute or location.path is None else f"{name}:{location.attribute}",
        kind=location.kind,
        source_hash=hashlib.sha256(text).hexdigest(),
        folder=folder,
        hooks=hooks,
        _construct=construct,
        _notes=notes,
        **common,
    )


def _config_target(location: Location, arguments: dict[str, Any], common: dict[str, Any]) -> Target:
    assert location.path is not None
    path = location.path
    data = read_config(path)
    if "_class_name" in data:
        from .diffusers_models import constructor as diffusers_constructor

        make, notes, kind = diffusers_constructor(data, path, arguments), [], "diffusers"
    else:
        from .huggingface import constructor, read_hf_config

        config, model_class, notes = read_hf_config(data, path, arguments)
        make, kind = constructor(config, model_class), "huggingface"
    name = path.parent.name if path.name == "config.json" else path.stem

    def construct(device: str) -> nn.Module:
        from .construct import build_on_meta
        from .user_module import user_code

        with user_code(f"Building {name} from {path.name} failed", None, "Correct the config."):
            return make() if device == "cpu" else _on_meta(make, build_on_meta, notes)

    return Target(
        name=name,
        kind=kind,
        source_hash=hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        folder=None,
        hooks=Hooks(),
        _construct=construct,
        _notes=notes,
        **common,
    )


def _on_meta(make: Callable[[], nn.Module], build: Callable[..., Any], notes: list[str]) -> nn.Module:
    model, refusal = build(make)
    if refusal is not None:
        note = (
            "Its constructor fails on the meta device, so it ran for real with only the parameters on meta "
            f"({describe(refusal)})."
        )
        if note not in notes:
            notes.append(note)
    return model


def _hook(module: Any, name: str) -> Callable[..., Any] | None:
    hook = getattr(module, name, None)
    if hook is not None and not callable(hook):
        raise TargetError(
            f"{name} in the model's file is a {type(hook).__name__}.", f"Make {name} a function."
        )
    return hook


def _literal(value: Any) -> Any:
    """A flag's value as a Python literal where it is one, else the string itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _default_of(example_inputs: Callable[..., Any] | None) -> int | None:
    """The default that a file gives the `seq` argument of its `example_inputs`."""
    if example_inputs is None:
        return None
    parameters = list(inspect.signature(example_inputs).parameters.values())
    default = parameters[1].default if len(parameters) > 1 else None
    return default if isinstance(default, int) and default > 0 else None


def _looks_like_images(model: nn.Module) -> bool:
    from torch import nn

    kinds = [type(module) for module in model.modules()]
    return nn.Conv2d in kinds and nn.Embedding not in kinds


def _longest_sequence(model: nn.Module) -> tuple[str, int] | None:
    """Name and value of the model's own limit on its sequence length."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (text, config, model, getattr(model, "cfg", None), getattr(model, "args", None)):
        for name in _LENGTH_NAMES:
            value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value - _reserved_positions(model)
    return None


def _reserved_positions(model: nn.Module) -> int:
    """Rows of a position table that no position uses (RoBERTa numbers positions from padding_idx + 1)."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return padding + 1
    return 0
