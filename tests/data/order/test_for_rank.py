"""Ranks, micro-batches and workers together give the global batch, from any position."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.instance import Order
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import UsageError
from tests.data.tiny_sets import HOSTILE, tiny_set

EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("set") / HOSTILE, num_samples=43)


def order_of(shards: ShardSet, batch: int = 8) -> Order:
    return Order(shards.usable_per_shard, batch, seed=5)


def flat(rank_order: RankOrder, **where) -> list[tuple]:
    return [(b.epoch, b.step, b.micro_index, tuple(b.samples.tolist())) for b in rank_order.micro_batches(**where)]


@settings(max_examples=25)
@given(world=st.sampled_from([1, 2, 4, 8]), micro=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 14))
def test_ranks_and_micro_batches_together_give_the_global_batch(shards, world, micro, step):
    order = order_of(shards)
    micro = min(micro, 8 // world)
    ranks = [
        flat(RankOrder(shards, order, epochs=EPOCHS, rank=r, world_size=world, micro_batch=micro), epoch=0, step=step)
        for r in range(world)
    ]
    alone = flat(RankOrder(shards, order, epochs=EPOCHS, rank=0, world_size=1), epoch=0, step=step)
    assert len(alone) == EPOCHS * order.steps_per_epoch - step
    for epoch, at, _, samples in alone:
        together = [s for rank in ranks for e, t, _, part in rank if (e, t) == (epoch, at) for s in part]
        assert tuple(together) == samples


@settings(max_examples=25)
@given(workers=st.integers(1, 5), start=st.integers(0, 15), world=st.sampled_from([1, 2]))
def test_workers_take_turns_and_together_give_the_rank_s_micro_batches(shards, workers, start, world):
    rank_order = RankOrder(shards, order_of(shards), epochs=EPOCHS, rank=0, world_size=world, micro_batch=2)
    alone = flat(rank_order, epoch=0, step=start)
    shares = [flat(rank_order, epoch=0, step=start, worker=w, num_workers=workers) for w in range(workers)]
    assert [shares[k % workers][k // workers] for k in range(len(alone))] == alone


def test_each_sample_at_most_once_an_epoch(shards):
    rank_order = RankOrder(shards, order_of(shards), epochs=EPOCHS, rank=0, world_size=1)
    for epoch in range(EPOCHS):
        seen = [s for e, _, _, samples in flat(rank_order, epoch=0, step=0) if e == epoch for s in samples]
        assert len(seen) == len(set(seen)) == 40


def test_seeking_far_asks_the_order_for_one_step_alone(shards, monkeypatch):
    order, asked = order_of(shards), []
    positions = order.positions
    monkeypatch.setattr(order, "positions", lambda *a, **k: asked.append(a) or positions(*a, **k))
    far = RankOrder(shards, order, epochs=10**6, rank=0, world_size=1).micro_batches(epoch=0, step=1_000_000)
    next(far)
    assert asked == [(200_000, 0)]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": 0, "world_size": 3}, "cannot be divided equally among 3 ranks"),
        ({"rank": 0, "world_size": 2, "micro_batch": 3}, "does not divide the 4 slots"),
    ],
)
def test_what_does_not_divide_is_refused(shards, where, said):
    with pytest.raises(UsageError, match=said):
        RankOrder(shards, order_of(shards), epochs=1, **where)
