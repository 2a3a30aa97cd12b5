"""Draws the folded graph of a traced model as one SVG file: blocks in order of execution, skips, cuts, tp styles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape, quoteattr

from ..planner.graph import ModelGraph
from ..planner.sharding import Sharding
from ..units import format_bytes, format_count
from .class_parts import LayerChip, parts_by_class
from .graph_svg_blocks import Story, story
from .graph_svg_layout import (
    BAR_COLUMN,
    BAR_WIDTH,
    CARD_WIDTH,
    CHIP_SIZE,
    COMPACT,
    GAP,
    LINE,
    MARGIN,
    MINI,
    NAME_COLUMN,
    NAME_SIZE,
    STACK,
    TEXT_SIZE,
    Box,
    Card,
    Frame,
    Layout,
    PlacedLine,
    badge_width,
    chip_text,
    lay_out,
    shorten,
    text_width,
)
from .graph_svg_style import HATCH, STYLES, css

LARGEST_BYTES = 200_000
SVG_MARK = ": folded graph</title>"  # near the beginning of every such file
_TITLE_LINE = 17


def graph_svg(graph: ModelGraph, sharding: Sharding, batch: int, max_tp: int = 64) -> str:
    """The picture as SVG text, with figures at `batch` samples.

    A class is drawn with its parts where it comes first and as one line after that. If this gives more than
    `LARGEST_BYTES`, every block is one line, and then those in the middle of a long chain are one block.

    Parameters
    ----------
    graph : ModelGraph
    sharding : Sharding
        What `planner.sharding.analyse` found for the graph: colours of the layers, degrees.
    batch : int
        Samples that FLOPs and bytes are for.
    max_tp : int
        Largest tp degree named.
    """
    parts, text = parts_by_class(graph, sharding, batch), ""
    for detailed, most in ((True, None), (False, None), (False, 200), (False, 50)):
        text = _draw(graph, sharding, batch, max_tp, story(graph, parts, batch, detailed, most))
        if len(text.encode()) <= LARGEST_BYTES:
            break
    return text


def _draw(graph: ModelGraph, sharding: Sharding, batch: int, max_tp: int, told: Story) -> str:
    facts = _facts(graph, sharding, batch, max_tp, told)
    used = {chip.style for block in told.blocks for chip in block.chips}
    keys = _legend_places([name for name in STYLES if name in used], told)
    header = MARGIN + 26 + _TITLE_LINE * len(facts)
    legend = header + 8
    layout = lay_out(told, legend + 20 * (1 + max((row for _, row, _, _ in keys), default=0)) + 16)
    body = [
        f'<rect class="page" width="{_n(layout.width)}" height="{_n(layout.height)}"/>',
        _text(MARGIN, MARGIN + 12, graph.name, "ink title"),
        *(_text(MARGIN, MARGIN + 34 + i * _TITLE_LINE, fact, "soft text") for i, fact in enumerate(facts)),
        *_legend(keys, legend),
        *(piece for frame in layout.frames for piece in _frame(frame)),
        *_skips(layout),
        *(piece for card in layout.cards for piece in _card(card)),
        *_arrows(layout),
        *_cuts(layout),
    ]
    if layout.hidden:
        said = f"{layout.hidden} more skip connections are not drawn"
        body.append(_text(MARGIN, layout.height - 8, said, "soft text"))
    size = (
        f'width="{_n(layout.width)}" height="{_n(layout.height)}" viewBox="0 0 {_n(layout.width)} {_n(layout.height)}"'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(graph.name)}{SVG_MARK}',
            f'<desc id="d">{escape(_description(graph, told, facts))}</desc>',
            f"<style>{css()}</style><defs>{HATCH}</defs>",
            *body,
            "</svg>\n",
        ]
    )


def _facts(graph: ModelGraph, sharding: Sharding, batch: int, max_tp: int, told: Story) -> list[str]:
    """Lines under the title."""
    forward, backward = graph.flops_forward.at(batch), graph.flops_backward.at(batch)
    degrees = sharding.degrees_allowed(max_tp)
    named = f"tensor parallel degrees {', '.join(map(str, degrees))}" if degrees != [1] else "no tensor parallelism"
    sequence = sharding.sequence
    sequence_text = "sequence parallel possible" if sequence.possible else "no sequence parallel"
    lines = [
        f"{format_count(graph.parameter_count)} parameters · {format_count(forward)}FLOP forward, "
        f"{format_count(backward)}FLOP backward · {format_bytes(graph.saved_bytes.at(batch))} saved for backward",
        f"batch {batch}, sequence {graph.sequence_length}, {graph.precision} · {len(graph.units)} units in "
        f"{len(graph.classes)} classes",
        f"{named} · {sequence_text}",
    ]
    if degrees == [1]:
        lines.extend(shorten(f"colours: possible splits; {reason}", 104) for reason in sharding.reasons[:1])
    mean = ", ~: mean of several sizes" if any(f.startswith("~") for b in told.blocks for f in b.figures) else ""
    lines.append(f"in a block: figures of one unit{mean}; FLOPs of forward and backward together")
    if graph.opaque:
        share = sum(s for _, _, s in graph.opaque)
        lines.append(
            f"opaque: {len(graph.opaque)} parts with {share:.1%} of the FLOPs, figures of the traced data only"
        )
    return lines


def _description(graph: ModelGraph, told: Story, facts: Iterable[str]) -> str:
    blocks = "; ".join(f"{b.count} x {b.name} ({b.module_type})" for b in told.blocks[:40])
    return f"{'. '.join(facts)}. In order of execution: {blocks}"


def _legend_places(names: list[str], told: Story) -> list[tuple[str, int, float, str]]:
    """(what, row, x, text) of the keys of the legend that this picture needs."""
    keys = [("flops", "upper bar: share of the unit's FLOPs"), ("share", "lower bar: of its parameters")]
    keys += [(f"s-{name}", STYLES[name][2]) for name in names]
    if any(block.cuts for block in told.blocks):
        keys.append(("cut", "pipeline may be cut"))
    if any(b > a + 1 and not told.blocks[a + 1].replicated for a, b in told.edges):
        keys.append(("skip", "skip or cross connection"))
    if any(block.opaque for block in told.blocks):
        keys.append(("opaque", "opaque"))
    placed: list[tuple[str, int, float, str]] = []
    row, x = 0, float(MARGIN)
    for what, text in keys:
        wide = 22 + text_width(text, CHIP_SIZE) + 14
        if x + wide > MARGIN + CARD_WIDTH:
            row, x = row + 1, float(MARGIN)
        placed.append((what, row, x, text))
        x += wide
    return placed


def _legend(keys: Iterable[tuple[str, int, float, str]], top: float) -> Iterator[str]:
    for what, row, x, text in keys:
        y = top + row * 20
        if what in ("cut", "skip"):
            yield f'<path class="{what} k0" d="M{_n(x)} {_n(y + 6)}h16"/>'
        elif what == "opaque":
            yield f'<rect x="{_n(x)}" y="{_n(y)}" width="16" height="12" fill="url(#opaque)"/>'
        else:
            thin = what in ("flops", "share")
            yield _rect(Box(x, y + 3 * thin, 16, 6 if thin else 12), what, 2)
        yield _text(x + 22, y + 10, text, "soft chip")


def _frame(frame: Frame) -> Iterator[str]:
    box = frame.box
    yield _rect(box, "frame", 10)
    yield _text(box.right - 14, box.y + 18, f"all of these × {frame.count}", "ink name", "end")


def _card(card: Card) -> Iterator[str]:
    block, box = card.block, card.box
    yield f"<g><title>{escape(block.detail)}</title>"
    if block.count > 1:
        yield _rect(Box(box.x + STACK, box.y + STACK, box.w, box.h), "card sheet", 7)
    yield _rect(box, "card", 7)
    if block.opaque and not block.lines:
        yield _hatched(box if block.all_opaque else Box(box.x, box.y, 11, box.h))
    if block.count > 1:
        width = badge_width(block) - 8
        badge = Box(box.right - width - 8, box.y + 6, width, 19)
        yield _rect(badge, "badge", 9)
        yield _text(badge.x + width / 2, badge.y + 14, f"× {block.count}", "count name", "middle")
    yield from _open_card(card) if block.lines else _one_line(card)
    yield "</g>"


def _open_card(card: Card) -> Iterator[str]:
    """Name, figures and share on top, then a line a part."""
    block, box = card.block, card.box
    name = shorten(block.name, 52)
    yield _text(box.x + NAME_COLUMN, box.y + 20, name, "ink name")
    beside = box.x + NAME_COLUMN + text_width(name, NAME_SIZE) + 10
    yield _text(beside, box.y + 20, shorten(block.module_type, 26), "soft text")
    yield _text(box.x + NAME_COLUMN, box.y + 38, shorten(card.figures, 98), "soft text")
    for line in card.lines:
        yield from _line(line, box)


def _line(placed: PlacedLine, box: Box) -> Iterator[str]:
    line, y = placed.line, placed.y
    if line.opaque:
        yield _hatched(Box(box.x + 6, y - LINE / 2 + 1, box.w - 12, LINE - 2))
    label = shorten(line.label, int((BAR_COLUMN - NAME_COLUMN - 18) / text_width("m", TEXT_SIZE)))
    yield _text(box.x + NAME_COLUMN + 10, y + 4, label, "warn text" if line.opaque else "ink text")
    x = box.x + BAR_COLUMN
    yield _rect(Box(x, y - 5, BAR_WIDTH, 11), "track", 1)
    for offset, share, name in ((-5.0, line.flops_share, "flops"), (1.0, line.parameters_share, "share")):
        if share > 0:
            yield _rect(Box(x, y + offset, max(1.0, BAR_WIDTH * min(share, 1.0)), 5), name, 1)
    yield from _chips(placed.chips)


def _one_line(card: Card) -> Iterator[str]:
    block, box = card.block, card.box
    right = box.right - NAME_COLUMN - badge_width(block)
    figures = card.figures
    y = box.y + COMPACT / 2 + 4
    end = right - text_width(figures, TEXT_SIZE)
    if box.h == COMPACT:
        end = min((b.x for _, b in card.chips), default=end)
    room = end - box.x - NAME_COLUMN - 8
    name = shorten(block.name, max(8, int(room / text_width("m", NAME_SIZE))))
    yield _text(box.x + NAME_COLUMN, y, name, "warn name" if block.opaque else "ink name")
    beside = text_width(name, NAME_SIZE) + 10
    kind = shorten(block.module_type, max(0, int((room - beside) / text_width("m", TEXT_SIZE))))
    if kind == block.module_type or len(kind) > 9:
        yield _text(box.x + NAME_COLUMN + beside, y, kind, "soft text")
    yield _text(right, y, figures, "soft text", "end")
    yield from _chips(card.chips)


def _chips(chips: Iterable[tuple[LayerChip, Box]]) -> Iterator[str]:
    for chip, box in chips:
        said = f"{chip.name}: {STYLES[chip.style][2]}"
        said += f", {format_count(chip.parameters)} parameters" if chip.parameters else ""
        said += f" ({chip.why})" if chip.why else ""
        text = _text(box.x + box.w / 2, box.y + 11, chip_text(chip), "ink chip", "middle") if box.w > MINI else ""
        yield f"<g><title>{escape(said)}</title>{_rect(box, f's-{chip.style}', 4)}{text}</g>"


def _arrows(layout: Layout) -> Iterator[str]:
    for source, target in layout.arrows:
        above, below = layout.cards[source], layout.cards[target]
        x, start, end = above.box.x + 60, above.box.bottom + STACK * (above.block.count > 1), below.box.y
        yield f'<path class="flow" d="M{_n(x)} {_n(start)}V{_n(end - 5)}"/>'
        yield f'<path class="head" d="M{_n(x - 4)} {_n(end - 6)}h8l-4 6z"/>'


def _cuts(layout: Layout) -> Iterator[str]:
    """A dashed line below a block after which a stage may end, with how many of its units may end one."""
    for card in layout.cards:
        block, box = card.block, card.box
        if not block.cuts:
            continue
        y = box.bottom + STACK * (block.count > 1) + (GAP - STACK) / 2 - 2
        if block.cut_after:
            yield f'<path class="cut" d="M{_n(box.x + 100)} {_n(y)}h60"/>'
        if block.units > 1 or not block.cut_after:
            said = "after each" if block.cuts == block.units else f"after {block.cuts} of {block.units}"
            yield _text(box.x + 168, y + 4, said, "cutname chip")


def _skips(layout: Layout) -> Iterator[str]:
    """Lanes beside the blocks, from the lower right of the source to the upper right of each target."""
    entered: Counter[int] = Counter()
    for k, skip in enumerate(sorted(layout.skips, key=lambda s: s.x)):
        source = layout.cards[skip.source]
        right, y = source.box.right + STACK * (source.block.count > 1), source.box.bottom - 8
        names = ", ".join(layout.cards[t].block.name for t in skip.targets)
        yield f'<g class="skips k{k % 4}"><title>{escape(f"{source.block.name} to {names}")}</title>'
        end = 0.0
        for i in skip.targets:
            target = layout.cards[i]
            end, tip = target.box.y + 8 + 7 * min(entered[i], 2), target.box.right + STACK * (target.block.count > 1)
            entered[i] += 1
            yield f'<path class="skip" d="M{_n(skip.x)} {_n(end)}H{_n(tip + 6)}"/>'
            yield f'<path class="tip" d="M{_n(tip + 7)} {_n(end - 4)}v8l-7 -4z"/>'
        yield f'<path class="skip" d="M{_n(right)} {_n(y)}H{_n(skip.x)}V{_n(end)}"/></g>'


def _hatched(box: Box) -> str:
    return (
        f'<rect x="{_n(box.x)}" y="{_n(box.y)}" width="{_n(box.w)}" height="{_n(box.h)}" rx="6" '
        'fill="url(#opaque)" opacity=".35"/>'
    )


def _rect(box: Box, name: str, radius: float) -> str:
    size = f'x="{_n(box.x)}" y="{_n(box.y)}" width="{_n(box.w)}" height="{_n(box.h)}"'
    return f'<rect class={quoteattr(name)} {size} rx="{_n(radius)}"/>'


def _text(x: float, y: float, text: str, name: str, anchor: str = "") -> str:
    placed = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class={quoteattr(name)} x="{_n(x)}" y="{_n(y)}"{placed}>{escape(text)}</text>'


def _n(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
