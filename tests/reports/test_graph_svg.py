"""The picture: well-formed, nothing overlaps, everything is there, and it stays small."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from tpplan.reports.class_parts import LayerChip, Part, parts_by_class
from tpplan.reports.graph_svg import LARGEST_BYTES, graph_svg
from tpplan.reports.graph_svg_blocks import block_lines, story
from tpplan.reports.graph_svg_layout import Box, lay_out
from tpplan.reports.graph_svg_style import STYLES

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("nanogpt", "levels", "routed")


def picture(models, name: str) -> ElementTree.Element:
    graph, sharding = models[name]
    return ElementTree.fromstring(graph_svg(graph, sharding, 2))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag in (f"{SVG}text", f"{SVG}title")]


def apart(a: Box, b: Box) -> bool:
    return a.right <= b.x or b.right <= a.x or a.bottom <= b.y or b.bottom <= a.y


def inside(inner: Box, outer: Box) -> bool:
    return outer.x <= inner.x and inner.right <= outer.right and outer.y <= inner.y and inner.bottom <= outer.bottom


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("detailed", [True, False])
def test_boxes_do_not_overlap(models, name: str, detailed: bool) -> None:
    graph, sharding = models[name]
    told = story(graph, parts_by_class(graph, sharding, 1), 1, detailed)
    layout = lay_out(told, 100)
    assert len(layout.cards) == len(told.blocks)
    for a, b in itertools.combinations([card.box for card in layout.cards], 2):
        assert apart(a, b)
    for card in layout.cards:
        chips = [box for line in card.lines for _, box in line.chips] + [box for _, box in card.chips]
        assert all(inside(box, card.box) for box in chips)
        assert all(apart(a, b) for a, b in itertools.combinations(chips, 2))
        assert inside(card.box, Box(0, 0, layout.width, layout.height))
        holding = [frame for frame in layout.frames if not apart(frame.box, card.box)]
        assert all(inside(card.box, frame.box) for frame in holding)
    lanes = [(skip.x, skip) for skip in layout.skips]
    assert all(x > card.box.right for x, _ in lanes for card in layout.cards)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_and_style_is_there(models, name: str) -> None:
    graph, sharding = models[name]
    root = picture(models, name)
    said = texts(root)
    for cls in graph.classes:
        assert any(f"class {cls.index}" in text for text in said)
        assert any(cls.module_type in text for text in said)
    used = {style.style for style in sharding.styles.values()}
    drawn = {element.get("class", "") for element in root.iter(f"{SVG}rect")}
    assert used
    assert {f"s-{style}" for style in used} <= drawn
    assert {STYLES[style][2] for style in used} <= set(said)


def test_repeats_skips_cuts_and_opaque_parts_are_marked(models) -> None:
    assert "× 4" in texts(picture(models, "nanogpt"))
    levels = picture(models, "levels")
    assert any(element.get("class", "").startswith("skips") for element in levels.iter(f"{SVG}g"))
    assert any(element.get("class") == "cut" for element in levels.iter(f"{SVG}path"))
    routed = ElementTree.tostring(picture(models, "routed"), encoding="unicode")
    assert routed.count("url(#opaque)") >= 3  # the legend and both parts
    assert "url(#opaque)" not in ElementTree.tostring(levels, encoding="unicode")


def test_experts_share_lines_and_lose_nothing() -> None:
    chip = (LayerChip("col", "col", 50),)
    experts = [Part(f"experts.{i}.{k}", "Linear", 50, 100, chip) for i in range(16) for k in (0, 2)]
    lines = block_lines([Part("gate", "Linear", 100, 40, chip), *experts], 40 + 3200, 100 + 1600)
    assert [line.label for line in lines] == ["gate", "experts.{0-15}.{0,2} Linear"]
    assert sum(line.flops_share for line in lines) == pytest.approx(1)
    assert sum(line.parameters_share for line in lines) == pytest.approx(1)


def test_it_can_be_read_aloud_and_in_the_dark(models) -> None:
    graph, sharding = models["nanogpt"]
    text = graph_svg(graph, sharding, 1)
    root = ElementTree.fromstring(text)
    assert [root[0].tag, root[1].tag] == [f"{SVG}title", f"{SVG}desc"]
    assert graph.name in (root[0].text or "")
    assert "transformer.h.{0-3}" in (root[1].text or "")
    assert "prefers-color-scheme:dark" in text
    assert "@font-face" not in text
    assert text == graph_svg(graph, sharding, 1)


@pytest.mark.parametrize("kinds", ["one kind", "every layer another kind"])
def test_a_thousand_layers_stay_small(models, kinds: str) -> None:
    graph, sharding = models["levels"]
    other = kinds != "one kind"
    repeat = 1000 // len(graph.units)
    classes, units = [] if other else list(graph.classes), []
    for k in range(repeat):
        for unit in graph.units:
            index, position = unit.class_index, len(units)
            if other:
                kind = graph.classes[index]
                classes.append(replace(kind, index=len(classes), module_type=f"{kind.module_type}{position}"))
                index = len(classes) - 1
            sources = tuple((s + k * len(graph.units), o) if s >= 0 else (s, o) for s, o in unit.sources)
            fqn = f"copies.{k}.{unit.fqn}"
            units.append(replace(unit, position=position, class_index=index, fqn=fqn, sources=sources))
    long = replace(graph, classes=tuple(classes), units=tuple(units))
    text = graph_svg(long, replace(sharding, styles={}), 1)
    ElementTree.fromstring(text)
    assert len(text.encode()) <= LARGEST_BYTES
    assert f"{len(units)} units" in text
