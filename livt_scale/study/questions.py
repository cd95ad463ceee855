"""What is asked of a claim's numbers, and the difference that each seed gives as an answer.

    Ask("bal_bce", "bce", "top1_all")                            bal_bce - bce: above 0?
    Ask("small", "large", "reconstruction_loss")                 large - small: a lower loss is the better one
    Ask("lt", "balanced", "reconstruction_loss", within=0.05)    (lt - balanced) / balanced: within ± 0.05?
    Gap(Ask("two", "one", "top1_few"), Ask("two", "one", "top1_all"))    the first difference - the second: above 0?

Only seeds that all arms of a question have count. What follows from the differences is `verdict`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from livt_scale.study.verdict import Unit, Verdict, alike, exceeds

Measure = Literal["top1_all", "top1_many", "top1_medium", "top1_few", "top1_mean_over_epochs", "reconstruction_loss"]
Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # arm -> measure -> seed -> value


@dataclass(frozen=True)
class Ask:
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
class Gap:
    """Is the difference of `wide` larger than that of `narrow`? Both in the same unit."""

    wide: Ask
    narrow: Ask

    @property
    def says(self) -> str:
        return f"{self.wide.says}, by more than {self.narrow.says}"

    @property
    def arms(self) -> set[str]:
        return self.wide.arms | self.narrow.arms

    def judge(self, values: Values) -> Verdict:
        wide, narrow = self.wide.differences(values), self.narrow.differences(values)
        return exceeds([wide[s] - narrow[s] for s in sorted(wide.keys() & narrow.keys())], says=self.says)


Question = Ask | Gap
