"""Decides whether one arm of a comparison is better than another, by one fixed rule and never by hand.

Both arms are trained with the same seeds, and each seed gives one difference. With n of them, mean d and deviation s,
Student's paired t test (1908) has a two-sided p value and the 95 % interval d ± t(n - 1) · s / √n. A claim that asks
several questions has several chances to be right by luck, so Holm's correction (1979) makes each p larger: the
smallest of m is multiplied by m, the next by m - 1, and so on, and none becomes less than the one before. Then

    confirmed        if the corrected p is below 5 % and the difference is in favour
    not confirmed    if it is below 5 % and the difference is against
    not decidable    if it is not, or with fewer than 3 seeds

For a single question that is the same as an interval entirely above, or below, 0. The interval is shown uncorrected.
A claim of several questions is confirmed if all are, and not confirmed if one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

Outcome = Literal["confirmed", "not confirmed", "not decidable here"]
Unit = Literal["accuracy", "loss", "relative"]  # of a difference: a fraction of the images, a loss, a share of a loss
MIN_SEEDS = 3
CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Verdict:
    """The question, the mean difference over seeds, its interval, and the outcome.

    p: two-sided, of this question alone; p_holm: corrected for all questions of the claim; NaN with fewer than two
    seeds. in_favour: which way p points. effect: the mean over the deviation of the differences (Cohen's d for pairs).
    seeds_for_a_point: the seeds with which a true difference of one point of accuracy would be found with a
    probability of 80 %, if the deviation is what it is here; None for a loss, or if it is over a thousand.
    """

    says: str
    mean: float
    low: float
    high: float
    num_seeds: int
    word: Outcome
    unit: Unit = "accuracy"
    p: float = math.nan
    p_holm: float = math.nan
    in_favour: bool = True
    effect: float = math.nan
    seeds_for_a_point: int | None = None


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high); infinitely wide for a single seed, which does not show the spread."""
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean()) if values.size else math.nan
    if values.size < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2)) * _standard_error(values)
    return mean, mean - half, mean + half


def exceeds(differences: Sequence[float], *, says: str, unit: Unit = "accuracy") -> Verdict:
    """Is the difference above 0? Judged as the only question; `judge_all` corrects for several."""
    mean, low, high = interval(differences)
    found = Verdict(says, mean, low, high, len(differences), "not decidable here", unit, in_favour=mean > 0)
    if len(differences) < 2:
        return found
    p = min(2 * _beyond(-abs(mean), differences), 1.0)
    deviation = float(np.std(differences, ddof=1))
    effect = mean / deviation if deviation > 0 else math.nan
    return _decided(replace(found, p=p, effect=effect, seeds_for_a_point=_seeds_for_a_point(deviation, unit)), p)


