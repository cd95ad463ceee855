"""Intervals of accuracies: scipy's for a share; of a mean over classes they hold the truth as often as promised."""

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.evaluation.intervals import of_mean, wilson


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_of_a_share_it_is_wilsons(case):
    right, images = case
    expected = scipy.stats.binomtest(right, images).proportion_ci(method="wilson")
    assert wilson(right, images) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("images", [[40, 26, 18, 12, 8, 6, 4, 2, 2, 1, 1, 1], [100] * 10, [1000, 3]])
def test_of_a_mean_it_holds_the_true_mean_at_least_nine_times_of_ten(images):
    rng = np.random.default_rng(0)
    shares = np.linspace(0.95, 0.3, len(images))
    held = []
    for _ in range(500):
        low, high = of_mean(rng.binomial(images, shares).tolist(), images)
        assert 0 <= low <= high <= 1
        held.append(low <= shares.mean() <= high)
    assert np.mean(held) >= 0.9


def test_classes_without_images_do_not_count_and_without_any_there_is_none():
    assert of_mean([3, 0], [4, 0]) == of_mean([3], [4])
    assert of_mean([0], [0]) is None
    assert wilson(0, 0) is None
