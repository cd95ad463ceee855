"""What a run writes while it goes on: metrics.jsonl, trackers, a bar on a terminal or a plain line in a log.

A line of metrics.jsonl covers `log.every_steps` steps: their mean loss, their images a second. A run that is
continued drops the lines behind the checkpoint that it goes on from and takes up the sums that were saved with
it, so the file of a killed run holds the same losses as that of one never killed. Each field: docs/telemetry.md.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from livt_scale.train.run_files import EVALUATIONS, METRICS, MetricsLine, drop_lines_after, read_metrics
from livt_scale.train.telemetry.clock import DEVICE_PARTS, PARTS, StepClock
from livt_scale.train.telemetry.layer_stats import LayerGroups
from livt_scale.train.telemetry.mfu import Speed, memory_peak_gib
from livt_scale.train.telemetry.profiler import Profiler
from livt_scale.train.telemetry.trackers import Trackers
from livt_scale.util.errors import RunError

PLAIN_LINE_EVERY_S = 10.0
CPU = torch.device("cpu")
MEANS = ("loss", "grad_norm", "communication_s")  # of the steps that have them
SUMS = (*MEANS, *(f"{name}_steps" for name in MEANS), "steps", "skipped_steps", "step_s", *(f"{p}_s" for p in PARTS))


class Telemetry:
    """The main rank's record of one stage; on other ranks (`writes` False) it counts and writes nothing.

    `clock` is for the loop to time its parts with.
    """

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
        writes: bool,
        speed: Speed | None = None,
        trackers: Trackers | None = None,
        device: torch.device = CPU,
        profile_steps: tuple[int, int] | None = None,
        rank: int = 0,
        layers: LayerGroups | None = None,
    ) -> None:
        """`sums`: what `sums` gave at the checkpoint that the run goes on from. `speed` None: no tflops, no mfu."""
        self._path = folder / METRICS
        self._label, self._every, self._total = label, every_steps, total_steps
        self._per_epoch, self._images, self._start = steps_per_epoch, global_batch, start_step
        self._world_size, self._device = world_size, device
        self._sums = {**dict.fromkeys(SUMS, 0.0), **(sums or {})}
        self._speed, self._layers, self._trackers = speed, layers, trackers or Trackers([])
        self._writes = writes
        self._progress: Progress | None = None
        self._last_line_s = -math.inf
        self._told_of_disk = False
        self.clock = StepClock(device)
        self._profiler = Profiler(
            folder / "profile",
            steps=profile_steps,
            rank=rank,
            device=device,
            say=lambda text: self.say(text, always=True),
        )
        self._done = start_step

    def __enter__(self) -> Self:
        if self._writes:
            for name in (METRICS, EVALUATIONS):
                drop_lines_after(self._path.with_name(name), self._start)
            self._file = self._path.open("a")
            if sys.stderr.isatty():
                self._start_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._profiler.end(self._done)
        if self._progress is not None:
            self._progress.stop()
        self._trackers.finish()
        if self._writes:
            with suppress(OSError):  # a line that the full disk refused was told of
                self._file.close()

    @property
    def sums(self) -> dict[str, float]:
        """The unfinished interval, to be saved with a checkpoint."""
        self._add_parts()
        return dict(self._sums)

    def begin(self, step: int) -> None:
        """Step `step`, counted from 1, begins."""
        self._profiler.before(step)

    def before_update(self, step: int, *, loss_scale: float) -> None:
        """The gradients of step `step` are complete, multiplied by `loss_scale`; the weights are not yet changed."""
        if self._layers is not None and self._has_line(step):
            self._layers.before(scale=loss_scale)

    def step(
        self,
        done: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        step_s: float,
        applied: bool = True,
        exchange_s: float | None = None,
    ) -> None:
        """Note the step that made `done` steps of the stage. `applied` False: it left the weights as they were.

        `exchange_s`: what the backward pass waited for other ranks' gradients, as far as the strategy can tell.
        """
        self._done = done
        self._profiler.after(done)
        for name, value in (("loss", loss), ("grad_norm", grad_norm), ("communication_s", exchange_s)):
            if applied and value is not None and math.isfinite(value):  # a step not taken is in no mean
                self._sums[name] += value
                self._sums[f"{name}_steps"] += 1
        self._sums["step_s"] += step_s
        self._sums["steps"] += 1
        self._sums["skipped_steps"] += not applied
        if self._progress is not None:
            self._progress.update(self._bar, completed=done, loss=f"loss {loss:.4f}")
        if self._has_line(done):
            self._line(done, lr)

    def note(self, done: int, **values: Any) -> None:
        """Put an evaluation's values into evaluations.jsonl, on the trackers and on the terminal."""
        self._trackers.log(values, step=done)
        if self._writes:
            line = {"step": done, "epoch": round(done / self._per_epoch, 4), **values}
            try:
                with self._path.with_name(EVALUATIONS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._tell_of_disk(error)
            self.say(f"step {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def say(self, text: str, *, always: bool = False) -> None:
        """On the terminal, from the main rank; `always`: from any."""
        if not (self._writes or always):
            return
        if self._progress is not None:
            self._progress.console.print(f"{self._label}  {text}", highlight=False, markup=False)
        else:
            print(f"{self._label}  {text}", file=sys.stderr, flush=True)

    def _has_line(self, done: int) -> bool:
        return done % self._every == 0 or done == self._total

    def _add_parts(self) -> None:
        for part, seconds in self.clock.take().items():
            self._sums[f"{part}_s"] += seconds

    def _line(self, done: int, lr: float) -> None:
        self._add_parts()
        sums, self._sums = self._sums, dict.fromkeys(SUMS, 0.0)
        layers = None if self._layers is None else self._layers.after()  # a collective call where weights are sharded
        if not self._writes:
            return
        line: dict[str, Any] = {
            "step": done,
            "epoch": round(done / self._per_epoch, 4),
            **_figures(sums, lr=lr, global_batch=self._images, speed=self._speed),
            "memory_peak_gib": memory_peak_gib(self._device),
            "world_size": self._world_size,
        }
        if layers is not None:
            line["layers"] = {group: {k: _finite(v) for k, v in row.items()} for group, row in layers.items()}
        self._write(line)
        self._trackers.log({k: v for k, v in line.items() if k not in ("step", "world_size")}, step=done)
        if self._progress is None and (
            time.monotonic() - self._last_line_s > PLAIN_LINE_EVERY_S or done == self._total
        ):
            self._last_line_s = time.monotonic()
            self.say(_told(line, total=self._total))

    def _write(self, line: dict[str, Any]) -> None:
        """Into metrics.jsonl. A disk that is full costs the line and not the run."""
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._tell_of_disk(error)

    def _tell_of_disk(self, error: OSError) -> None:
        if not self._told_of_disk:
            self._told_of_disk = True
            self.say(f"{self._path.parent} cannot be written: {error.strerror}; training goes on, lines are missing")

    def _start_bar(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(
            *columns, TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._bar = self._progress.add_task(self._label, total=self._total, completed=self._start, loss="")
        self._progress.start()


def _figures(
    sums: dict[str, float], *, lr: float, global_batch: int, speed: Speed | None
) -> dict[str, float | int | None]:
    """Means over the steps of an interval, in the order of the line. Seconds are those of a step."""
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _told(line: dict[str, Any], *, total: int) -> str:
    """The plain line of a log file."""
    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
    text = (
        f"epoch {line['epoch']:.2f}  step {line['step']}/{total}  loss {loss}  lr {line['lr']:.3g}  "
        f"{line['images_per_s']:.0f} images/s  waits for data {line['data_wait_s'] / line['step_s']:.0%}"
    )
    if line.get("mfu") is not None:
        text += f"  mfu {line['mfu']:.1%}"
    return text + (f"  {line['skipped_steps']} steps skipped" if line["skipped_steps"] else "")


def measured_demand(folder: Path) -> float | None:
    """Images a second that a rank's steps took from its loader in an earlier part of the run, less their waits.

    From the last line of metrics.jsonl, where the run stopped, and the world size of that time: what one rank takes
    is its device's, and stays when the run goes on with more of them. None where there is no such line.
    """
    line = _last_line(folder)
    if line is None or not (line.images_per_s and line.step_s and line.world_size) or line.data_wait_s is None:
        return None  # not begun, or not known
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
