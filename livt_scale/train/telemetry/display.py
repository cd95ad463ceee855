"""How far a stage is: two lines on a terminal, else a line in the log every few seconds.

    pretrain ━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━ 120/360 elapsed 0:01:12 remaining 0:02:24
    epoch 3.33  loss 0.8123  lr 1.25e-04  1,234 images/s  data wait 3 %

The time left is that of the remaining steps at the mean pace of this start, evaluations and checkpoints included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.live import Live

from livt_scale.util.tables import plain_bar, plain_console, plain_line, time_text


class Pace:
    """The time that is left after a step of a stage with `total` steps, of which this start began after `done`."""

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._began_s = total, done, time.monotonic()

    def left_s(self, step: int) -> float | None:
        """Seconds to the end of the stage; None before the first step."""
        taken = step - self._done
        return (time.monotonic() - self._began_s) / taken * (self._total - step) if taken > 0 else None


class TerminalProgress:
    """The two lines. Other output appears above them while they are shown."""

    def __init__(self, stage: str, *, total: int, done: int) -> None:
        self._bar = plain_bar()
        self._task = self._bar.add_task(stage, total=total, completed=done)
        self._figures = plain_line()
        self._rates = ""
        self._live = Live(Group(self._bar, self._figures), console=plain_console(stderr=True), refresh_per_second=4)
        self._live.start()

    def step(self, number: int, *, epoch: float, loss: float, lr: float) -> None:
        self._bar.update(self._task, completed=number)
        self._figures.plain = f"epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.3g}{self._rates}"

    def interval(self, line: Mapping[str, Any]) -> None:
        """Show the rates of a line of metrics.jsonl."""
        self._rates = f"  {rates_text(line)}"

    def stop(self) -> None:
        self._live.stop()


def rates_text(line: Mapping[str, Any]) -> str:
    """Images per second, and the share of the time that a step waits for data, of a line of metrics.jsonl."""
    return f"{line['images_per_s']:,.0f} images/s  data wait {100 * line['data_wait_s'] / line['step_s']:.0f} %"


def log_line(line: Mapping[str, Any], *, total: int, left_s: float | None) -> str:
    """A line of metrics.jsonl as a log has it."""
    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
    text = f"step {line['step']}/{total}  epoch {line['epoch']:.2f}  loss {loss}  lr {line['lr']:.3g}"
    text += f"  {rates_text(line)}"
    if line.get("mfu") is not None:
        text += f"  mfu {100 * line['mfu']:.1f} %"
    if line["skipped_steps"]:
        text += f"  {line['skipped_steps']} steps skipped"
    return text if left_s is None else f"{text}  left {time_text(left_s)}"
