"""Decides whether one arm of a comparison is better than another, by one fixed rule and never by hand.

Both arms are trained with the same seeds, and each seed gives one difference. With n of them, mean d and deviation s,
the 95 % interval is d ± t(n - 1) · s / √n (Student 1908). A claim that says "more than by `least`" is

    confirmed        if the entire interval is above `least`
    not confirmed    if the entire interval is below it
    not decidable    if it contains `least`, or with fewer than 3 seeds

A claim of several comparisons is confirmed if all are, and not confirmed if one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Outcome = Literal["confirmed", "not confirmed", "not decidable here"]
Unit = Literal["accuracy", "loss", "relative"]  # of a difference: a fraction of the images, a loss, a share of a loss
MIN_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """The question, the mean difference over seeds, its interval, and the outcome."""

    says: str
    mean: float
    low: float
    high: float
    num_seeds: int
    word: Outcome
    unit: Unit = "accuracy"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high); infinitely wide for a single seed, which does not show the spread."""
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean()) if values.size else math.nan
    if values.size < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / math.sqrt(values.size))
    return mean, mean - half, mean + half


def exceeds(differences: Sequence[float], *, says: str, least: float = 0.0, unit: Unit = "accuracy") -> Verdict:
    """Is the difference above `least`?"""
    mean, low, high = interval(differences)
    word: Outcome = "not decidable here"
    if len(differences) >= MIN_SEEDS:
        word = "confirmed" if low > least else "not confirmed" if high < least else "not decidable here"
    return Verdict(says, mean, low, high, len(differences), word, unit)


def alike(differences: Sequence[float], *, says: str, within: float) -> Verdict:
    """Does the difference lie within ± `within`? (two one-sided tests by the same interval)"""
    mean, low, high = interval(differences)
    word: Outcome = "not decidable here"
    if len(differences) >= MIN_SEEDS:
        if -within < low and high < within:
            word = "confirmed"
        elif low > within or high < -within:
            word = "not confirmed"
    return Verdict(says, mean, low, high, len(differences), word, "relative")


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
