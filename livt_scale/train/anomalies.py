"""Which steps must not update the weights: a loss or gradient that is not finite, or a loss far above those before it.

    policy     what happens at step 38, whose loss is nan, when the last checkpoint has 30 steps
    stop       the run ends and names the samples; the weights are those after 37 steps
    skip       step 38 does not update the weights: weights after 37 steps, position 38
    rollback   steps 31 to 38 do not: weights and moments after 30 steps, position 38, saved immediately

`Anomalies` decides; the `AnomalyPolicy` hook acts. The position only ever grows, so no sample is seen twice. All that a
decision depends on (the losses before, the skips in a row, which checkpoint is the last) is in the facts of each
checkpoint, so a run that is killed and resumed decides the same. A loss is the mean over all ranks, so all ranks decide
alike. An overflow of fp16's loss scale is no anomaly (the scale is lowered) unless there are more than MAX_OVERFLOWS in
a row.

Source: rolling back and skipping batches as in PaLM (arXiv 2204.02311, section 5.1); median and median absolute
deviation, Hampel (1974); 1.4826 makes the latter a standard deviation where the losses are normal.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from livt_scale.config.recipe import Faults
from livt_scale.distributed.strategy import StepResult

_log = logging.getLogger(__name__)
MAX_OVERFLOWS = 24  # 2^16, where the scale begins, is down at 1 after 16
MIN_DEVIATION = 0.01  # of the median: losses that hardly differ do not show what is usual
NORMAL = 1.4826


@dataclass(frozen=True)
class Anomaly:
    """`what` happened in a step, and what to do about it."""

    what: str
    policy: Literal["stop", "skip", "rollback"]


class Anomalies:
    """The history of a stage that decides about each step. It is part of every checkpoint's facts."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()
        self._losses: deque[float] = deque(maxlen=self._faults.spike_window)
        self._skips_in_a_row = 0
        self._rollbacks_in_a_row = 0
        self._taken_since_rollback = True
        self._overflows_in_a_row = 0
        self.due_step: int | None = None  # of the last checkpoint saved by schedule, not because of a signal
        self.not_taken: list[tuple[int, int]] = []  # (first, last) steps, counted from 1, whose update is in no weight

    @property
    def needs_each_loss(self) -> bool:
        """A step is judged by its loss before its update."""
        return self._faults.on_spike in ("skip", "rollback")

    def in_loss(self, loss: float, *, step: int) -> Anomaly | None:
        """What is wrong with the mean loss of step `step`, before its update. on_spike `warn` only logs a spike."""
        if not math.isfinite(loss):
            return Anomaly(f"the loss is {loss}", self._faults.on_non_finite)
        policy = self._faults.on_spike
        usual = None if policy == "none" else self._usual()
        if usual is not None and loss > usual[0] + self._faults.spike_deviations * usual[1]:
            times = (loss - usual[0]) / usual[1]
            what = f"the loss is {loss:.4g}, {times:.0f} deviations above {usual[0]:.4g}, the median before it"
            if policy in ("skip", "rollback"):
                return Anomaly(what, policy)
            _log.info("step %d: %s", step, what)
        return None

    def in_update(self, update: StepResult) -> Anomaly | None:
        """What is wrong with an update. An overflow is not an anomaly, unless it is one of many in a row."""
        if update.applied:
            self._overflows_in_a_row = 0
            return None
        self._overflows_in_a_row += update.overflow
        if update.overflow and self._overflows_in_a_row <= MAX_OVERFLOWS:
            return None
        many = f" at the {self._overflows_in_a_row}th loss scale in a row" if update.overflow else ""
        what = f"the gradient norm is {update.grad_norm} (the loss is finite){many}"
        return Anomaly(what, self._faults.on_non_finite)

    def taken(self, loss: float) -> None:
        """A step was taken with this loss."""
        self._losses.append(loss)
        self._skips_in_a_row = 0
        self._taken_since_rollback = True

    def checkpoint_due(self, step: int) -> None:
        """A checkpoint after `step` steps is saved by schedule: the target of a rollback."""
        self.due_step = step
        if self._taken_since_rollback:  # else it has the weights that were rolled back to
            self._rollbacks_in_a_row = 0

    def skipped(self, first: int, last: int, *, rolled_back: bool) -> int:
        """Steps `first` to `last` are not in the weights. Returns the number of skips or rollbacks in a row."""
        while self.not_taken and self.not_taken[-1][1] >= first - 1:  # one range, or part of what is rolled back now
            first = min(first, self.not_taken.pop()[0])
        self.not_taken.append((first, last))
        if rolled_back:
            self.due_step = last  # the weights rolled back to are saved again, with this position
            self._rollbacks_in_a_row += 1
            self._taken_since_rollback = False
            return self._rollbacks_in_a_row
        self._skips_in_a_row += 1
        return self._skips_in_a_row

    def too_many(self, in_a_row: int) -> bool:
        return in_a_row > self._faults.most_in_a_row

    def facts(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {
            "losses": list(self._losses),
            "not_taken": [list(steps) for steps in self.not_taken],
            "due_step": self.due_step,
            "in_a_row": [self._skips_in_a_row, self._rollbacks_in_a_row, self._overflows_in_a_row],
            "taken_since_rollback": self._taken_since_rollback,
        }

    def restore(self, facts: dict[str, Any] | None) -> None:
        """Resume from a checkpoint's `facts()`; None (a checkpoint without): start with no history."""
        if facts is None:
            return
        self.restore_losses(facts)
        self.not_taken = [(first, last) for first, last in facts["not_taken"]]
        self.due_step = facts["due_step"]
        self._skips_in_a_row, self._rollbacks_in_a_row, self._overflows_in_a_row = facts["in_a_row"]
        self._taken_since_rollback = facts.get("taken_since_rollback", True)  # older checkpoints do not have it

    def restore_losses(self, facts: dict[str, Any] | None) -> None:
        """The losses before a step, as they were at a checkpoint."""
        self._losses.clear()
        self._losses.extend((facts or {"losses": []})["losses"])

    def _usual(self) -> tuple[float, float] | None:
        """Median and robust deviation of the losses before; None while there are too few."""
        if len(self._losses) < self._faults.spike_window:
            return None
        median = statistics.median(self._losses)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in self._losses)
        return median, max(deviation, MIN_DEVIATION * abs(median))
