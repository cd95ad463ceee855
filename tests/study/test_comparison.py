import math

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.study.comparison import alike, combined_outcome, exceeds, interval

numbers = st.floats(-10, 10, allow_nan=False)


@given(st.lists(numbers, min_size=3, max_size=9), st.floats(0.1, 5))
def test_more_of_a_difference_never_speaks_against_it(values, more):
    order = ["not confirmed", "not decidable here", "confirmed"]
    before = exceeds(values, says="")
    after = exceeds([v + more for v in values], says="")
    assert order.index(after.word) >= order.index(before.word)


@given(st.lists(numbers, min_size=3, max_size=9))
def test_the_opposite_question_has_the_opposite_answer(values):
    opposite = {"confirmed": "not confirmed", "not confirmed": "confirmed", "not decidable here": "not decidable here"}
    assert exceeds([-v for v in values], says="").word == opposite[exceeds(values, says="").word]


def test_the_interval_is_that_of_students_t():
    values = [0.1, 0.4, 0.2]
    mean, low, high = interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)  # an independent reckoning
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert mean == pytest.approx(np.mean(values))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(2000, 3))
    held = sum(low <= 1.0 <= high for _, low, high in map(interval, draws))
    assert 0.93 < held / 2000 < 0.97


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0]])
def test_fewer_than_three_seeds_decide_nothing(values):
    assert exceeds(values, says="").word == alike(values, says="", within=9).word == "not decidable here"


def test_one_seed_tells_nothing_of_the_spread():
    assert interval([1.0])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.01, -0.01, 0.0], "confirmed"),
        ([0.2, 0.21, 0.19], "not confirmed"),
        ([-0.2, -0.21, -0.19], "not confirmed"),
        ([0.0, 0.1, -0.1], "not decidable here"),
    ],
)
def test_alike_means_the_whole_interval_within_the_bound(values, word):
    assert alike(values, says="", within=0.05).word == word


def test_a_claim_stands_with_all_its_questions_and_falls_with_one():
    yes, no = exceeds([1.0, 1.1, 0.9], says=""), exceeds([-1.0, -1.1, -0.9], says="")
    open_ = exceeds([], says="")
    assert combined_outcome([yes, yes]) == "confirmed"
    assert combined_outcome([yes, open_]) == "not decidable here"
    assert combined_outcome([yes, open_, no]) == "not confirmed"
