"""The order's promises, as properties over random shards, batches, worlds and seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.data.order.instance import Order, eval_positions
from livt_scale.util.errors import DataError

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(lambda s: sum(s) >= 16)
quick = settings(max_examples=60, deadline=None)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return np.stack([order.positions(epoch, step) for step in range(order.steps_per_epoch)])  # [steps, global_batch]


@quick
@given(
    shards=SHARDS, batch=st.sampled_from([1, 2, 6, 8, 16]), window=st.sampled_from([1, 3, 50, 65536]), data=st.data()
)
def test_a_sample_comes_at_most_once_an_epoch(shards, batch, window, data):
    groups = data.draw(st.sampled_from([None] + [g for g in range(1, batch + 1) if batch % g == 0]))
    order = Order(shards, batch, seed=data.draw(st.integers(0, 9)), lane_groups=groups, window=window)
    seen = epoch_of(order, epoch=data.draw(st.integers(0, 3)))
    assert seen.shape == (sum(shards) // batch, batch)
    assert np.unique(seen).size == seen.size
    assert seen.min() >= 0
    assert seen.max() < sum(shards)


@quick
@given(shards=SHARDS, world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), epoch=st.integers(0, 5))
def test_a_step_sees_the_same_samples_at_any_world_size(shards, world, epoch):
    batch = 24
    if sum(shards) < batch:
        shards = [*shards, batch]
    order = Order(shards, batch, seed=7)
    slots = batch // world
    for step in range(order.steps_per_epoch):
        fresh = Order(shards, batch, seed=7)  # no memory of earlier steps
        ranks = [fresh.positions(epoch, step, first_slot=r * slots, num_slots=slots) for r in range(world)]
        np.testing.assert_array_equal(np.concatenate(ranks), order.positions(epoch, step))


def test_epochs_and_seeds_differ():
    one = Order([50] * 8, 20, seed=0)
    assert not np.array_equal(epoch_of(one, 0), epoch_of(one, 1))
    assert not np.array_equal(epoch_of(one, 0), epoch_of(Order([50] * 8, 20, seed=1), 0))


def test_who_is_left_out_is_drawn_anew_and_uniformly():
    shards, epochs = [3, 9, 1, 12], 3000  # 25 samples, batches of 10: 5 left out each epoch
    order = Order(shards, 10, seed=3)
    left_out = np.zeros(25)
    for epoch in range(epochs):
        left_out[np.setdiff1d(np.arange(25), epoch_of(order, epoch))] += 1
    assert left_out.sum() == 5 * epochs
    expected, deviation = epochs / 5, np.sqrt(epochs * 0.2 * 0.8)
    assert np.abs(left_out - expected).max() < 4.5 * deviation  # 25 binomials: beyond this once in 6000 seeds


def test_every_sample_may_stand_in_every_slot_of_a_small_set():
    order = Order([4, 8], 12, seed=0)
    counts = np.zeros((12, 12))
    for epoch in range(4000):
        counts[np.arange(12), order.positions(epoch, 0)] += 1
    assert np.abs(counts - 4000 / 12).max() < 5 * np.sqrt(4000 / 12)


def test_lane_groups_read_shards_of_their_own():
    shards = [30] * 64
    order = Order(shards, 32, seed=1)
    assert order.lane_groups == 4  # 64 shards leave each of 5 nodes twelve, and 4 is the largest divisor of 32 up to 5
    read = 0
    for group in range(4):
        mine = [order.positions(0, s, first_slot=group * 8, num_slots=8) for s in range(order.steps_per_epoch)]
        read += np.unique(np.concatenate(mine) // 30).size
    assert read <= 64 * 1.1


@quick
@given(shards=SHARDS, batch=st.integers(1, 2000))
def test_any_manifest_gives_an_order_or_names_the_largest_batch(shards, batch):
    total = sum(shards)
    if batch > total:
        with pytest.raises(DataError, match=rf"fewer than one global batch of {batch}.*at most {total}$"):
            Order(shards, batch, seed=0)
        batch = total
    order = Order(shards, batch, seed=0)  # a rank for each slot: often more ranks than shards
    ranks = np.concatenate([order.positions(1, 0, first_slot=r, num_slots=1) for r in range(batch)])
    np.testing.assert_array_equal(ranks, order.positions(1, 0))


def shards_read(shards: list[int], order: Order, epoch: int, nodes: int) -> list[set[int]]:
    """The shards that each node, a contiguous run of slots, touches in an epoch."""
    ends = np.cumsum(shards)
    seen = epoch_of(order, epoch)  # [steps, global_batch]
    return [set(np.searchsorted(ends, part, side="right").ravel().tolist()) for part in np.split(seen, nodes, axis=1)]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([8, 12, 24, 30, 32, 36]),
    per_group=st.integers(12, 16),
    last=st.integers(1, 30),
    size=st.integers(20, 30),
    window=st.sampled_from([64, 65536]),
    epoch=st.integers(0, 9),
    data=st.data(),
)
def test_all_nodes_together_fetch_at_most_a_tenth_more_than_the_set(batch, per_group, last, size, window, epoch, data):
    groups = data.draw(st.sampled_from([g for g in range(2, 13) if batch % g == 0]))
    shards = [size] * (groups * per_group - 1) + [min(last, size)]
    order = Order(shards, batch, seed=epoch, window=window)
    assert order.most_nodes >= groups
    for nodes in (n for n in range(1, order.most_nodes + 1) if batch % n == 0):
        read = sum(shards[k] for node in shards_read(shards, order, epoch, nodes) for k in node)
        assert read <= 1.1 * sum(shards), (nodes, order.most_nodes)


@settings(max_examples=25, deadline=None)
@given(shards=st.lists(st.integers(0, 60), min_size=40, max_size=80).filter(lambda s: sum(s) >= 32), data=st.data())
def test_nodes_share_no_shard_but_those_at_their_borders(shards, data):
    batch = data.draw(st.sampled_from([8, 12, 24, 30, 32]))
    order = Order(shards, batch, seed=data.draw(st.integers(0, 9)))
    for nodes in (n for n in range(1, order.most_nodes + 1) if batch % n == 0):
        readers = shards_read(shards, order, 0, nodes)
        assert sum(map(len, readers)) <= len(shards) + nodes - 1


def test_the_order_of_lane_groups_is_the_one_of_earlier_releases():
    order = Order([5] * 40, 16, seed=42, lane_groups=4)
    golden = [1, 124, 38, 180, 185, 88, 188, 196, 49, 71, 134, 55, 105, 60, 81, 106]
    assert order.positions(3, 5).tolist() == golden


def test_a_node_never_cuts_a_lane_group_in_two():
    for batch, shards, groups in ((1024, 96, 8), (24, 96, 24), (96, 240, 48), (512, 23, 1), (36, 84, 12)):
        order = Order([30] * shards, batch, seed=0)
        assert order.lane_groups == groups
        assert all(groups % n == 0 for n in range(1, order.most_nodes + 1) if batch % n == 0)


def test_an_epoch_smaller_than_a_batch_is_an_error_that_names_the_largest_batch():
    with pytest.raises(DataError, match=r"15 samples, fewer than one global batch of 16.*at most 15"):
        Order([7, 8], 16, seed=0)


def test_lane_groups_that_do_not_divide_are_refused_with_the_nearest():
    with pytest.raises(DataError, match=r"lane_groups is 5 .* take 4"):
        Order([100], 16, seed=0, lane_groups=5)


def test_a_step_outside_the_epoch_is_refused():
    order = Order([10], 5, seed=0)
    for step in (-1, 2):
        with pytest.raises(IndexError):
            order.positions(0, step)


@pytest.mark.parametrize("epoch", [0, 333_333])
def test_the_order_is_the_one_of_earlier_releases(epoch):
    """Golden: a run that is resumed after an upgrade must see the same samples."""
    golden = {0: [15, 3, 9, 2, 13, 6], 333333: [0, 3, 14, 13, 12, 4]}
    assert Order([4, 5, 7], 6, seed=42).positions(epoch, 1).tolist() == golden[epoch]


def test_evaluation_takes_each_sample_exactly_once():
    for n in (0, 1, 7, 64, 1000):
        for world in (1, 2, 3, 7, 64, 65):
            shares = [list(eval_positions(n, rank=r, world_size=world)) for r in range(world)]
            assert list(itertools.chain(*shares)) == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def words_drawn(monkeypatch, order: Order, epoch: int, step: int, **slots: int) -> int:
    drawn, philox = [], np.random.Philox

    class Counted:
        def __init__(self, key: int) -> None:
            self.source = philox(key=key)

        def random_raw(self, count: int):
            drawn.append(count)
            return self.source.random_raw(count)

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "Philox", Counted)
        order.positions(epoch, step, **slots)
    return sum(drawn)


def test_a_far_step_draws_as_many_random_numbers_as_the_first(monkeypatch):
    first, far = (
        words_drawn(monkeypatch, Order([1000] * 100, 50, seed=0, window=4000), epoch, step)
        for epoch, step in ((0, 0), (500, 1999))  # 2000 steps an epoch: the last is step 1,001,999 of the run
    )
    assert first == far


def test_a_billion_samples_cost_a_rank_no_more_than_shards_and_one_window(monkeypatch):
    order = Order(np.full(100_000, 10_000), 4096, seed=0)
    words = words_drawn(monkeypatch, order, 3, 100_000, first_slot=2048, num_slots=1)
    assert words < 100_000 + 2 * 65536 + 3 * 4096
    assert words_drawn(monkeypatch, order, 3, 100_001, first_slot=2048, num_slots=1) == 0
