"""When failed saves end a run. One that fails is told, and training goes on; what was saved before is as it was.

The run ends when `limit` saves in a row have failed, or one fails and nothing durable was written for `max_age_s`: a
storage server that hiccups must not cost the allocation (NVIDIA/nvidia-resiliency-ext#373), and one that is gone for
good must not cost a week of steps. The last save of a stage must succeed: there is none after it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from livt_scale.errors import CheckpointError, PruneFailed, SaveFailed


def warn(text: str) -> None:
    print(f"livt: warning: {text}", file=sys.stderr, flush=True)


@dataclass
class Failures:
    """The count, alike on all ranks. limit: so many failed saves in a row end the run; None: however many do not."""

    limit: int | None = 1
    max_age_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    in_a_row: int = 0
    total: int = 0
    last: str = ""
    durable_step: int | None = None  # of the newest that was saved since the start
    _durable_at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._durable_at_s = self.clock()

    def saved(self, step: int) -> None:
        self.in_a_row = 0
        self.durable_step = step
        self._durable_at_s = self.clock()

    def is_old(self) -> bool:
        """Whether the newest durable state is older than the limit: for rank 0 to say, clocks differ."""
        return self.max_age_s is not None and self.clock() - self._durable_at_s > self.max_age_s

    def failed(self, error: SaveFailed | PruneFailed, *, step: int, final: bool, old: bool) -> CheckpointError | None:
        """Note a failure; the error that ends the run, if this one does."""
        self.total += 1
        self.last = str(error)
        if isinstance(error, PruneFailed):  # it is there; a disk that fills up by it fails the next save
            self.saved(step)
            return error if self.limit == 1 else None
        self.in_a_row += 1
        if final or self.limit == 1:
            return error
        if self.limit is not None and self.in_a_row >= self.limit:
            why = f"the last {self.in_a_row} saves have failed (checkpoint.max_failed_saves)"
            return SaveFailed(f"{error.message}; {why}", remedy=error.remedy)
        if old:
            assert self.max_age_s is not None
            age_min = (self.clock() - self._durable_at_s) / 60
            why = f"nothing was saved for {age_min:.0f} min (checkpoint.max_unsaved_min: {self.max_age_s / 60:g})"
            return SaveFailed(f"{error.message}; {why}", remedy=error.remedy)
        return None

    def report(self) -> dict[str, Any]:
        """For status.json: nothing as long as nothing failed."""
        if not self.total:
            return {}
        return {"failed_saves": self.total, "failed_saves_in_a_row": self.in_a_row, "last_failed_save": self.last}
