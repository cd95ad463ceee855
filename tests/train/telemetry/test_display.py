"""What a person sees of a stage: the two lines of a terminal, the line of a log."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from livt_scale.train.telemetry import display
from livt_scale.train.telemetry.display import Pace, TerminalProgress, log_line
from livt_scale.util.tables import time_text

LINE = {
    "step": 120, "epoch": 3.333, "loss": 0.81234, "lr": 1.25e-4, "images_per_s": 1234.4, "data_wait_s": 0.01,
    "step_s": 0.25, "mfu": None, "skipped_steps": 0,
}  # fmt: skip


def test_a_log_line_has_the_figures_and_the_time_left():
    assert log_line(LINE, total=360, left_s=3725.4) == (
        "step 120/360  epoch 3.33  loss 0.8123  lr 0.000125  1,234 images/s  data wait 4 %  left 1:02:05"
    )
    text = log_line({**LINE, "loss": None, "mfu": 0.4125, "skipped_steps": 3}, total=360, left_s=None)
    assert text.endswith("loss none  lr 0.000125  1,234 images/s  data wait 4 %  mfu 41.2 %  3 steps skipped")


def test_the_time_left_is_that_of_the_steps_of_this_start(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace(100, done=60)
    assert pace.left_s(60) is None
    clock[0] += 5.0  # ten steps
    assert pace.left_s(70) == pytest.approx(15.0)
    assert pace.left_s(100) == 0.0
    assert time_text(4 * 86400 + 3661) == "4 days, 1:01:01"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_two_lines_that_fit(monkeypatch, width):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(display, "plain_console", lambda stderr: console)
    shown = TerminalProgress("pretrain", total=360, done=0)
    shown.interval(LINE)
    shown.step(120, epoch=3.333, loss=0.81234, lr=1.25e-4)
    shown.stop()
    *_, bar, figures = re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", screen.getvalue()).rstrip("\n").split("\n")
    assert re.fullmatch(r"pretrain ━+[╸╺]? +120/360 elapsed 0:00:0\d remaining [-:\d]+ *", bar)
    assert len(bar.rstrip()) <= width
    assert figures.rstrip() == "epoch 3.33  loss 0.8123  lr 0.000125  1,234 images/s  data wait 4 %"
