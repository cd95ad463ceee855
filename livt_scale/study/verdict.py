"""Is one arm of a comparison better than another? Decided by a rule that stands here, and nowhere by hand.

Both arms are trained with the same seeds, and each seed gives one difference. With n of them, mean d and deviation s,
the 95 % interval is d ± t(n - 1) · s / √n (Student 1908). A claim that says "more than by `least`" is

    confirmed        where the whole interval lies above `least`
    not confirmed    where the whole interval lies below it
    not decidable    where it holds `least`, or with fewer than 3 seeds

A claim of several comparisons is confirmed where all are, and not confirmed where one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Word = Literal["confirmed", "not confirmed", "not decidable here"]
Unit = Literal["accuracy", "loss", "relative"]  # of a difference: a fraction of the images, a loss, a share of a loss
LEAST_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """What was asked, the mean difference over seeds, its interval, and the word."""

    says: str
    mean: float
    low: float
    high: float
    num_seeds: int
    word: Word
    unit: Unit = "accuracy"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high); infinitely wide where one seed tells nothing of the spread."""
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean()) if values.size else math.nan
    if values.size < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return mean, mean - half, mean + half


def exceeds(differences: Sequence[float], *, says: str, least: float = 0.0, unit: Unit = "accuracy") -> Verdict:
    """Is the difference above `least`?"""
    mean, low, high = interval(differences)
    word: Word = "not decidable here"
    if len(differences) >= LEAST_SEEDS:
        word = "confirmed" if low > least else "not confirmed" if high < least else "not decidable here"
    return Verdict(says, mean, low, high, len(differences), word, unit)


def alike(differences: Sequence[float], *, says: str, within: float) -> Verdict:
    """Does the difference lie within ± `within`? (two one-sided tests by the same interval)"""
    mean, low, high = interval(differences)
    word: Word = "not decidable here"
    if len(differences) >= LEAST_SEEDS:
        if -within < low and high < within:
            word = "confirmed"
        elif low > within or high < -within:
            word = "not confirmed"
    return Verdict(says, mean, low, high, len(differences), word, "relative")


def together(verdicts: Iterable[Verdict]) -> Word:
    words = {verdict.word for verdict in verdicts}
    if "not confirmed" in words:
        return "not confirmed"
    return "confirmed" if words == {"confirmed"} else "not decidable here"
