"""Steps that must not be taken as they are: a loss or gradient that is not finite, a loss far above those before it.

    policy     what becomes of step 38, whose loss is nan, when the last checkpoint is of 30 steps
    stop       the run ends and names the samples; weights are those of 37 steps
    skip       step 38 has no update: weights of 37 steps, position 38
    rollback   steps 31 to 38 have no update: weights and moments of 30 steps, position 38, saved at once

The position only ever grows, so no sample is seen twice, and a run that is killed and continued makes the same choices:
all that they hang on (the losses before, what was skipped in a row, which checkpoint is the last) is in the facts of
each checkpoint. A loss is the mean over all ranks, so all ranks decide alike. An overflow of fp16's loss scale is no
anomaly, the scale is lowered and the run goes on; only MAX_OVERFLOWS in a row are.

Source: rolling back and stepping over batches as in PaLM (arXiv 2204.02311, section 5.1); median and median absolute
deviation, Hampel (1974); 1.4826 makes the latter a standard deviation where the losses are normal.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from livt_scale.config.recipe import Faults
from livt_scale.distributed.strategy import StepResult
from livt_scale.distributed.world import World
from livt_scale.util.errors import NonFiniteError

RECORD = "anomalies.jsonl"
MAX_OVERFLOWS = 24  # 2^16, where the scale begins, is down at 1 after 16
MIN_DEVIATION = 0.01  # of the median: losses that hardly differ are no measure
NORMAL = 1.4826
REMEDY = (
    "the checkpoints before it are kept; look at these images, lower base_lr, or set clip_grad, or faults.on_non_finite"
)


@dataclass(frozen=True)
class Anomaly:
    """`what` happened in a step, and what is to be done about it."""

    what: str
    policy: Literal["stop", "skip", "rollback"]


class Anomalies:
    """What a stage has met so far: decides about each step, and goes into every checkpoint's facts."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()
        self._losses: deque[float] = deque(maxlen=self._faults.spike_window)
        self._skips_in_a_row = 0
        self._rollbacks_in_a_row = 0
        self._overflows_in_a_row = 0
        self.due_step: int | None = None  # of the last checkpoint that was due, not asked for by a signal
        self.not_taken: list[tuple[int, int]] = []  # (first, last) steps, counted from 1, whose update is in no weight

    def in_loss(self, loss: float, *, step: int, say: Callable[[str], None]) -> Anomaly | None:
        """What is wrong with the mean loss of step `step`, before its update. A spike may be one to `say` alone."""
        if not math.isfinite(loss):
            return Anomaly(f"the loss is {loss}", self._faults.on_non_finite)
        policy = self._faults.on_spike
        usual = None if policy == "none" else self._usual()
        if usual is not None and loss > usual[0] + self._faults.spike_deviations * usual[1]:
            times = (loss - usual[0]) / usual[1]
            what = f"the loss is {loss:.4g}, {times:.0f} deviations above {usual[0]:.4g}, the median before it"
            if policy in ("skip", "rollback"):
                return Anomaly(what, policy)
            say(f"step {step}: {what}")
        return None

    def in_update(self, update: StepResult) -> Anomaly | None:
        """What is wrong with an update; with an overflow nothing, unless it is one of many in a row."""
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

    def checkpoint_due(self, step: int) -> None:
        """A checkpoint of `step` steps is saved by schedule: what a rollback goes to."""
        self.due_step = step
        self._rollbacks_in_a_row = 0

    def skipped(self, first: int, last: int, *, rolled_back: bool) -> int:
        """Steps `first` to `last` are not in the weights. Returns how many skips or rollbacks in a row that makes."""
        while self.not_taken and self.not_taken[-1][1] >= first - 1:  # one range, or part of what is rolled back now
            first = min(first, self.not_taken.pop()[0])
        self.not_taken.append((first, last))
        if rolled_back:
            self.due_step = last  # the weights rolled back to are saved anew, with this position
            self._rollbacks_in_a_row += 1
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
        }

    def restore(self, facts: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's `facts()`; None, of a checkpoint without: as at the beginning."""
        if facts is None:
            return
        self.restore_losses(facts)
        self.not_taken = [(first, last) for first, last in facts["not_taken"]]
        self.due_step = facts["due_step"]
        self._skips_in_a_row, self._rollbacks_in_a_row, self._overflows_in_a_row = facts["in_a_row"]

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


def step_over(
    anomaly: Anomaly,
    anomalies: Anomalies,
    *,
    step: int,
    samples: tuple[bool, list[str]],
    roll_back: Callable[[], int | None],
    folder: Path,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Do what the policy says about step `step` (from 1): a collective call. Raises NonFiniteError to end the run.

    samples: whether this rank's own loss is at fault, and its keys. `roll_back` gives the weights those of a checkpoint
    again and returns how many steps it had, or None where there is none.
    """
    named = _names(samples, world)
    told = f"step {step}: {anomaly.what}"
    if anomaly.policy == "stop":
        raise NonFiniteError(f"{told}. Samples of the batch: {', '.join(named)}", remedy=REMEDY)
    first: int | None = step
    if anomaly.policy == "rollback":
        behind = roll_back()
        first = None if behind is None else behind + 1
    if first is None:
        what = f"{told}, and there is no checkpoint yet to roll back to"
        raise NonFiniteError(f"{what}. Samples of the batch: {', '.join(named)}", remedy=REMEDY)
    in_a_row = anomalies.skipped(first, step, rolled_back=anomaly.policy == "rollback")
    if anomalies.too_many(in_a_row):
        kind = "rollback since a checkpoint" if anomaly.policy == "rollback" else "step in a row that is skipped"
        what = f"{told}; it would be the {in_a_row}th {kind}, more than faults.most_in_a_row"
        raise NonFiniteError(f"{what}. Samples of the batch: {', '.join(named)}", remedy=REMEDY)
    done = f"weights as after step {first - 1}, no update for steps {first} to {step}"
    say(f"{told}: {anomaly.policy}, {done}")
    if world.is_main:
        line = {"step": step, "what": anomaly.what, "policy": anomaly.policy, "not_taken": [first, step]}
        line |= {"in_a_row": in_a_row, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "samples": named}
        with suppress(OSError), (folder / RECORD).open("a", encoding="utf-8") as file:  # the facts have it too
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _names(samples: tuple[bool, list[str]], world: World) -> list[str]:
    """Keys of the ranks that are at fault; of all where none is alone."""
    ranks = world.peers.all_gather(samples)
    guilty = [key for at_fault, keys in ranks if at_fault for key in keys]
    return guilty or [key for _, keys in ranks for key in keys]
