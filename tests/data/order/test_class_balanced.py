"""Sampling by class and repeated views keep the order's promises; what is counted is what is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.recipe import Finetune
from livt_scale.config.sampling import SquareRoot
from livt_scale.data.inspect import class_draws
from livt_scale.data.order import class_balanced as policy_module
from livt_scale.data.order.class_balanced import ClassOrder
from livt_scale.data.order.for_stage import order_for
from livt_scale.data.order.instance import Order
from livt_scale.util.errors import DataError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) >= 12)
POLICIES = [
    {"policy": "class_balanced"},
    {"policy": "sqrt"},
    {"policy": "progressive", "from": "instance", "to": "class_balanced"},
    {"policy": "progressive", "from": "sqrt", "to": "instance"},
]
ANY_POLICY = st.sampled_from([{"policy": "instance"}, *POLICIES])
quick = settings(max_examples=40, deadline=None)


def labels_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def make(counts, sampling, *, batch=12, repeats=1, epochs=5, mixup=0.0, seed=3):
    labels = labels_of(counts)
    part = Finetune.model_validate(
        {
            "epochs": epochs, "warmup_epochs": 0, "global_batch": batch, "micro_batch": 2, "sampling": sampling,
            "repeats": repeats, "mixup": mixup, "cutmix": 0.0,
        }
    )  # fmt: skip
    shards = np.bincount(np.arange(labels.size) // 7)
    return order_for(part, shards, lambda: labels, seed=seed), labels


def sampler_of(sampling):
    return Finetune.model_validate({"sampling": sampling}).sampling


def shares_of(sampling, counts, progress):
    return sampler_of(sampling).shares(counts, progress)


def epoch_of(order, epoch):
    """positions and views, [steps · global_batch]"""
    drawn = [order.draws(epoch, step) for step in range(order.steps_per_epoch)]
    return tuple(np.concatenate(part) for part in zip(*drawn, strict=True))


@quick
@given(counts=COUNTS, sampling=ANY_POLICY, repeats=st.sampled_from([1, 2, 3]), mixup=st.sampled_from([0.0, 0.8]))
def test_what_is_counted_is_what_is_drawn(counts, sampling, repeats, mixup):
    order, labels = make(counts, sampling, repeats=repeats, mixup=mixup)
    drawn = [np.bincount(labels[epoch_of(order, e)[0]], minlength=int(labels.max()) + 1) for e in range(5)]
    for epochs in (range(1), range(1, 4), range(5)):
        np.testing.assert_array_equal(class_draws(order, labels, epochs), sum(drawn[e] for e in epochs))


@quick
@given(counts=COUNTS, sampling=st.sampled_from(POLICIES), epochs=st.integers(1, 40))
def test_a_class_gets_its_share_over_any_number_of_epochs(counts, sampling, epochs):
    order, labels = make(counts, sampling, epochs=epochs)
    total = np.zeros(int(labels.max()) + 1)
    expected = np.zeros_like(total)
    for epoch in range(epochs):
        drawn = order.class_counts(range(epoch, epoch + 1))
        assert drawn.sum() == order.num_draws
        assert (drawn >= 0).all()
        total = total + drawn
        expected = expected + shares_of(sampling, order.counts, epoch / epochs) * order.num_draws
        assert np.abs(total - expected).max() < 2
        assert not total[order.counts == 0].any()
    again, _ = make(counts, sampling, epochs=epochs)
    np.testing.assert_array_equal(again.class_counts(range(epochs - 1, epochs)), drawn)  # entered at once


def test_even_shares_are_even_in_every_epoch():
    order, _ = make([70, 20, 9, 1], {"policy": "class_balanced"}, batch=20)
    assert all(order.class_counts(range(epoch, epoch + 1)).tolist() == [25] * 4 for epoch in range(5))


def test_shares_are_those_of_the_paper():
    counts = np.array([900, 90, 0, 10])
    np.testing.assert_allclose(shares_of({"policy": "instance"}, counts, 0), [0.9, 0.09, 0, 0.01])
    np.testing.assert_allclose(shares_of({"policy": "class_balanced"}, counts, 0), [1 / 3, 1 / 3, 0, 1 / 3])
    root = np.sqrt(counts)
    np.testing.assert_allclose(shares_of({"policy": "sqrt"}, counts, 0.7), root / root.sum())
    mixed = 0.75 * counts / 1000 + 0.25 * np.array([1, 1, 0, 1]) / 3
    np.testing.assert_allclose(shares_of(POLICIES[2], counts, 0.25), mixed)


def test_equal_ends_and_blends_are_the_exact_numbers_of_earlier_releases():
    """The draws follow from them to the bit: neither blend equal ends, nor divide a blend by its sum."""
    counts = np.array([907, 91, 0, 13])
    begin, end = (shares_of({"policy": name}, counts, 0) for name in ("sqrt", "class_balanced"))
    for progress in (0.1, 0.3, 0.7):
        blend = shares_of({"policy": "progressive", "from": "sqrt", "to": "class_balanced"}, counts, progress)
        assert blend.tobytes() == ((1 - progress) * begin + progress * end).tobytes()
        equal = shares_of({"policy": "progressive", "from": "sqrt", "to": "sqrt"}, counts, progress)
        assert equal.tobytes() == begin.tobytes()


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ([0.5, 0.5], "shape"),
        ([0.5, 0.25, 0.125, 0, 0], "add up to 0.875"),
        ([0.5, 0.75, -0.25, 0, 0], "at least 0"),
        ([np.nan, 1, 0, 0, 0], "finite"),
        ([0.5, 0.25, 0, 0.25, 0], "class 3, which has no image"),
    ],
)
def test_what_a_sampler_gives_is_checked(shares, problem):
    order = ClassOrder([0, 0, 0, 1, 1, 2, 4], 5, seed=0, steps=2, epochs=1, shares=lambda *_: shares)
    with pytest.raises(DataError) as caught:
        order.positions(0, 0)
    assert "the shares of epoch 0" in caught.value.message
    assert problem in caught.value.message


@settings(max_examples=15, deadline=None)
@given(counts=COUNTS, sampling=st.sampled_from(POLICIES), block=st.sampled_from([5, 17, 1 << 20]))
def test_no_image_repeats_before_its_class_is_exhausted(counts, sampling, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "BLOCK", block)
        order, labels = make(counts, sampling, epochs=4)
        walks = {c: [] for c in np.unique(labels)}
        for epoch in range(4):
            positions, views = epoch_of(order, epoch)
            assert len(set(zip(positions.tolist(), views.tolist(), strict=True))) == positions.size
            for position in positions.tolist():
                walks[labels[position]].append(position)
    for c, walk in walks.items():
        size = order.counts[c]
        rounds = [walk[k : k + size] for k in range(0, len(walk), size)]
        assert all(len(set(one)) == len(one) for one in rounds)
        assert all(set(one) == set(rounds[0]) for one in rounds[:-1])


@quick
@given(
    sampling=ANY_POLICY, repeats=st.sampled_from([1, 2, 3, 4]), mixup=st.sampled_from([0.0, 0.8]),
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12]), data=st.data(),
)  # fmt: skip
def test_a_step_is_the_same_at_any_world_size_from_any_step_on(sampling, repeats, mixup, world, data):
    order, _ = make([40, 21, 9, 3, 1, 0, 1], sampling, batch=24, repeats=repeats, mixup=mixup, epochs=9)
    epoch, step = data.draw(st.integers(0, 8)), data.draw(st.integers(0, order.steps_per_epoch - 1))
    for _ in range(data.draw(st.integers(0, 2))):  # what was asked before changes nothing
        order.draws(data.draw(st.integers(0, 8)), data.draw(st.integers(0, order.steps_per_epoch - 1)))
    whole = order.draws(epoch, step)
    ranks = []
    for rank in range(world):  # each a process of its own, started at this step
        fresh, _ = make([40, 21, 9, 3, 1, 0, 1], sampling, batch=24, repeats=repeats, mixup=mixup, epochs=9)
        slots = 24 // world
        ranks.append(fresh.draws(epoch, step, first_slot=rank * slots, num_slots=slots))
    for part in (0, 1):
        np.testing.assert_array_equal(np.concatenate([r[part] for r in ranks]), whole[part])


def test_a_batch_of_a_balanced_order_is_as_mixed_as_independent_draws():
    order, labels = make([400, 200, 50, 10, 4], {"policy": "class_balanced"}, batch=60, epochs=200)
    chi = []
    for epoch in range(60):
        for step in range(order.steps_per_epoch):
            seen = np.bincount(labels[order.positions(epoch, step)], minlength=5)
            chi.append(((seen - 12.0) ** 2 / 12).sum())
    assert 3.7 < np.mean(chi) < 4.2  # 4 degrees of freedom, a little below: an epoch's sums are fixed


def test_repeated_views_are_neighbours_and_differ():
    order, _ = make([60, 30], {"policy": "instance"}, batch=12, repeats=3)
    for step in range(order.steps_per_epoch):
        positions, views = order.draws(2, step)
        assert (positions.reshape(4, 3) == positions[::3, None]).all()
        np.testing.assert_array_equal(views.reshape(4, 3), [[0, 1, 2]] * 4)


@pytest.mark.parametrize("sampling", [{"policy": "instance"}, {"policy": "class_balanced"}], ids=str)
@pytest.mark.parametrize("repeats", [2, 3])
def test_mixup_never_mixes_two_views_of_one_image(sampling, repeats):
    order, _ = make([60, 30, 25], sampling, batch=12, repeats=repeats, mixup=0.8)
    for epoch in range(4):
        for step in range(order.steps_per_epoch):
            positions, views = order.draws(epoch, step)
            groups = positions.reshape(-1, repeats, 2)  # the views of two images: a b a b …
            assert (groups == groups[:, :1]).all()
            assert (groups[:, 0, 0] != groups[:, 0, 1]).all()
            assert len(set(zip(positions.tolist(), views.tolist(), strict=True))) == 12


def test_repeats_keep_the_steps_and_visit_every_sample_once_in_so_many_epochs():
    order, labels = make([60, 60], {"policy": "instance"}, batch=12, repeats=3)
    assert order.steps_per_epoch == make([60, 60], {"policy": "instance"}, batch=12)[0].steps_per_epoch == 10
    for turn in (0, 1):
        seen = Counter(p for e in range(3) for p in epoch_of(order, 3 * turn + e)[0].tolist())
        assert set(seen.values()) == {3}
        assert len(seen) == labels.size


def test_an_instance_policy_is_the_order_of_old():
    order, _ = make([60, 30], {"policy": "progressive", "from": "instance", "to": "instance"})
    assert isinstance(order, Order)
    plain = Order(np.bincount(np.arange(90) // 7), 12, seed=3)
    np.testing.assert_array_equal(epoch_of(order, 4)[0], epoch_of(plain, 4)[0])
    assert not epoch_of(order, 4)[1].any()


@pytest.mark.parametrize(("repeats", "mixup", "largest"), [(1, 0.0, 23), (4, 0.0, 20), (3, 0.8, 18)])
@pytest.mark.parametrize("sampling", [{"policy": "instance"}, {"policy": "sqrt"}], ids=str)
def test_a_batch_larger_than_the_set_is_an_error_that_names_the_largest(repeats, mixup, largest, sampling):
    with pytest.raises(DataError, match=rf"23 samples, fewer than one global batch of 24.*at most {largest}$"):
        make([20, 3], sampling, batch=24, repeats=repeats, mixup=mixup)
    make([20, 3], sampling, batch=largest - largest % 2, repeats=1)


def test_random_places_are_permutations_and_uniform():
    for size in range(1, 60):
        keys = policy_module._keys(1, np.full(size, 5), np.full(size, size))
        places = policy_module._shuffled_places(np.arange(size), np.full(size, size), keys)
        assert sorted(places) == list(range(size))
    num = 24 * 400
    keys = policy_module._keys(7, np.repeat(np.arange(num), 4), np.zeros(num * 4, dtype=np.int64))
    places = policy_module._shuffled_places(np.tile(np.arange(4), num), np.full(num * 4, 4), keys)
    seen = Counter(map(tuple, places.reshape(num, 4).tolist()))
    assert len(seen) == 24
    assert sum((n - 400) ** 2 / 400 for n in seen.values()) < 52  # chi-square, 23 degrees: 5e-4 beyond


def test_the_class_order_is_the_one_of_earlier_releases():
    """Golden: a run that is resumed after an upgrade must see the same samples."""
    order = ClassOrder([0, 0, 0, 0, 1, 1, 2], 6, seed=42, steps=1, epochs=10, shares=sampler_of(POLICIES[2]).shares)
    told = [[part.tolist() for part in order.draws(epoch, 0)] for epoch in (0, 7)]
    first, later = [[6, 4, 1, 5, 2, 3], [0, 0, 0, 0, 0, 0]], [[2, 5, 6, 6, 3, 4], [0, 0, 0, 1, 0, 1]]
    assert told == [first, later]


def test_a_billion_draws_shuffle_block_by_block(monkeypatch):
    monkeypatch.setattr(policy_module, "BLOCK", 1000)
    labels = labels_of([400, 200, 40])
    order = ClassOrder(labels, 10, seed=0, steps=10_000, epochs=3, shares=SquareRoot().shares)  # 100 blocks
    positions, _ = order.draws(2, 5000)
    longest = max(block.classes.size for block in order._block_memo.values())
    assert longest == 1000
    assert len(order._block_memo) == 1
    again = ClassOrder(labels, 10, seed=0, steps=10_000, epochs=3, shares=SquareRoot().shares)
    for step in (4999, 9_999, 0):
        again.draws(1, step)
    np.testing.assert_array_equal(again.positions(2, 5000), positions)
