"""A line chart as one SVG text that reads on light and on dark pages: no library, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, log2, log10

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 64, 56
# One colour and one dash pattern a line, so that they differ without colours too: (light, dark, dashes).
LINES = (("#2563eb", "#58a6ff", ""), ("#b45309", "#f59e0b", "7 4"), ("#15803d", "#4ade80", "2 4"))


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn: `series` maps a name to its points (x, y); `logarithmic` doubles x from step to step."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False

    def svg(self) -> str:
        """The picture."""
        parts = [f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>', *self._axes()]
        for i, (name, line) in enumerate(self.series.items()):
            parts += self._line(i, name, line)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" aria-label="{escape(self.title)}"><style>{style()}</style>{"".join(parts)}</svg>\n'
        )

    @property
    def _xs(self) -> list[float]:
        """All x, ascending."""
        return sorted({x for line in self.series.values() for x, _ in line})

    @property
    def _ticks(self) -> list[float]:
        """The marks of the y axis, from zero to above the highest point."""
        highest = max(y for line in self.series.values() for _, y in line)
        step = nice_step(highest)
        return [i * step for i in range(ceil(highest / step) + 1)]

    def _across(self, x: float) -> float:
        """Where x lies in the picture."""
        scale = log2 if self.logarithmic else float
        low, high = scale(self._xs[0]), scale(self._xs[-1])
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(x) - low) / (high - low or 1)

    def _down(self, y: float) -> float:
        """Where y lies in the picture."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / self._ticks[-1]

    def _axes(self) -> list[str]:
        """Title, grid, marks and what the axes say."""
        parts = [f'<text class="title" x="{LEFT}" y="24">{escape(self.title)}</text>']
        for tick in self._ticks:
            y = self._down(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for x in self._xs:
            place = f'x="{self._across(x):.1f}" y="{HEIGHT - BOTTOM + 18}"'
            parts.append(f'<text class="soft" {place} text-anchor="middle">{x:,.0f}</text>')
        across = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}"'
        upwards = f'transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
        parts.append(f'<text class="ink" {across} text-anchor="middle">{escape(self.x_label)}</text>')
        parts.append(f'<text class="ink" {upwards} text-anchor="middle">{escape(self.y_label)}</text>')
        return parts

    def _line(self, i: int, name: str, line: Sequence[tuple[float, float]]) -> list[str]:
        """Line i with its dots, and its entry in the legend."""
        places = [(self._across(x), self._down(y)) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        start = LEFT + i * 220
        return [
            f'<path class="line l{i}" d="M{path}"/>',
            *(f'<circle class="d{i}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places),
            f'<path class="line l{i}" d="M{start} 44h28"/>',
            f'<text class="ink" x="{start + 36}" y="48">{escape(name)}</text>',
        ]


def nice_step(highest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides 0..highest into at most six.

    >>> nice_step(23.0), nice_step(60.0)
    (5.0, 10.0)
    """
    base = 10.0 ** (ceil(log10(highest / 6)) - 1)
    return next(base * factor for factor in (1, 2, 5, 10) if highest <= 6 * base * factor)


def style() -> str:
    """Light colours, dark ones where the reader's screen is dark."""
    fixed = (
        "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
        ".title{font-size:14px;font-weight:bold}.line{fill:none;stroke-width:2}.grid{fill:none;stroke-width:1}"
    )
    light = ".page{fill:#fff}.title,.ink{fill:#0f172a}.soft{fill:#475569}.grid{stroke:#e2e8f0}"
    dark = ".page{fill:#0d1117}.title,.ink{fill:#e6edf3}.soft{fill:#a3b1c2}.grid{stroke:#2b3340}"
    for i, (bright, dim, dashes) in enumerate(LINES):
        fixed += f".l{i}{{stroke-dasharray:{dashes or 'none'}}}"
        light += f".l{i}{{stroke:{bright}}}.d{i}{{fill:{bright}}}"
        dark += f".l{i}{{stroke:{dim}}}.d{i}{{fill:{dim}}}"
    return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"
