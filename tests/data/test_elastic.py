"""Three epochs in nine worlds, and in runs whose world changes at random steps: the global batches never differ.

Over random manifests: uneven shards, empty ones, one shard, more ranks than shards. A rank reads what the loader itself
asks for (`RankOrder`); the reference is the order asked for whole steps, by an object of its own.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.recipe import Pretrain
from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.for_stage import order_for
from livt_scale.data.order.instance import Order
from livt_scale.util.errors import DataError

WORLDS = (1, 2, 3, 4, 6, 8, 16, 64, 512)
BATCH, EPOCHS = 1536, 3  # 512 · 3: each of the worlds divides it
SAMPLINGS = (
    {"policy": "instance"},
    {"policy": "class_balanced"},
    {"policy": "progressive", "from": "sqrt", "to": "class_balanced"},
)


class Samples:
    """Of a set of shards what `RankOrder` asks: usable sample -> sample. Every seventh is in quarantine."""

    def usable_to_sample(self, positions):
        return positions + positions // 6


@st.composite
def manifests(draw):
    """Samples a shard: one shard or many, all alike or nearly all in a few, a batch's worth at least."""
    num, spread = draw(st.sampled_from([1, 2, 7, 40, 700])), draw(st.sampled_from([0.05, 1.0, 1000.0]))
    total = draw(st.integers(BATCH, 4 * BATCH))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.multinomial(total, rng.dirichlet(np.full(num, spread))).astype(np.int64)


@st.composite
def orders(draw):
    """() -> a new order, which remembers nothing, of one random manifest and policy."""
    shards, sampling, seed = draw(manifests()), draw(st.sampled_from(SAMPLINGS)), draw(st.integers(0, 99))
    told = {"epochs": EPOCHS, "warmup_epochs": 0, "global_batch": BATCH, "micro_batch": 1, "sampling": sampling}
    part = Pretrain.model_validate({**told, "repeats": draw(st.sampled_from([1, 1, 2, 3]))})
    window = draw(st.sampled_from([100, 65536]))
    labels = np.random.default_rng(seed).geometric(0.3, int(shards.sum())).clip(max=12) - 1
    return lambda: order_for(part, shards, lambda: labels, seed=seed, window=window)


def whole_run(order) -> np.ndarray:
    """[epochs · steps, global_batch] Sample numbers, asked for a step at a time."""
    steps = itertools.product(range(EPOCHS), range(order.steps_per_epoch))
    return Samples().usable_to_sample(np.stack([order.positions(epoch, step) for epoch, step in steps]))


def read(new_order, world: int, start: int, stop: int, *, micros: int, seed: int) -> np.ndarray:
    """[stop - start, global_batch] What `world` ranks read in these steps of the run, each from `start` on."""
    slots = BATCH // world
    micro = slots // next(m for m in range(min(micros, slots), 0, -1) if slots % m == 0)
    seen = np.empty((stop - start, BATCH), dtype=np.int64)
    order = new_order()
    for rank in np.random.default_rng(seed).permutation(world).tolist():
        if world <= 8:
            order = new_order()  # each process has its own; the many of a large world share one, which must not matter
        where = divmod(start, order.steps_per_epoch) if rank % 2 else (0, start)  # the same position, told in two ways
        ranks = RankOrder(Samples(), order, epochs=EPOCHS, rank=rank, world_size=world, micro_batch=micro)
        batches = ranks.micro_batches(epoch=where[0], step=where[1])
        for batch in itertools.islice(batches, (stop - start) * ranks.accumulation):
            step = batch.epoch * order.steps_per_epoch + batch.step - start
            first = rank * slots + batch.micro_index * micro
            seen[step, first : first + micro] = batch.samples
    return seen


@pytest.mark.parametrize("world", [*WORLDS[:-2], pytest.param(WORLDS[-2], marks=pytest.mark.slow)])
@settings(max_examples=10, deadline=None)
@given(new_order=orders(), micros=st.integers(1, 4), seed=st.integers(0, 99))
def test_three_epochs_are_the_same_in_every_world(world, new_order, micros, seed):
    three_epochs_are_the_same(world, new_order, micros, seed)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)  # each takes seconds
@given(new_order=orders(), micros=st.integers(1, 4), seed=st.integers(0, 99))
def test_three_epochs_are_the_same_in_the_largest_world(new_order, micros, seed):
    three_epochs_are_the_same(WORLDS[-1], new_order, micros, seed)


def three_epochs_are_the_same(world, new_order, micros, seed):
    expected = whole_run(new_order())
    seen = read(new_order, world, 0, len(expected), micros=micros, seed=seed)
    np.testing.assert_array_equal(seen, expected)


@settings(max_examples=10, deadline=None)
@given(new_order=orders(), data=st.data())
def test_a_run_that_changes_its_world_at_random_steps_sees_the_same_batches(new_order, data):
    expected = whole_run(new_order())
    cuts = data.draw(st.lists(st.integers(1, max(1, len(expected) - 1)), max_size=4, unique=True).map(sorted))
    parts = []
    for start, stop in itertools.pairwise([0, *[c for c in cuts if c < len(expected)], len(expected)]):
        world, micros = data.draw(st.sampled_from(WORLDS)), data.draw(st.integers(1, 4))
        parts.append(read(new_order, world, start, stop, micros=micros, seed=start))
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@settings(max_examples=20, deadline=None)
@given(shards=manifests(), seed=st.integers(0, 99))
def test_over_three_epochs_no_sample_is_lost_or_seen_twice(shards, seed):
    order = Order(shards, BATCH, seed=seed)
    epochs = np.split(whole_run(order), EPOCHS)
    everything = Samples().usable_to_sample(np.arange(shards.sum()))
    for number, seen in enumerate(epochs):
        left_out = Samples().usable_to_sample(order.left_out(number))
        np.testing.assert_array_equal(np.sort(np.concatenate([seen.ravel(), left_out])), everything)
    assert not np.array_equal(epochs[0], epochs[1])


@settings(max_examples=20, deadline=None)
@given(shards=manifests(), more=st.integers(1, 10**6), sampling=st.sampled_from(SAMPLINGS), repeats=st.integers(1, 3))
def test_a_batch_larger_than_the_set_is_an_error_that_names_both(shards, more, sampling, repeats):
    total = int(shards.sum())
    batch = (total // repeats + more) * repeats
    told = {"epochs": 1, "warmup_epochs": 0, "global_batch": batch, "micro_batch": 1, "repeats": repeats}
    part = Pretrain.model_validate({**told, "sampling": sampling})
    largest = total // repeats * repeats
    with pytest.raises(DataError, match=rf"has {total} samples, fewer than one global batch of {batch}.*{largest}$"):
        order_for(part, shards, lambda: np.zeros(total, dtype=np.int64), seed=0)
