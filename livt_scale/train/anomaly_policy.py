"""What happens at a step whose update is skipped: the policies of `faults.on_non_finite` and `faults.on_spike`.

    stop       NonFiniteError, with the samples of the batch
    skip       the weights stay as they are
    rollback   the weights and moments of the last checkpoint that was due are loaded, and saved at this position

Each skip and rollback is logged and appended to RUN/STAGE/anomalies.jsonl, with the keys of the samples. A resumed run
drops the lines after its checkpoint: it takes these steps again. How a step is judged: `anomalies.py`.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from livt_scale.checkpoint.manager import Tiers
from livt_scale.distributed.world import World
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.run_files import ANOMALIES, append_line, drop_lines_after
from livt_scale.util.errors import NonFiniteError

REMEDY = (
    "the checkpoints before it are kept; look at these images, lower base_lr, or set clip_grad, or faults.on_non_finite"
)
_log = logging.getLogger(__name__)


class AnomalyPolicy(Hook):
    """Raises NonFiniteError where the policy is `stop`, where there is nothing to roll back to, or after too many."""

    def __init__(self, saver: Tiers, folder: Path) -> None:
        self._saver, self._folder = saver, folder

    def at_start(self, loop: Loop) -> None:
        if loop.world.is_main:
            drop_lines_after(self._folder / ANOMALIES, loop.state.step)

    def on_anomaly(self, loop: Loop, step: Step) -> None:
        assert step.anomaly is not None
        policy, what = step.anomaly.policy, f"step {step.number}: {step.anomaly.what}"
        keys = _keys_at_fault(step, loop.world)
        samples = f"Samples of the batch: {', '.join(keys)}"
        if policy == "stop":
            raise NonFiniteError(f"{what}. {samples}", remedy=REMEDY)

        first: int | None = step.number
        if policy == "rollback":
            saved = loop.state.roll_back(self._saver)
            first = None if saved is None else saved + 1
        if first is None:
            raise NonFiniteError(f"{what}, and there is no checkpoint yet to roll back to. {samples}", remedy=REMEDY)

        anomalies = loop.state.anomalies
        # a step that was read late has one after it, which is rolled back with it
        last = max(step.number, loop.state.step) if policy == "rollback" else step.number
        in_a_row = anomalies.skipped(first, last, rolled_back=policy == "rollback")
        if anomalies.too_many(in_a_row):
            kind = "rollback since a checkpoint" if policy == "rollback" else "step in a row that is skipped"
            limit = f"it would be the {in_a_row}th {kind}, more than faults.most_in_a_row"
            raise NonFiniteError(f"{what}; {limit}. {samples}", remedy=REMEDY)

        step.save |= policy == "rollback"
        if loop.world.is_main:
            weights = f"weights as after step {first - 1}, no update for steps {first} to {last}"
            _log.warning("%s: %s, %s", what, policy, weights)
            self._append(step, not_taken=(first, last), in_a_row=in_a_row, keys=keys)

    def _append(self, step: Step, *, not_taken: tuple[int, int], in_a_row: int, keys: list[str]) -> None:
        assert step.anomaly is not None
        line: dict[str, Any] = {"step": step.number, "what": step.anomaly.what, "policy": step.anomaly.policy}
        line["not_taken"] = list(not_taken)
        line |= {"in_a_row": in_a_row, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "samples": keys}
        with suppress(OSError):  # the facts have it too
            append_line(self._folder / ANOMALIES, line)


def _keys_at_fault(step: Step, world: World) -> list[str]:
    """Keys of the ranks whose own loss is not finite; of all ranks if none is. A collective call."""
    ranks = world.peers.all_gather((not math.isfinite(step.rank_loss.item()), step.keys))
    at_fault = [key for is_at_fault, keys in ranks if is_at_fault for key in keys]
    return at_fault or [key for _, keys in ranks for key in keys]
