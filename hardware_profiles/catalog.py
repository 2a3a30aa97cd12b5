"""Profiles by name or file: find, read strictly, hash, match to the local GPU, and list as a table."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import HardwareError
from ..units import GIB
from .convert import device_model, link_model
from .device import DeviceModel, LinkModel
from .schema import ProfileContent

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = __name__.rpartition(".")[0]
LIST_REMEDY = "List the profiles with `tpplan hardware`, or name a .json file in the same format."


@dataclass(frozen=True, slots=True)
class Profile:
    """A hardware profile as read: its checked content, and the numbers that the cost functions take.

    `hash` is 12 hex digits of the SHA-256 of the canonical content (sorted keys, no spaces): equal figures and
    sources give equal hashes, however the file is laid out. `file` is None for a built-in profile.
    """

    content: ProfileContent
    device: DeviceModel
    links: LinkModel
    hash: str
    file: str | None = None

    @property
    def name(self) -> str:
        """The profile's name, as typed after --hardware."""
        return self.content.name

    @property
    def description(self) -> str:
        """One line on the system."""
        return self.content.description

    @property
    def kind(self) -> str:
        """The torch device type: cuda or cpu."""
        return self.content.kind

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node by default."""
        return int(self.content.gpus_per_node.value)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the driver offers on one device."""
        return self.device.memory_bytes

    @classmethod
    def from_content(cls, content: ProfileContent, file: str | None = None) -> Profile:
        """A profile from checked content."""
        canonical = json.dumps(content.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        return cls(content, device_model(content), link_model(content), digest, file)


def profile_names() -> list[str]:
    """Names of the built-in profiles, sorted."""
    folder = resources.files(PACKAGE)
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_profile(name_or_file: str) -> Profile:
    """The profile of a name (`h100-sxm`) or of a .json file.

    Raises
    ------
    HardwareError
        Unknown name (near matches are named), missing file, or a file with a wrong, missing or unknown key.

    Examples
    --------
    >>> load_profile("h100-sxm").gpus_per_node
    8
    """
    names = profile_names()
    if name_or_file in names:
        text = resources.files(PACKAGE).joinpath(f"{name_or_file}.json").read_text(encoding="utf-8")
        return parse_profile(text, name_or_file)
    path = Path(name_or_file)
    if path.suffix == ".json" or path.is_file() or len(path.parts) > 1:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise HardwareError(f"Cannot read the hardware profile {path}: {reason}.", LIST_REMEDY) from None
        except UnicodeDecodeError:
            raise HardwareError(f"The hardware profile {path} is not UTF-8 text.", LIST_REMEDY) from None
        return parse_profile(text, str(path), file=str(path))
    near = difflib.get_close_matches(name_or_file.lower(), names, n=3, cutoff=0.4)
    guess = f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(names)}."
    raise HardwareError(f"No hardware profile {name_or_file!r}.{guess}", LIST_REMEDY)


def parse_profile(text: str, source: str, file: str | None = None) -> Profile:
    """A profile from its JSON text; `source` names it in errors.

    Raises
    ------
    HardwareError
        Not JSON, or a wrong, missing or unknown key (the first is named).
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise HardwareError(
            f"The hardware profile {source} is not valid JSON ({error}).", "Mend it, or start from a built-in one."
        ) from None
    try:
        content = ProfileContent.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise HardwareError(
            f"Hardware profile {source}: {where}: {_reason(first)} ({error.error_count()} problem(s)).",
            "docs/hardware-profiles.md describes every key; each is needed and no other is allowed.",
        ) from None
    return Profile.from_content(content, file)


def _reason(error: Any) -> str:
    """Pydantic's message in the words of a file's author."""
    return {"missing": "this key is missing", "extra_forbidden": "unknown key"}.get(error["type"], str(error["msg"]))


def list_profiles() -> list[Profile]:
    """All built-in profiles, sorted by name."""
    return [load_profile(name) for name in profile_names()]


def match_gpu(device_name: str) -> Profile | None:
    """The built-in profile of a GPU by the name its driver reports, or None.

    Names are compared whole, apart from case and spaces: an H100 PCIe is no H100 SXM.

    >>> match_gpu("NVIDIA H100 80GB HBM3").name
    'h100-sxm'
    >>> match_gpu("NVIDIA H100 PCIe") is None
    True
    """
    wanted = " ".join(device_name.split()).lower()
    for profile in list_profiles():
        if wanted in (" ".join(name.split()).lower() for name in profile.content.device_names):
            return profile
    return None


def describe_profiles() -> pd.DataFrame:
    """The built-in profiles as a table: one row a profile, the figures that matter first.

    Columns: name, description, gpus_per_node, memory_gib, bf16_tflops (dense peak), memory_bandwidth_gb_per_s,
    links (level, domain size, GB/s one way per GPU), evidence (share of figures that were measured or fitted), hash.
    """
    import pandas as pd

    return pd.DataFrame([_row(profile) for profile in list_profiles()])


def _row(profile: Profile) -> dict[str, Any]:
    device = profile.device
    levels = [
        f"{level.name} {level.size or 'any'} x {level.default.bandwidth / 1e9:.4g} GB/s"
        for level in profile.links.levels
    ]
    return {
        "name": profile.name,
        "description": profile.description,
        "gpus_per_node": profile.gpus_per_node,
        "memory_gib": round(device.memory_bytes / GIB, 1),
        "bf16_tflops": round(device.peak_flops["bfloat16"] / 1e12, 3),
        "memory_bandwidth_gb_per_s": round(device.memory_bandwidth / 1e9, 1),
        "links": ", ".join(levels),
        "evidence": evidence_summary(profile),
        "hash": profile.hash,
    }


def evidence_summary(profile: Profile) -> str:
    """How many figures and tables rest on what: "measured 12, fitted 9, datasheet 5".

    >>> evidence_summary(load_profile("h100-sxm")).split()[0]
    'measured'
    """
    counts: dict[str, int] = {}

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "evidence" in node:
                counts[node["evidence"]] = counts.get(node["evidence"], 0) + 1
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(profile.content.model_dump(mode="json"))
    order = ("measured", "fitted", "published", "datasheet", "assumed")
    return ", ".join(f"{kind} {counts[kind]}" for kind in order if kind in counts)
