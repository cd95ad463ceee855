"""How much exchange hides: bounds that hold for any overlap, and cases that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from livt_scale.config.capabilities import STRATEGIES
from livt_scale.plan.exchange import Links, Unit, exchange
from livt_scale.plan.memory import Spread

LINKS = Links(within=1e11, between=1e10, latency_s=0.0, per_node=8)
OUTSIDE = Unit(1000, 1000, gathered_wide=True)
UNITS = [OUTSIDE, *[Unit(10**7, 10**7, 0.010, 0.020)] * 12]


def spread(strategy, gpus=16, **more):
    return Spread(strategy, gpus, "bf16", 8, **more)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_is_exposed_is_between_nothing_and_all(strategy, accumulation):
    moved = exchange(UNITS, spread(strategy, accumulation=accumulation), LINKS)
    assert 0 <= moved.exposed_s <= moved.exchange_s * 1.000001
    slow = exchange(UNITS, spread(strategy, accumulation=accumulation), replace(LINKS, between=LINKS.between / 10))
    assert slow.exposed_s >= moved.exposed_s
    assert slow.traffic == moved.traffic


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_exchanges_nothing(strategy):
    assert exchange(UNITS, spread(strategy, gpus=1), LINKS).traffic == 0


def test_ddp_hides_all_but_the_last_reduction_behind_a_slow_backward_pass():
    moved = exchange(UNITS, spread("ddp"), LINKS)
    one_s = 2 * 15 / 16 * 4e7 / 1e10  # 7.5 ms, under a block's 20
    assert moved.exposed_s == pytest.approx(one_s, rel=0.01)
    bound = exchange(UNITS, spread("ddp"), replace(LINKS, between=1e9))  # 75 ms each: the links are never idle
    assert bound.exposed_s == pytest.approx(12 * 0.075 - 11 * 0.020, rel=0.01)


def test_fsdp_waits_for_the_first_gather_alone_if_links_are_fast():
    moved = exchange(UNITS, spread("fsdp"), replace(LINKS, between=1e12, within=1e12))
    whole = 15 / 16 * 2e7 / 1e12
    assert moved.exposed_s < 5 * whole
    assert moved.traffic == pytest.approx(15 / 16 * 12 * 1e7 * (2 + 2 + 4), rel=0.01)


def test_within_a_node_the_network_has_no_part():
    here = exchange(UNITS, spread("ddp", gpus=8), LINKS)
    assert here == exchange(UNITS, spread("ddp", gpus=8), replace(LINKS, between=1.0))


def test_hybrid_sharding_takes_less_of_a_slow_network():
    links = replace(LINKS, between=2e9)
    hybrid = exchange(UNITS, spread("fsdp", gpus=64, within_node=8), links)
    flat = exchange(UNITS, spread("fsdp", gpus=64), links)
    assert hybrid.exchange_s < flat.exchange_s


def test_zero_stages_1_and_2_hide_nothing_and_2_reduces_each_micro_batch():
    one, two = (exchange(UNITS, spread(name, accumulation=4), LINKS) for name in ("zero1", "zero2"))
    assert one.exposed_s == one.exchange_s
    assert two.traffic == pytest.approx(5 / 2 * one.traffic, rel=0.01)