def alike(differences: Sequence[float], *, says: str, within: float) -> Verdict:
    """Does the difference lie within ± `within`? (two one-sided tests, Schuirmann 1987, each at 2.5 %)"""
    mean, low, high = interval(differences)
    found = Verdict(says, mean, low, high, len(differences), "not decidable here", "relative")
    if len(differences) < 2:
        return found
    inside = 2 * max(_beyond(mean - within, differences), _beyond(-within - mean, differences))
    outside = 2 * min(_beyond(within - mean, differences), _beyond(within + mean, differences))
    p = min(inside, outside, 1.0)
    return _decided(replace(found, p=p, in_favour=inside <= outside), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p corrected for the number of questions; NaN stays NaN and counts as no question."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p, 1.0))
        corrected[place] = largest
    return corrected


def judge_all(questions: Iterable[Question], values: Values) -> list[Verdict]:
    """The verdict of each question of one claim."""
    alone = [question.judge(values) for question in questions]
    corrected = holm([v.p if v.num_seeds >= MIN_SEEDS else math.nan for v in alone])
    return [_decided(verdict, p) for verdict, p in zip(alone, corrected, strict=True)]


def _decided(verdict: Verdict, p: float) -> Verdict:
    word: Outcome = "not decidable here"
    if verdict.num_seeds >= MIN_SEEDS and p < 1 - CONFIDENCE:
        word = "confirmed" if verdict.in_favour else "not confirmed"
    return replace(verdict, p_holm=p, word=word)


def _standard_error(differences: Sequence[float] | np.ndarray) -> float:
    return float(np.std(differences, ddof=1)) / math.sqrt(len(differences))


def _beyond(distance: float, differences: Sequence[float]) -> float:
    """The probability of a t below `distance` in standard errors; without any spread, 0 or 1."""
    error = _standard_error(differences)
    if error == 0:
        return float(distance >= 0)
    return float(stdtr(len(differences) - 1, distance / error))


def _seeds_for_a_point(deviation: float, unit: Unit) -> int | None:
    """By the power of the paired t test at 5 %, two-sided (noncentral t)."""
    if unit != "accuracy":
        return None
    if deviation == 0:
        return MIN_SEEDS
    for n in range(MIN_SEEDS, MOST_SEEDS + 1):
        critical, shift = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)), 0.01 * math.sqrt(n) / deviation
        if 1 - nctdtr(n - 1, shift, critical) >= POWER:  # the other tail is negligible where power is 80 %
            return n
    return None


def combined_outcome(verdicts: Iterable[Verdict]) -> Outcome:
    words = {verdict.word for verdict in verdicts}
    if "not confirmed" in words:
        return "not confirmed"
    return "confirmed" if words == {"confirmed"} else "not decidable here"


Measure = Literal["top1_all", "top1_many", "top1_medium", "top1_few", "top1_mean_over_epochs", "reconstruction_loss"]
Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # arm -> measure -> seed -> value


@dataclass(frozen=True)
class Comparison:
    """Is `better` above `worse` (below it for a loss)? With `within`: are they alike, relative to `worse`?"""

    better: str
    worse: str
    measure: Measure
    within: float | None = None

    @property
    def says(self) -> str:
        measure = self.measure.replace("_", " ")
        if self.within is not None:
            return f"{self.better} like {self.worse} in {measure}, to {self.within:.0%}"
        return f"{self.better} {'below' if self.lower_wins else 'above'} {self.worse} in {measure}"

    @property
    def lower_wins(self) -> bool:
        return self.measure == "reconstruction_loss"

    @property
    def arms(self) -> set[str]:
        return {self.better, self.worse}

    def differences(self, values: Values) -> dict[int, float]:
        """Of each seed that both arms have."""
        better, worse = (values.get(arm, {}).get(self.measure, {}) for arm in (self.better, self.worse))
        seeds = sorted(better.keys() & worse.keys())
        if self.within is not None:
            return {s: (better[s] - worse[s]) / worse[s] for s in seeds}
        sign = -1 if self.lower_wins else 1
        return {s: sign * (better[s] - worse[s]) for s in seeds}

    def judge(self, values: Values) -> Verdict:
        differences = list(self.differences(values).values())
        if self.within is not None:
            return alike(differences, says=self.says, within=self.within)
        unit: Unit = "loss" if self.lower_wins else "accuracy"
        return exceeds(differences, says=self.says, unit=unit)


@dataclass(frozen=True)
class GapComparison:
    """Is the difference of `wide` larger than that of `narrow`? Both in the same unit."""

    wide: Comparison
    narrow: Comparison

    @property
    def says(self) -> str:
        return f"{self.wide.says}, by more than {self.narrow.says}"

    @property
    def arms(self) -> set[str]:
        return self.wide.arms | self.narrow.arms

    def judge(self, values: Values) -> Verdict:
        wide, narrow = self.wide.differences(values), self.narrow.differences(values)
        return exceeds([wide[s] - narrow[s] for s in sorted(wide.keys() & narrow.keys())], says=self.says)


Question = Comparison | GapComparison
