"""fp16's dynamic loss scale as a rule on numbers, for engines that do not go through torch's GradScaler.

The rule and its constants are GradScaler's, so that a run may change the strategy: begin at 65536; halve where a
gradient is not finite, and leave that step out; double after 2000 steps without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from livt_scale.parallel.updates import LOWEST_SCALE

GROWTH_INTERVAL = 2000


@dataclass
class DynamicScale:
    value: float = 65536.0
    good_steps: int = 0

    def note(self, *, finite: bool) -> bool:
        """Go on after a step; whether it is the scale's fault that its gradient was not finite."""
        at_fault = not finite and self.value > LOWEST_SCALE
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
        return at_fault

    def saved(self) -> dict[str, float]:
        return {"scale": self.value, "good_steps": self.good_steps}
