"""Collectives: hand-worked groups, measured rows given back, and properties that any network obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpplan.costmodels.collectives import COLLECTIVES, collective_s, ranks_inside
from tpplan.hardware_profiles import list_profiles, load_profile
from tpplan.hardware_profiles.convert import wire_bytes
from tpplan.hardware_profiles.device import CollectiveModel, LinkLevel, LinkModel


def network(
    node: float = 100.0, wide: float = 10.0, size: int = 4, launch: float = 0.0, step: float = 0.0
) -> LinkModel:
    """Two levels without tables."""
    return LinkModel(
        (
            LinkLevel("node", size, CollectiveModel(launch, step, node)),
            LinkLevel("wide", None, CollectiveModel(0.0, 10 * step, wide)),
        )
    )


@pytest.mark.parametrize(
    ("op", "size", "stride", "seconds"),
    [
        ("all_gather", 4, 1, 3.0),  # 3/4 x 400 B over 100 B/s
        ("reduce_scatter", 4, 1, 3.0),
        ("all_reduce", 4, 1, 6.0),  # a reduce_scatter and an all_gather
        ("all_to_all", 4, 1, 3.0),  # three quarters leave each rank
        ("all_gather", 2, 2, 2.0),  # two ranks of one node
        ("all_gather", 2, 4, 20.0),  # one rank a node: 200 B over one card
        ("all_gather", 8, 1, 8.75),  # 350 B striped over 4 cards
        ("all_gather", 4, 2, 15.0),  # 2 + 2 ranks: 300 B over 2 cards
        ("all_reduce", 8, 1, 17.5),
        ("all_to_all", 8, 1, 20.0),  # half of 400 B leaves the node, each rank by its own card
        ("send_recv", 2, 1, 4.0),
        ("send_recv", 4, 1, 4.0),
        ("send_recv", 2, 4, 40.0),
        ("send_recv", 4, 2, 40.0),  # the axis crosses nodes: its slowest hop counts
        ("all_gather", 1, 1, 0.0),
        ("send_recv", 1, 4, 0.0),
    ],
)
def test_by_hand_without_latency(op, size, stride, seconds):
    assert collective_s(op, 400, size, stride, network()) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("op", "size", "seconds"),
    [
        ("all_gather", 4, 1 + 3),  # launch, three ring steps
        ("all_reduce", 4, 1 + 4),  # up and down a binary tree of depth two
        ("send_recv", 4, 1 + 1),
        ("all_gather", 8, 1 + 3 + 10),  # the ring of a node, then one step of 10 s between two nodes
        ("all_reduce", 16, 1 + 4 + 40),
    ],
)
def test_latency_by_hand(op, size, seconds):
    assert collective_s(op, 1e-9, size, 1, network(launch=1, step=1)) == pytest.approx(seconds)


def test_ranks_inside_each_domain():
    links = network(size=8)
    assert ranks_inside(16, 1, links) == (8, 16)
    assert ranks_inside(16, 4, links) == (2, 16)
    assert ranks_inside(4, 8, links) == (1, 4)
    assert ranks_inside(4, 16, links) == (1, 4)


def test_a_group_that_straddles_nodes_is_not_inside_one():
    """Of the groups of 3 in nodes of 8 one has ranks 6, 7 and 8, and all wait for it; alone, 3 are in one node."""
    links = load_profile("h100-sxm").links
    assert ranks_inside(3, 1, links) == (1, 3)
    assert ranks_inside(6, 1, links) == (2, 6)
    assert ranks_inside(3, 1, links.within(6)) == (3, 3)
    assert collective_s("all_reduce", 2**26, 3, 1, links) > 3 * collective_s("all_reduce", 2**26, 3, 1, links.within(6))


def test_three_levels_stripe_over_the_ranks_of_the_domain_below():
    links = LinkModel(
        (
            LinkLevel("node", 2, CollectiveModel(0, 0, 100.0)),
            LinkLevel("rack", 4, CollectiveModel(0, 0, 50.0)),
            LinkLevel("hall", None, CollectiveModel(0, 0, 1.0)),
        )
    )
    assert collective_s("all_gather", 400, 4, 1, links) == pytest.approx(3.0)  # 300/100, 300/2/50
    assert collective_s("all_gather", 400, 8, 1, links) == pytest.approx(350 / 4)


@pytest.mark.parametrize("name", ["h100-sxm", "h200-sxm", "a100-sxm-80g", "cpu-gloo"])
def test_measured_rows_are_given_back(name):
    profile = load_profile(name)
    level = profile.content.links[0]
    rows = 0
    for op, section in level.collectives.items():
        for size, n_bytes, seconds in section.rows:
            rows += 1
            assert collective_s(op, n_bytes, size, 1, profile.links) == pytest.approx(seconds, rel=1e-9), (op, size)
    assert rows > 40


def test_small_messages_cost_the_latency_of_the_device():
    links = load_profile("h100-sxm").links
    for op in COLLECTIVES:
        assert 4e-6 < collective_s(op, 1, 2, 1, links) < 20e-6, op


def test_between_measured_sizes_lies_between_and_beyond_costs_more():
    links = load_profile("h100-sxm").links
    two, three, four, eight = (collective_s("all_gather", 2**26, n, 1, links.within(n)) for n in (2, 3, 4, 8))
    assert two < three < four < eight < 1.3 * four


def test_h100_bus_bandwidth_is_that_of_nvlink_and_falls_across_nodes():
    links = load_profile("h100-sxm").links

    def busbw(size: int, stride: int = 1) -> float:
        n = 2**30
        return wire_bytes("all_gather", n, size) / collective_s("all_gather", n, size, stride, links)

    assert 300e9 < busbw(4) < 330e9
    assert busbw(16) > 250e9  # eight cards a node keep up with the ring
    assert busbw(2, 8) == pytest.approx(45e9, rel=0.01)
    assert busbw(4, 4) == pytest.approx(2 * 45e9, rel=0.01)


def test_a100_fit_is_close_to_its_published_source():
    """Bus bandwidth of a 512 MiB all_reduce on 8 A100: 222 GB/s in the table that was fitted, 4 KiB 21 us."""
    links = load_profile("a100-sxm-80g").links
    seconds = collective_s("all_reduce", 2**29, 8, 1, links)
    assert wire_bytes("all_reduce", 2**29, 8) / seconds == pytest.approx(222e9, rel=0.15)
    assert collective_s("all_reduce", 4096, 8, 1, links) == pytest.approx(21e-6, rel=0.3)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        collective_s("broadcast", 1, 2, 1, network())
    with pytest.raises(ValueError, match="size 0"):
        collective_s("all_reduce", 1, 0, 1, network())


ops = st.sampled_from(COLLECTIVES)
sizes = st.integers(1, 64)
strides = st.sampled_from([1, 2, 3, 4, 8, 16, 32])
messages = st.floats(1.0, 1e11)


@given(ops, sizes, strides, messages, st.floats(1.0, 100.0), st.sampled_from(list_profiles()))
def test_more_bytes_never_take_less_time(op, size, stride, n_bytes, factor, profile):
    small = collective_s(op, n_bytes, size, stride, profile.links)
    large = collective_s(op, n_bytes * factor, size, stride, profile.links)
    assert large >= small * (1 - 1e-12)
    assert (small > 0) == (size > 1)


@given(ops, sizes, strides, messages, st.floats(1.0, 100.0), st.sampled_from(["node", "wide"]))
def test_more_bandwidth_is_never_slower(op, size, stride, n_bytes, factor, where):
    links = network(1e9, 1e8, 8, 1e-6, 1e-6)
    levels = tuple(
        replace(level, default=replace(level.default, bandwidth=level.default.bandwidth * factor))
        if level.name == where
        else level
        for level in links.levels
    )
    faster = collective_s(op, n_bytes, size, stride, LinkModel(levels))
    assert faster <= collective_s(op, n_bytes, size, stride, links) * (1 + 1e-12)


@given(ops, sizes, messages, st.sampled_from([("h100-sxm", 8), ("a100-sxm-80g", 8)]))
def test_a_faster_network_card_never_makes_a_profile_slower(op, size, n_bytes, where):
    links = load_profile(where[0]).links
    node, wide = links.levels
    faster = LinkModel((node, replace(wide, default=replace(wide.default, bandwidth=4 * wide.default.bandwidth))))
    assert collective_s(op, n_bytes, size, 1, faster) <= collective_s(op, n_bytes, size, 1, links)


@given(sizes.filter(lambda n: n > 1), messages)
def test_all_reduce_costs_at_least_its_halves_bandwidth(size, n_bytes):
    links = network(1e9, 1e8, 8)
    halves = collective_s("all_gather", n_bytes, size, 1, links) + collective_s(
        "reduce_scatter", n_bytes, size, 1, links
    )
    assert collective_s("all_reduce", n_bytes, size, 1, links) == pytest.approx(halves)
