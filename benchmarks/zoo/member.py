"""What a member of the zoo is: one architecture, at the size people use and at a size that runs in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent / "models"

# Sizes of a small variant, by the names that configs of transformers give them. Four layers, so that each of two
# stages has two; heads and widths that two ranks can share.
_SMALL: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DROPOUT = ("dropout", "drop", "layerdrop", "drop_path")  # parts of names whose rates are zero in a small variant


@dataclass(frozen=True, slots=True)
class Member:
    """One architecture.

    Attributes
    ----------
    name, family : str
        Unique name; family as in docs/zoo.md ("decoder", "encoder", "encoder-decoder", "mixture of experts",
        "state space", "vision", "audio", "multimodal", "diffusion", "torch", "recommender", "graph", "hand-written").
    library : str
        Where the architecture comes from: transformers, diffusers, timm, torchvision, torch, hand-written.
    model_type, architecture : str
        Of a transformers member: the config's type and the model class. Its target is a config.json.
    file : str
        Of any other member: ``models/FILE.py:factory`` without ``models/``, or a diffusers config (`model_type`
        empty, `config` holding ``_class_name``).
    config : mapping
        What differs from the config's defaults (arguments of the factory) at the real size.
    small : mapping
        What differs further in the small variant, on top of `_SMALL` for transformers members.
    seq : int
        Sequence length, or image side; 0 is the target's default, at most 4096.
    small_seq : int
        The same of the small variant.
    batch_coupled : bool
        Whether the loss compares the samples of a batch with each other (contrastive).
    oracle_small : bool
        Whether torch's FLOPs are counted on the small variant, because the real size takes too long without folding
        (loops over time steps).
    precision : str
        "fp32" where the model's own code mixes float32 buffers with weights, which pure bfloat16 refuses.
    executed : bool
        Whether the small variant is run on gloo processes.
    why_not : str
        Why it is not.
    """

    name: str
    family: str
    library: str
    model_type: str = ""
    architecture: str = ""
    file: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    seq: int = 0
    small_seq: int = 16
    inputs: tuple[str, ...] = ()
    batch_coupled: bool = False
    oracle_small: bool = False
    precision: str = "bf16"
    executed: bool = True
    why_not: str = ""

    def target(self, folder: Path, small: bool = False) -> tuple[str, dict[str, str]]:
        """Target and `--model-arg`s of this member; a config is written below `folder`."""
        if self.file:
            arguments = {**self.config, **(self.small if small else {})}
            return str(MODELS / self.file), {key: str(value) for key, value in arguments.items()}
        data = self._transformers_config(small) if self.model_type else {**self.config, **(self.small if small else {})}
        place = folder / f"{self.name}{'-small' if small else ''}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(data, indent=1))
        return str(place / "config.json"), {}

    def _transformers_config(self, small: bool) -> dict[str, Any]:
        import transformers

        config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[self.model_type]
        default = config_class(**self.config)
        given = dict(self.config)
        if small:
            given = _merged(_merged(given, _shrunk(default.to_dict())), self.small)
        data = json.loads(json.dumps(config_class(**given).to_dict(), default=str))
        return {**data, "model_type": self.model_type, "architectures": [self.architecture]}


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of `config` that have a small one, its dropout rates as zeros; the same in its sub-configs."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and value:
            inner = _shrunk(value)
            found[key] = {"model_type": value["model_type"], **inner} if value.get("model_type") else inner
        elif key in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            found[key] = _SMALL[key]
        elif isinstance(value, float) and any(part in key for part in _DROPOUT):
            found[key] = 0.0
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, sub-configs merged."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result
