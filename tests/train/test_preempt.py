"""Two sources ask a run to stop: signals, and the clock before the job's time limit."""

from __future__ import annotations

import os
import signal
import time

import pytest

from livt_scale.train import preempt
from livt_scale.train.preempt import MIN_LEAD_S, UNMEASURED_SAVE_S, Preemption, lead, time_limit
from livt_scale.util.errors import UsageError


class Clock:
    def __init__(self, monkeypatch):
        self.now_s = 1000.0
        monkeypatch.setattr(preempt.time, "time", lambda: self.now_s)
        monkeypatch.setattr(preempt.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_as_long_as_we_listen(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.wanted(save_s=None)
        os.kill(os.getpid(), number)
        assert preemption.wanted(save_s=None)
        assert preemption.requested == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_without_a_save_but_not_the_echo_of_the_first(clock):
    with Preemption() as preemption:
        for _ in range(2):  # the terminal's, and torchrun's
            os.kill(os.getpid(), signal.SIGINT)
            clock.now_s += 0.2
        assert preemption.requested == "SIGINT"
        clock.now_s += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_lead_is_twice_a_turn_and_a_save_as_measured():
    assert lead(turn_s=4, save_s=9) == 26
    assert lead(turn_s=4, save_s=None) == 2 * (4 + UNMEASURED_SAVE_S)
    assert lead(turn_s=0.01, save_s=0.02) == MIN_LEAD_S


def test_the_clock_asks_when_a_turn_and_a_save_would_no_longer_fit_twice(clock):
    preemption = Preemption(stop_at=1000 + 100)
    preemption.begins()
    clock.now_s += 50  # the first step compiles
    assert not preemption.wanted(save_s=5)
    for _ in range(2):  # 92 s, then 84 of 100: 4 s a turn
        clock.now_s += 4
        assert not preemption.wanted(save_s=5)
    asked = []
    while not preemption.wanted(save_s=5):
        clock.now_s += 4
        asked.append(clock.now_s)
    assert clock.now_s == 1082 + 4  # the first moment with less than 2 · (4 + 5) s left
    assert "the clock, 18 s before the time limit at " in preemption.requested


def test_without_a_limit_the_clock_never_asks(clock):
    preemption = Preemption(stop_at=None)
    clock.now_s += 1e9
    assert not preemption.wanted(save_s=5)


@pytest.mark.parametrize(
    ("environ", "limit"),
    [
        ({}, None),
        ({"SLURM_JOB_END_TIME": "4102444800"}, 4102444800.0),
        ({"SLURM_JOB_END_TIME": "4102444800", "LIVT_STOP_AT": "4102440000.5"}, 4102440000.5),
    ],
)
def test_where_the_limit_comes_from(environ, limit):
    assert time_limit(environ) == limit


def test_a_limit_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="LIVT_STOP_AT is 'soon'"):
        time_limit({"LIVT_STOP_AT": "soon"})


SCONTROL = """#!/bin/sh
test "$*" = "--oneliner show job 77" || exit 9
echo "JobId=77 JobName=a EndTime=wrong Reason=None"
echo "JobId=77 JobName=x RunTime=00:01:00 TimeLimit=01:00:00 StartTime=2096-11-23T10:00:00 EndTime={end} Deadline=N/A"
exit {code}
"""


@pytest.mark.parametrize(
    ("end", "code", "known"),
    [("2096-11-23T11:00:00", 0, True), ("Unknown", 0, False), ("2096-11-23T11:00:00", 1, False)],
)
def test_the_controller_is_asked_where_slurm_does_not_say(tmp_path, monkeypatch, end, code, known):
    script = tmp_path / "scontrol"
    script.write_text(SCONTROL.format(end=end, code=code))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expected = time.mktime((2096, 11, 23, 11, 0, 0, 0, 0, -1)) if known else None
    assert time_limit({"SLURM_JOB_ID": "77"}) == expected


def test_a_controller_that_is_missing_leaves_the_signals(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert time_limit({"SLURM_JOB_ID": "77"}) is None
