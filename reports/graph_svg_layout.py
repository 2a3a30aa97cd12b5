"""Places the blocks of a folded graph: one column in order of execution, patterns in frames, skips in lanes beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .chain_rows import Group, Row
from .class_parts import ATTENTION, LayerChip
from .graph_svg_blocks import Block, Line, Story

CHARACTER = 0.61  # width of a monospaced character, in font sizes
NAME_SIZE, TEXT_SIZE, CHIP_SIZE = 13, 11, 10
CARD_WIDTH = 700
MARGIN = 24
INDENT = 22  # of each frame
GAP = 18
HEAD, LINE, CHIP_LINE, COMPACT = 52, 22, 18, 30
NAME_COLUMN, BAR_COLUMN, CHIP_COLUMN = 14, 214, 318  # offsets in a card
BAR_WIDTH = 90
LANES, LANE_STEP = 26, 13  # skips drawn at most; pixels between them
ASIDE = 90  # what every stage runs stands to the right of the stream
MINI = 9  # a layer without its name
STACK = 5  # offset of the sheets behind a repeated block


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, in pixels from the top left."""

    x: float
    y: float
    w: float
    h: float

    @property
    def right(self) -> float:
        """x of the right side."""
        return self.x + self.w

    @property
    def bottom(self) -> float:
        """y of the lower side."""
        return self.y + self.h


