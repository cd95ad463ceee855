"""Class counts, choices, priors and shot groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.longtail import (
    balanced_counts,
    choose,
    class_counts_exponential,
    imbalance_factor,
    priors,
    shot_groups,
    shuffled,
)
from livt_scale.util.errors import DataError


@pytest.mark.parametrize(
    ("n0", "num_classes", "imbalance", "total"),
    [(5000, 10, 100, 12406), (5000, 10, 10, 20431), (500, 100, 100, 10847), (500, 100, 10, 19573)],
)
def test_the_exponential_profile_gives_the_published_sizes_of_cifar_lt(n0, num_classes, imbalance, total):
    counts = class_counts_exponential(n0, num_classes, imbalance)
    assert counts.sum() == total
    assert counts[0] == n0
    assert imbalance_factor(counts) == imbalance


@given(n0=st.integers(1, 5000), num_classes=st.integers(1, 60), imbalance=st.floats(1, 500))
def test_an_exponential_profile_falls_and_leaves_no_class_empty_or_says_so(n0, num_classes, imbalance):
    try:
        counts = class_counts_exponential(n0, num_classes, imbalance)
    except DataError:
        assert n0 / imbalance < 1
        return
    assert counts[0] == n0
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] >= 1


@given(num_classes=st.integers(1, 50), extra=st.integers(0, 1000))
def test_a_balanced_twin_has_the_same_size_and_classes_alike(num_classes, extra):
    counts = balanced_counts(num_classes + extra, num_classes)
    assert counts.sum() == num_classes + extra
    assert counts.max() - counts.min() <= 1


def test_fewer_images_than_classes_is_refused():
    with pytest.raises(DataError, match="too few"):
        balanced_counts(9, 10)


@given(labels=st.lists(st.integers(0, 4), max_size=80), seed=st.integers(0, 9), data=st.data())
def test_a_choice_has_the_counts_and_nests(labels, seed, data):
    available = np.bincount(np.array(labels, dtype=np.int64), minlength=5)
    larger = np.array([data.draw(st.integers(0, int(n))) for n in available])
    smaller = np.array([data.draw(st.integers(0, int(n))) for n in larger])
    many, few = choose(labels, larger, seed=seed), choose(labels, smaller, seed=seed)
    assert np.unique(many).size == many.size
    np.testing.assert_array_equal(np.bincount(np.array(labels, dtype=np.int64)[many], minlength=5), larger)
    assert set(few) <= set(many)


def test_a_class_with_fewer_images_than_asked_for_is_named():
    with pytest.raises(DataError, match="class 1 has 2 images, the profile asks for 3"):
        choose([0, 0, 0, 1, 1], [1, 3], seed=0)


def test_the_random_order_is_the_same_for_ever():
    assert shuffled(10, seed=0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]  # shipped shards were built with it
    assert sorted(shuffled(1000, seed=1, stream=2)) == list(range(1000))
    assert shuffled(1000, seed=1).tolist() != shuffled(1000, seed=1, stream=1).tolist()
    assert [shuffled(n, seed=0).tolist() for n in (0, 1)] == [[], [0]]


def test_priors_are_shares_and_an_empty_class_has_none():
    np.testing.assert_allclose(priors([6, 3, 1]), [0.6, 0.3, 0.1])
    with pytest.raises(DataError, match="class 1 has no image"):
        priors([6, 0, 1])
    with pytest.raises(DataError, match="no classes"):
        priors([])


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_every_class_is_in_one_shot_group(counts):
    groups = shot_groups(counts, many_over=100, few_under=20)
    assert sorted(np.concatenate(list(groups.values()))) == list(range(len(counts)))


def test_shot_groups_begin_where_the_papers_say():
    groups = shot_groups([101, 100, 20, 19])
    assert {name: classes.tolist() for name, classes in groups.items()} == {"many": [0], "medium": [1, 2], "few": [3]}
