"""What the scripts that make profiles share: figures with a source, the sources' texts, the file's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30
H100 = (
    "measured for tpplan on 4x H100 80GB HBM3 SXM (700 W), torch 2.11.0+cu130, CUDA 13.0, cuDNN 9.19, NCCL 2.28.9, "
    "2026-11-22"
)
H200 = "measured for tpplan on 4x H200 141GB SXM, torch 2.11.0+cu130, CUDA 13.0, NCCL 2.28.9, 2026-11-22"
TRAINING = "torch 2.11 training runs of Llamas of 0.4B to 8B on 4x H100 SXM and of 15 other models on H200, 2026-11-22"
PUBLISHED = "ai-dynamo/aiconfigurator (Apache-2.0), measured tables of A100-SXM4-80GB"
H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet, SXM5 column (dense rates: half of those with sparsity)"
H200_SHEET = "NVIDIA H200 Tensor Core GPU datasheet, SXM column (dense rates: half of those with sparsity)"
A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM column (dense rates)"
Json = dict[str, Any]


def figure(value: float, source: str, evidence: str) -> Json:
    """One number with where it is from."""
    return {"value": value, "source": source, "evidence": evidence}


def rounded(x: float, digits: int = 5) -> float:
    """`x` to significant digits, an int where it is one (shorter files)."""
    y = float(f"{x:.{digits}g}")
    return int(y) if y == int(y) and abs(y) < 1e15 and abs(y) >= 1 else y


def write_profile(profile: Json, folder: Path) -> None:
    """One JSON file: objects indented, rows of numbers one a line."""
    (folder / f"{profile['name']}.json").write_text(to_text(profile) + "\n", encoding="utf-8")


def to_text(node: Any, indent: int = 0) -> str:
    """JSON with lists of numbers kept on one line."""
    pad = "  " * (indent + 1)
    if isinstance(node, dict) and node:
        items = [f"{pad}{json.dumps(k)}: {to_text(v, indent + 1)}" for k, v in node.items()]
        return "{\n" + ",\n".join(items) + "\n" + "  " * indent + "}"
    if isinstance(node, list) and any(isinstance(v, (dict, list)) for v in node):
        return "[\n" + ",\n".join(pad + to_text(v, indent + 1) for v in node) + "\n" + "  " * indent + "]"
    return json.dumps(node)
