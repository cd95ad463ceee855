"""Questions: the difference that a seed gives, whatever the measure, and what is asked of two differences."""

from hypothesis import given
from hypothesis import strategies as st

from livt_scale.study.comparison import Comparison, GapComparison

LOSSES = {
    "a": {"reconstruction_loss": {0: 0.4, 1: 0.41, 2: 0.4}},
    "b": {"reconstruction_loss": {0: 0.5, 1: 0.5, 2: 0.5}},
}
shares = st.floats(0, 1)


def test_a_lower_loss_is_the_better_one():
    assert Comparison("a", "b", "reconstruction_loss").judge(LOSSES).word == "confirmed"
    assert Comparison("b", "a", "reconstruction_loss").judge(LOSSES).word == "not confirmed"
    assert Comparison("a", "b", "reconstruction_loss", within=0.05).judge(LOSSES).word == "not confirmed"
    assert Comparison("a", "b", "reconstruction_loss", within=0.5).judge(LOSSES).word == "confirmed"


def test_each_answer_says_its_unit():
    assert Comparison("a", "b", "reconstruction_loss").judge(LOSSES).unit == "loss"
    assert Comparison("a", "b", "reconstruction_loss", within=0.5).judge(LOSSES).unit == "relative"
    assert Comparison("a", "b", "top1_all").judge({}).unit == "accuracy"


def test_only_seeds_that_all_arms_have_count():
    values = {"a": {"top1_all": {0: 0.5, 1: 0.6}, "top1_few": {0: 0.4}}, "b": {"top1_all": {1: 0.2, 2: 0.1}}}
    assert Comparison("a", "b", "top1_all").differences(values) == {1: 0.6 - 0.2}
    assert Comparison("a", "nobody", "top1_all").judge(values).num_seeds == 0
    assert (
        GapComparison(Comparison("a", "b", "top1_few"), Comparison("a", "b", "top1_all")).judge(values).num_seeds == 0
    )


@given(st.lists(st.tuples(shares, shares, shares, shares), min_size=3, max_size=6))
def test_a_gap_is_the_one_difference_less_the_other_and_turns_round_with_them(seeds):
    arms = ("vit-balanced", "vit-lt", "cnn-balanced", "cnn-lt")
    values = {arm: {"top1_all": {k: of[n] for k, of in enumerate(seeds)}} for n, arm in enumerate(arms)}
    vit, cnn = Comparison(*arms[:2], "top1_all"), Comparison(*arms[2:], "top1_all")
    here, there = GapComparison(vit, cnn).judge(values), GapComparison(cnn, vit).judge(values)
    assert here.mean == -there.mean
    assert (here.word == "confirmed") == (there.word == "not confirmed")
    expected = [(a - b) - (c - d) for a, b, c, d in seeds]
    assert abs(here.mean - sum(expected) / len(expected)) < 1e-12


def test_the_gain_on_few_may_be_asked_to_be_larger_than_over_all():
    values = {
        "two": {"top1_all": {0: 0.80, 1: 0.81, 2: 0.80}, "top1_few": {0: 0.70, 1: 0.72, 2: 0.71}},
        "one": {"top1_all": {0: 0.70, 1: 0.70, 2: 0.70}, "top1_few": {0: 0.30, 1: 0.31, 2: 0.30}},
    }
    over_all, few = Comparison("two", "one", "top1_all"), Comparison("two", "one", "top1_few")
    assert GapComparison(few, over_all).judge(values).word == "confirmed"
    assert GapComparison(over_all, few).judge(values).word == "not confirmed"
