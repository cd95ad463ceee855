"""What a run writes while it goes on: metrics.jsonl, TensorBoard, a bar on a terminal or a plain line in a log.

A line of metrics.jsonl covers `log.every_steps` steps: their mean loss, their images a second. A run that is
continued drops the lines behind the checkpoint that it goes on from and takes up the sums that were saved with
it, so the file of a killed run holds the same losses as that of one never killed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from livt_scale.durable import write_whole

PLAIN_LINE_EVERY_S = 10.0
METRICS = "metrics.jsonl"


class Telemetry:
    """The main rank's record of one stage; on other ranks (`writes` False) it counts and writes nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        label: str,
        every_steps: int,
        total_steps: int,
        steps_per_epoch: int,
        global_batch: int,
        world_size: int,
        start_step: int,
        sums: dict[str, float] | None,
        tensorboard: bool,
        writes: bool,
    ) -> None:
        self._path = folder / METRICS
        self._label, self._every, self._total = label, every_steps, total_steps
        self._per_epoch, self._images, self._start = steps_per_epoch, global_batch, start_step
        self._world_size = world_size
        self._sums = {"loss": 0.0, "grad_norm": 0.0, "step_s": 0.0, "data_wait_s": 0.0, "steps": 0.0, **(sums or {})}
        self._tracker = _tensorboard(folder, purge_step=start_step + 1) if tensorboard and writes else None
        self._writes = writes
        self._progress: Progress | None = None
        self._last_line_s = -math.inf

    def __enter__(self) -> Self:
        if self._writes:
            _drop_lines_after(self._path, self._start)
            self._file = self._path.open("a")
            if sys.stderr.isatty():
                self._start_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tracker is not None:
            self._tracker.finish()
        if self._writes:
            self._file.close()

    @property
    def sums(self) -> dict[str, float]:
        """The unfinished interval, to be saved with a checkpoint."""
        return dict(self._sums)

    def step(self, done: int, *, loss: float, grad_norm: float, lr: float, step_s: float, data_wait_s: float) -> None:
        """Note the step that made `done` steps of the stage."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm), ("step_s", step_s), ("data_wait_s", data_wait_s)):
            self._sums[name] += value
        self._sums["steps"] += 1
        if self._progress is not None:
            self._progress.update(self._bar, completed=done, loss=f"loss {loss:.4f}")
        if done % self._every == 0 or done == self._total:
            self._line(done, lr)

    def note(self, done: int, **values: Any) -> None:
        """Put values that come now and then (an evaluation) on TensorBoard and on the terminal."""
        if self._tracker is not None:
            self._tracker.log(values, step=done)
        if self._writes:
            self.say(f"step {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def say(self, text: str) -> None:
        if not self._writes:
            return
        if self._progress is not None:
            self._progress.console.print(f"{self._label}  {text}", highlight=False, markup=False)
        else:
            print(f"{self._label}  {text}", file=sys.stderr, flush=True)

    def _line(self, done: int, lr: float) -> None:
        steps = self._sums["steps"]
        mean = {k: v / steps for k, v in self._sums.items() if k != "steps"}
        self._sums = dict.fromkeys(self._sums, 0.0)
        if not self._writes:
            return
        line = {
            "step": done,
            "epoch": round(done / self._per_epoch, 4),
            "loss": mean["loss"],
            "lr": lr,
            "images_per_s": round(self._images / mean["step_s"], 2),
            "data_wait_s": round(mean["data_wait_s"], 6),
            "step_s": round(mean["step_s"], 6),
            "grad_norm": mean["grad_norm"],
            "world_size": self._world_size,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log({k: v for k, v in line.items() if k not in ("step", "world_size")}, step=done)
        if self._progress is None and (
            time.monotonic() - self._last_line_s > PLAIN_LINE_EVERY_S or done == self._total
        ):
            self._last_line_s = time.monotonic()
            self.say(
                f"epoch {line['epoch']:.2f}  step {done}/{self._total}  loss {line['loss']:.4f}  lr {lr:.3g}  "
                f"{line['images_per_s']:.0f} images/s  waits for data {mean['data_wait_s'] / mean['step_s']:.0%}"
            )

    def _start_bar(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(
            *columns, TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._bar = self._progress.add_task(self._label, total=self._total, completed=self._start, loss="")
        self._progress.start()


def _tensorboard(folder: Path, *, purge_step: int) -> Any:
    """accelerate's tracker, writing into `folder`/tensorboard; events of steps that are done again are dropped."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState(cpu=True)  # the tracker asks it who the main process is; the process group is up already
    tracker = TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=purge_step)
    tracker.start()
    return tracker


def measured_demand(folder: Path) -> float | None:
    """Images a second that a rank's steps took from its loader in an earlier part of the run, less their waits.

    From the last line of metrics.jsonl, where the run stopped, and the world size of that time: what one rank takes
    is its device's, and stays when the run goes on with more of them. None where there is no such line.
    """
    try:
        line = json.loads((folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
        busy = 1 - line["data_wait_s"] / line["step_s"]
        return float(line["images_per_s"]) / line["world_size"] / busy if busy > 0 else None
    except (OSError, ValueError, LookupError, ZeroDivisionError, TypeError):
        return None  # not begun, or a half line of a killed process: nothing is known


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a half line at the end, of a killed process, goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    write_whole(path, b"".join(kept))
