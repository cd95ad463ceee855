"""What a run writes while it trains: metrics.jsonl, trackers, a progress bar on a terminal or a line in a log.

A line of metrics.jsonl covers `log.every_steps` steps: their mean loss, their images per second. A resumed run drops
the lines after its checkpoint and restores the sums that were saved with it, so the file of a killed run holds the same
losses as that of an uninterrupted one. Each field: docs/telemetry.md.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.run_files import EVALUATIONS, METRICS, MetricsLine, append_line, drop_lines_after, read_metrics
from livt_scale.train.telemetry.clock import DEVICE_PARTS, PARTS
from livt_scale.train.telemetry.display import Pace, TerminalProgress, log_line
from livt_scale.train.telemetry.mfu import Speed, memory_peak_gib
from livt_scale.train.telemetry.rank_times import RankTimes
from livt_scale.train.telemetry.tensorboard import grouped
from livt_scale.train.telemetry.trackers import Trackers
from livt_scale.util.errors import RunError
from livt_scale.util.log import FILE_ONLY, DiskWarning

PLAIN_LINE_EVERY_S = 10.0
MEANS = ("loss", "grad_norm", "communication_s")  # of the steps that have them
SUMS = (*MEANS, *(f"{name}_steps" for name in MEANS), "steps", "skipped_steps", "step_s", *(f"{p}_s" for p in PARTS))
_log = logging.getLogger(__name__)


class MetricsLog(Hook):
    """The record of one stage, written by the main rank; the other ranks only count.

    speed None: no tflops, no mfu. ranks None: no times of the ranks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        speed: Speed | None = None,
        trackers: Trackers | None = None,
        ranks: RankTimes | None = None,
    ) -> None:
        self._path = folder / METRICS
        self._stage = folder.name
        self._speed, self._trackers, self._ranks = speed, trackers or Trackers([]), ranks
        self._terminal: TerminalProgress | None = None
        self._last_line_s = -math.inf
        self._warn_of_disk = DiskWarning("lines are missing")
        self._uncounted: deque[Step] = deque()

    def at_start(self, loop: Loop) -> None:
        self._schedule, self._clock, self._writes = loop.schedule, loop.clock, loop.world.is_main
        self._sums = {**dict.fromkeys(SUMS, 0.0), **(loop.state.sums or {})}
        if self._writes:
            for name in (METRICS, EVALUATIONS):
                drop_lines_after(self._path.with_name(name), loop.state.step)
            self._file = self._path.open("a")
            self._pace = Pace(loop.schedule.total, done=loop.state.step)
            if sys.stderr.isatty():
                self._terminal = TerminalProgress(self._stage, total=loop.schedule.total, done=loop.state.step)

    def after_step(self, loop: Loop, step: Step) -> None:
        self._uncounted.append(step)
        self._count_arrived()
        if self._schedule.logs(step.number):
            self._end_interval(loop, step)

    def _count_arrived(self) -> None:
        """Add the steps whose outcome is known: on a GPU, all but the newest."""
        while self._uncounted and self._uncounted[0].pending is None:
            self._count(self._uncounted.popleft())

    def _count(self, step: Step) -> None:
        result = step.result
        means = {"loss": step.loss, "grad_norm": result.grad_norm, "communication_s": result.exchange_s}
        for name, value in means.items():
            if result.applied and value is not None and math.isfinite(value):  # a skipped step is in no mean
                self._sums[name] += value
                self._sums[f"{name}_steps"] += 1
        self._sums["step_s"] += step.seconds
        self._sums["steps"] += 1
        self._sums["skipped_steps"] += not result.applied

        if self._terminal is not None:
            self._terminal.step(step.number, epoch=self._epoch(step.number), loss=step.loss, lr=step.lr)

    def close(self, loop: Loop) -> None:
        if self._terminal is not None:
            self._terminal.stop()
        self._trackers.finish()
        if self._writes:
            with suppress(OSError):  # a line that the full disk refused was logged
                self._file.close()

    @property
    def sums(self) -> dict[str, float]:
        """Those of the unfinished interval, to be saved with a checkpoint."""
        self._count_arrived()
        self._add_parts()
        return dict(self._sums)

    def picture(self, name: str, path: Path, *, step: int) -> None:
        """Send a picture that was drawn to the trackers that show pictures."""
        if self._writes and path.is_file():
            self._trackers.picture(name, path, step=step)

    def note(self, done: int, **values: Any) -> None:
        """Log an evaluation's values: evaluations.jsonl, the trackers, the terminal."""
        self._trackers.log({"eval": values}, step=done)
        if not self._writes:
            return
        line = {"step": done, "epoch": self._epoch(done), **values, "time": _now()}
        try:
            append_line(self._path.with_name(EVALUATIONS), line)
        except OSError as error:
            self._warn_of_disk(self._path.parent, error)
        _log.info("%s  step %d: %s", self._stage, done, "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def _epoch(self, done: int) -> float:
        return round(done / self._schedule.steps_per_epoch, 4)

    def _add_parts(self) -> None:
        for part, seconds in self._clock.take().items():
            self._sums[f"{part}_s"] += seconds

    def _end_interval(self, loop: Loop, step: Step) -> None:
        self._add_parts()
        sums, self._sums = self._sums, dict.fromkeys(SUMS, 0.0)
        ranks = self._ranks.exchange(sums) if self._ranks is not None else {}
        if not self._writes:
            return
        line: dict[str, Any] = {
            "step": step.number,
            "epoch": self._epoch(step.number),
            **_figures(sums, lr=step.lr, global_batch=loop.task.part.global_batch, speed=self._speed),
            "memory_peak_gib": memory_peak_gib(loop.world.device),
            "world_size": loop.world.world_size,
            **ranks,
            "time": _now(),
            **step.metrics,
        }
        self._write(line)
        self._trackers.log(grouped(line), step=step.number)
        if self._terminal is not None:
            self._terminal.interval(line)
        total = self._schedule.total
        if time.monotonic() - self._last_line_s > PLAIN_LINE_EVERY_S or step.number == total:
            self._last_line_s = time.monotonic()
            text = log_line(line, total=total, left_s=self._pace.left_s(step.number))
            _log.info("%s  %s", self._stage, text, extra=FILE_ONLY if self._terminal is not None else None)

    def _write(self, line: dict[str, Any]) -> None:
        """Into metrics.jsonl. A full disk costs the line, not the run."""
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._warn_of_disk(self._path.parent, error)


def _figures(
    sums: dict[str, float], *, lr: float, global_batch: int, speed: Speed | None
) -> dict[str, float | int | None]:
    """Means over the steps of an interval, in the order of the line. Seconds are per step."""
    steps = sums["steps"]
    seconds = {f"{part}_s": sums[f"{part}_s"] / steps for part in PARTS}
    step_s = sums["step_s"] / steps
    parts = sum(seconds[f"{part}_s"] for part in ("data_wait", *DEVICE_PARTS))
    images_per_s = global_batch / step_s
    return {
        "loss": _mean(sums, "loss"),
        "lr": lr,
        "images_per_s": round(images_per_s, 2),
        "data_wait_s": round(seconds.pop("data_wait_s"), 6),
        "step_s": round(step_s, 6),
        "grad_norm": _mean(sums, "grad_norm"),
        "skipped_steps": int(sums["skipped_steps"]),
        **{name: round(value, 6) for name, value in seconds.items()},
        "other_s": round(max(step_s - parts, 0.0), 6),
        "communication_s": _mean(sums, "communication_s"),
        **(speed.figures(images_per_s) if speed is not None else {}),
    }


def _mean(sums: dict[str, float], name: str) -> float | None:
    count = sums[f"{name}_steps"]
    return sums[name] / count if count else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def measured_demand(folder: Path) -> float | None:
    """Images per second that a rank's steps took from its loader before the run stopped, without their waits.

    From the last line of metrics.jsonl and the world size in it: what one rank takes depends on its device, and is the
    same when the run resumes on more ranks. None if there is no such line.
    """
    line = _last_line(folder)
    if line is None or not (line.images_per_s and line.step_s and line.world_size) or line.data_wait_s is None:
        return None  # not started, or not known
    busy = 1 - line.data_wait_s / line.step_s
    return line.images_per_s / line.world_size / busy if busy > 0 else None


def last_step_written(folder: Path) -> int:
    """The step of the last complete line of metrics.jsonl, as an earlier start left it; 0 without one."""
    line = _last_line(folder)
    return line.step if line is not None else 0


def _last_line(folder: Path) -> MetricsLine | None:
    try:
        lines = read_metrics(folder / METRICS, tail=True).lines
    except RunError:
        return None
    return lines[-1] if lines else None
