import math
from itertools import combinations

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.study.comparison import Comparison, alike, combined_outcome, exceeds, holm, interval, judge_all

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


@given(st.lists(numbers, min_size=3, max_size=9, unique=True))
def test_alone_a_question_is_decided_as_its_interval_decides(values):
    _, low, high = interval(values)
    word = "confirmed" if low > 0 else "not confirmed" if high < 0 else "not decidable here"
    assert exceeds(values, says="").word == word


def test_the_p_value_is_that_of_students_t():
    values = [0.1, 0.4, -0.1, 0.3]
    assert exceeds(values, says="").p == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.25]), min_size=2, max_size=6))
def test_a_p_value_is_a_probability(values):
    assert 0 <= exceeds(values, says="").p <= 1
    assert 0 <= alike(values, says="", within=0.25).p <= 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_correction_is_the_closed_test_of_all_sets_of_questions(p_values):
    """Holm 1979: a question is decided if each set of questions that it is in is, by Bonferroni's rule for the set."""
    places = range(len(p_values))
    for place, corrected in enumerate(holm(p_values)):
        sets = [s for n in places for s in combinations(places, n + 1) if place in s]
        assert corrected == pytest.approx(max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets))


def test_questions_that_nobody_ran_are_no_questions():
    corrected = holm([0.01, math.nan, 0.04])
    assert math.isnan(corrected[1])
    assert corrected[::2] == pytest.approx([0.02, 0.04])


def test_a_small_difference_is_decided_alone_but_not_among_others():
    values = {"a": {"top1_all": {0: 0.61, 1: 0.62, 2: 0.64}}, "b": {"top1_all": dict.fromkeys(range(3), 0.6)}}
    values |= {rival: {"top1_all": {0: 0.63, 1: 0.6, 2: 0.62}} for rival in "cde"}
    first = Comparison("a", "b", "top1_all")
    assert first.judge(values).p == pytest.approx(0.118, abs=0.01)
    values["a"]["top1_all"] = {0: 0.61, 1: 0.612, 2: 0.61}
    assert first.judge(values).word == "confirmed"
    together = judge_all([first, *(Comparison("a", rival, "top1_all") for rival in "cdefgh")], values)
    assert together[0].p_holm == pytest.approx(4 * together[0].p)  # f, g and h have no runs


@pytest.mark.parametrize("deviation", [0.002, 0.01, 0.03])
def test_with_the_seeds_for_a_point_a_point_is_found_as_often_as_it_says(deviation):
    values = 0.05 + deviation * np.array([-1.0, 0.0, 1.0])  # of exactly this deviation
    seeds = exceeds(values.tolist(), says="").seeds_for_a_point
    assert seeds is not None
    draws = np.random.default_rng(0).normal(0.01, deviation, size=(20_000, seeds))
    found = (scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert found > 0.79
    if seeds > 3:
        fewer = (scipy.stats.ttest_1samp(draws[:, :-1], 0, axis=1).pvalue < 0.05).mean()
        assert fewer < 0.805


def test_what_would_take_over_a_thousand_seeds_has_no_number():
    assert exceeds([-1.0, 0.0, 1.0], says="").seeds_for_a_point is None
    assert alike([0.01, 0.02, 0.0], says="", within=0.1).seeds_for_a_point is None


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
