"""Colours, fonts and fill patterns of the picture of a folded graph, for light and dark screens."""

from __future__ import annotations

from collections.abc import Mapping

# style of a layer: (light fill, dark fill, what the legend says)
STYLES: Mapping[str, tuple[str, str, str]] = {
    "col": ("#bfdbfe", "#1e4e8c", "col: outputs split"),
    "row": ("#fed7aa", "#8a4a14", "row: inputs split, sum"),
    "packed": ("#a5f3fc", "#155e6b", "packed: col in segments"),
    "vocab": ("#ddd6fe", "#553c9a", "vocab: table rows split"),
    "attention": ("#bbf7d0", "#1c6238", "attention on 1/tp of the heads"),
    "heads": ("#86efac", "#237a45", "heads: its own weights split"),
    "channel": ("#fbcfe8", "#8a2a5c", "channel: norm of split channels"),
    "parameters": ("#fef08a", "#6f5a0c", "parameters: raw weights split"),
    "region": ("#fecaca", "#8f2d2d", "region: split as one piece"),
    "whole": ("#e5e7eb", "#3b4250", "whole on each rank"),
}

# class: (property, light, dark)
_COLOURS: tuple[tuple[str, str, str, str], ...] = (
    (".page", "fill", "#ffffff", "#0d1117"),
    (".card", "fill", "#f8fafc", "#161b22"),
    (".card", "stroke", "#94a3b8", "#5b6675"),
    (".sheet", "fill", "#eef2f7", "#11161d"),
    (".frame", "fill", "#f1f5f9", "#11161d"),
    (".frame", "stroke", "#64748b", "#8b98a8"),
    (".ink", "fill", "#0f172a", "#e6edf3"),
    (".soft", "fill", "#475569", "#a3b1c2"),
    (".track", "fill", "#e2e8f0", "#2b3340"),
    (".flops", "fill", "#2563eb", "#58a6ff"),
    (".share", "fill", "#94a3b8", "#6e7b8b"),
    (".badge", "fill", "#1e293b", "#dbe4ee"),
    (".count", "fill", "#ffffff", "#0d1117"),
    (".flow", "stroke", "#475569", "#a3b1c2"),
    (".head", "fill", "#475569", "#a3b1c2"),
    (".k0", "color", "#7c3aed", "#b794f6"),
    (".k1", "color", "#0e7490", "#67d5e8"),
    (".k2", "color", "#be185d", "#f472b6"),
    (".k3", "color", "#4d7c0f", "#a3e635"),
    (".cut", "stroke", "#15803d", "#4ade80"),
    (".cutname", "fill", "#15803d", "#4ade80"),
    (".hatch", "stroke", "#b45309", "#f59e0b"),
    (".warn", "fill", "#b45309", "#f59e0b"),
)
_FIXED = (
    "text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}"
    ".title{font-size:20px;font-weight:bold}.name{font-size:13px;font-weight:bold}.text{font-size:11px}"
    ".chip{font-size:10px}.line,.flow,.skip,.cut,.hatch{fill:none}.flow{stroke-width:1.5}"
    ".skip{stroke:currentColor;stroke-width:1.5;stroke-opacity:.8}.tip{fill:currentColor}"
    ".skips:hover .skip{stroke-width:3;stroke-opacity:1}"
    ".cut{stroke-width:2;stroke-dasharray:6 4}.hatch{stroke-width:1.5}.frame{stroke-dasharray:2 3}"
)


def css() -> str:
    """The style sheet: light colours, and dark ones where the reader's system asks for them."""
    light = "".join(f"{name}{{{what}:{colour}}}" for name, what, colour, _ in _COLOURS)
    light += "".join(f".s-{name}{{fill:{colours[0]}}}" for name, colours in STYLES.items())
    dark = "".join(f"{name}{{{what}:{colour}}}" for name, what, _, colour in _COLOURS)
    dark += "".join(f".s-{name}{{fill:{colours[1]}}}" for name, colours in STYLES.items())
    return f"{_FIXED}{light}@media (prefers-color-scheme:dark){{{dark}}}"


HATCH = (
    '<pattern id="opaque" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path class="hatch" d="M0 0V8"/></pattern>'
)