@dataclass(frozen=True, slots=True)
class PlacedLine:
    """A line of a card, its middle at `y`."""

    line: Line
    y: float
    chips: tuple[tuple[LayerChip, Box], ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A block with its place; `chips` are those of a block of one line, `figures` the text about its size."""

    block: Block
    box: Box
    lines: tuple[PlacedLine, ...]
    chips: tuple[tuple[LayerChip, Box], ...]
    figures: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The frame around a pattern that comes `count` times."""

    box: Box
    count: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Tensors that pass over blocks: from the right side of card `source` along x to each of `targets`."""

    x: float
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything with its place; `arrows` join cards with the next one; `hidden` skips found no lane."""

    width: float
    height: float
    cards: tuple[Card, ...]
    frames: tuple[Frame, ...]
    skips: tuple[Skip, ...]
    arrows: tuple[tuple[int, int], ...]
    hidden: int


def lay_out(story: Story, top: float) -> Layout:
    """Place a story below `top` pixels."""
    cards: list[Card] = []
    frames: list[Frame] = []
    depth = _depth(story.rows)
    bottom = _place(story.rows, iter(story.blocks), MARGIN, MARGIN + depth * INDENT, top, depth, cards, frames)
    arrows = tuple((a, b) for a, b in story.edges if _next(story, a) == b)
    right = MARGIN + 2 * depth * INDENT + CARD_WIDTH
    skips, hidden = _skips([edge for edge in story.edges if edge not in set(arrows)], cards, right + 16)
    width = max([right, *(skip.x for skip in skips)]) + MARGIN
    return Layout(width, bottom - GAP + MARGIN, tuple(cards), tuple(frames), skips, arrows, hidden)


def _next(story: Story, block: int) -> int:
    """The next block of the stream, what every stage runs left out."""
    after = block + 1
    while after < len(story.blocks) and story.blocks[after].replicated:
        after += 1
    return after


def _depth(rows: Sequence[Row | Group]) -> int:
    return max((1 + _depth(row.members) for row in rows if isinstance(row, Group)), default=0)


def _place(
    rows: Sequence[Row | Group],
    blocks: Iterator[Block],
    left: float,
    card_left: float,
    y: float,
    depth: int,
    cards: list[Card],
    frames: list[Frame],
) -> float:
    """Place rows one below the other from y; returns where the next one starts."""
    for row in rows:
        if isinstance(row, Row):
            card = _card(next(blocks), card_left, y)
            cards.append(card)
            y = card.box.bottom + GAP + STACK * (card.block.count > 1)
        else:
            at = len(frames)
            end = _place(row.members, blocks, left + INDENT, card_left, y + 26, depth - 1, cards, frames)
            box = Box(left, y, CARD_WIDTH + 2 * depth * INDENT, end - y - 4)
            frames.insert(at, Frame(box, row.count))
            y = box.bottom + GAP
    return y


def _card(block: Block, x: float, y: float) -> Card:
    if block.replicated:
        return Card(block, Box(x + ASIDE, y, CARD_WIDTH - ASIDE, COMPACT), (), (), figures_text(block))
    if not block.lines:
        return _compact(block, x, y)
    at = y + HEAD
    lines = []
    for line in block.lines:
        rows = _chip_rows(line.chips, CARD_WIDTH - CHIP_COLUMN - 10)
        chips = [
            (chip, Box(x + CHIP_COLUMN + offset, at + 3 + i * CHIP_LINE, width, 15))
            for i, row in enumerate(rows)
            for chip, offset, width in row
        ]
        lines.append(PlacedLine(line, at + LINE / 2, tuple(chips)))
        at += max(LINE, 4 + len(rows) * CHIP_LINE)
    return Card(block, Box(x, y, CARD_WIDTH, at - y + 8), tuple(lines), (), figures_text(block))


def _compact(block: Block, x: float, y: float) -> Card:
    """A block of one line of text: its chips (without names if another block shows them) stand before the figures.

    Where there is no room, first some figures go, then named chips go below.
    """
    named = not block.brief
    rows = _chip_rows(block.chips, CARD_WIDTH - 2 * NAME_COLUMN - 20, named)
    beside = rows[0] if len(rows) == 1 else []
    taken = beside[-1][1] + beside[-1][2] + 12 if beside else 0.0
    room = CARD_WIDTH - 2 * NAME_COLUMN - badge_width(block) - min(text_width(block.name, NAME_SIZE), 330.0) - 14
    texts = _shorter_figures(block)
    fits = [t for t in texts if text_width(t, TEXT_SIZE) + taken <= room]
    if not rows or fits:
        text = fits[0] if fits else texts[-1]
        right = CARD_WIDTH - NAME_COLUMN - badge_width(block) - text_width(text, TEXT_SIZE)
        chips = [(c, Box(x + right - taken + o, y + 8, w, 15)) for c, o, w in beside]
        return Card(block, Box(x, y, CARD_WIDTH, COMPACT), (), tuple(chips), text)
    text = next((t for t in texts if text_width(t, TEXT_SIZE) <= room), texts[-1])
    chips = [
        (c, Box(x + NAME_COLUMN + 10 + o, y + COMPACT + i * CHIP_LINE, w, 15))
        for i, row in enumerate(rows)
        for c, o, w in row
    ]
    return Card(block, Box(x, y, CARD_WIDTH, COMPACT + 4 + len(rows) * CHIP_LINE), (), tuple(chips), text)


def _shorter_figures(block: Block) -> list[str]:
    """The figures of a block, then the same with fewer and fewer of them."""
    share = f"{block.share:.1%} of FLOPs" if block.share >= 0.0005 else ""
    every = "on every stage" if block.replicated else ""
    reads = f"reads {shorten(', '.join(block.reads), 50)}" if block.reads else ""
    f = block.figures
    choices = [(*f, reads, share, every), (*f, share, every), (*f[:2], share, every), (*f[:1], share, every), (every,)]
    return list(dict.fromkeys(" · ".join(t for t in texts if t) for texts in choices))


def figures_text(block: Block) -> str:
    """All figures of a block in one line."""
    return _shorter_figures(block)[0]


def badge_width(block: Block) -> float:
    """Width of the "x 32" in the corner, with the space around it."""
    return text_width(f"× {block.count}", NAME_SIZE) + 22 if block.count > 1 else 0.0


def _chip_rows(
    chips: Sequence[LayerChip], width: float, named: bool = True
) -> list[list[tuple[LayerChip, float, float]]]:
    """Chips in rows of `width`: (chip, offset, width) each; without names, small squares."""
    rows: list[list[tuple[LayerChip, float, float]]] = []
    at = width + 1.0
    for chip in chips:
        wide = min(text_width(chip_text(chip), CHIP_SIZE) + 12, width) if named else MINI
        if at + wide > width:
            rows.append([])
            at = 0.0
        rows[-1].append((chip, at, wide))
        at += wide + (5 if named else 2)
    return rows


def chip_text(chip: LayerChip) -> str:
    """The name on a chip, shortened; attention is named by what tp does to it."""
    return ATTENTION if chip.style == ATTENTION else shorten(chip.name, 34)


def text_width(text: str, size: float) -> float:
    """Pixels of a monospaced text."""
    return len(text) * CHARACTER * size


def shorten(text: str, most: int) -> str:
    """At most `most` characters, the middle left out; nothing at all where that says nothing.

    >>> shorten("model.layers.{0-31}.mlp", 15)
    'model.l…31}.mlp'
    """
    if len(text) <= most:
        return text
    if most < 4:
        return ""
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _skips(edges: Sequence[tuple[int, int]], cards: Sequence[Card], left: float) -> tuple[tuple[Skip, ...], int]:
    """A lane for each card that edges leave; short ones are nearest, at most `LANES` of them."""
    targets: dict[int, list[int]] = {}
    for a, b in edges:
        targets.setdefault(a, []).append(b)
    taken: list[list[tuple[float, float]]] = []
    found, hidden = [], 0
    for source, to in sorted(targets.items(), key=lambda item: (max(item[1]) - item[0], item[0])):
        span = cards[source].box.y, cards[max(to)].box.bottom
        free = (i for i, lane in enumerate(taken) if all(span[1] < a or b < span[0] for a, b in lane))
        lane = next(free, len(taken))
        if lane >= LANES:
            hidden += 1
            continue
        if lane == len(taken):
            taken.append([])
        taken[lane].append(span)
        found.append(Skip(left + lane * LANE_STEP, source, tuple(sorted(to))))
    return tuple(found), hidden
