"""Preemption: a signal or the clock asks to stop; the loop saves after its next step and ends with exit code 85.

The clock is the second source, for clusters whose signal never comes: the job's time limit, less a lead of twice (a
step + a save), both as measured, at least MIN_LEAD_S. Rank 0's clock counts for all. A signal may reach only one rank:
the loop sums the ranks' requests together with the step's loss, so that all of them stop after the same step.

    limit         LIVT_STOP_AT, else SLURM_JOB_END_TIME (epoch seconds), else `scontrol show job` where Slurm started
                  us; one in the past is ignored, with a warning
    turn 2 s      the longest time between two checks: a step, with evaluation and staging if they are due
    save 9 s      the longest, from its call to its checkpoint's name
    lead 22 s     stop as soon as less is left
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from livt_scale.util.errors import UsageError
from livt_scale.util.log import announced_wait

_log = logging.getLogger(__name__)

# SIGUSR1 is NCCL's: it catches it, so it is honoured only where it reaches us.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT)
SECOND_CTRL_C_S = 1.0  # one that comes sooner is the first, which torchrun hands on as well
MIN_LEAD_S = 10.0
UNMEASURED_SAVE_S = 30.0  # assumed for a save until the first one has ended
SCONTROL_S = 20.0  # time-out for the controller's answer


class Preemption:
    """While entered, the signals set `requested` (the signal's name) instead of ending the process.

    A second Ctrl-C ends it without a save.
    stop_at: when the job will be ended from outside, in epoch seconds; None: unknown, or not known to this rank.
    """

    def __init__(self, stop_at: float | None = None) -> None:
        self.requested: str | None = None
        self._stop_at = stop_at
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted: float | None = None
        self._asked: float | None = None
        self._longest_turn_s = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begins(self) -> None:
        """The loop begins. Its first turn (compiling, filling the loader) is not representative and is not measured."""
        self._asked = None
        self._longest_turn_s = 0.0

    def wanted(self, *, save_s: float | None) -> bool:
        """Whether to stop after this step. To be called once per step: the time between two calls is a turn.

        save_s: the longest save so far; None: not known yet.
        """
        now = time.monotonic()
        if self._asked is not None:
            self._longest_turn_s = max(self._longest_turn_s, now - self._asked)
        self._asked = now
        if self.requested is None and self._stop_at is not None:
            lead_s = lead(turn_s=self._longest_turn_s, save_s=save_s)
            if time.time() > self._stop_at - lead_s:
                at = time.strftime("%H:%M:%S", time.localtime(self._stop_at))
                self.requested = f"the clock, {lead_s:.0f} s before the time limit at {at},"
        return self.requested is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if os.environ.get("RANK", "0") == "0":
                    # not by logging: the signal may have come in the middle of a line
                    os.write(2, b"\nstopping after this step, with a save; Ctrl-C again stops without one\n")
            elif now - self._interrupted > SECOND_CTRL_C_S:
                raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


def lead(*, turn_s: float, save_s: float | None) -> float:
    """How long before the time limit a run stops, in seconds."""
    return max(2 * (turn_s + (UNMEASURED_SAVE_S if save_s is None else save_s)), MIN_LEAD_S)


def time_limit(environ: Mapping[str, str] = os.environ) -> float | None:
    """When this job will be ended, in epoch seconds; None if unknown. UsageError if it is not a number."""
    for name in ("LIVT_STOP_AT", "SLURM_JOB_END_TIME"):
        if given := environ.get(name):
            limit = _to_come(_seconds(name, given), name)
            if limit is not None:
                return limit
    job = environ.get("SLURM_JOB_ID")
    return _to_come(_ask_slurm(job), "EndTime of scontrol") if job else None


def _seconds(name: str, given: str) -> float:
    try:
        if math.isfinite(seconds := float(given)):
            return seconds
    except ValueError:
        pass
    raise UsageError(f"{name} is {given!r}", remedy="give seconds since 1970, as `date +%s` does")


def _to_come(limit: float | None, name: str) -> float | None:
    """`limit`; None where it is over: the job still runs, so it is wrong, and each start would end after one step."""
    if limit is None or limit > time.time():
        return limit
    _log.warning("%s is %.0f, a time in the past: ignored", name, limit)
    return None


def _ask_slurm(job: str) -> float | None:
    """EndTime of a job from its controller, for versions of Slurm that do not set SLURM_JOB_END_TIME."""
    try:
        asked = ["scontrol", "--oneliner", "show", "job", job]
        with announced_wait(f"scontrol, up to {SCONTROL_S:g} s"):
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=SCONTROL_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # no Slurm here, or no answer: only signals are left
    end = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", answer)  # local time; "Unknown" without a limit
    return time.mktime(time.strptime(end[1], "%Y-%m-%dT%H:%M:%S")) if end else None
