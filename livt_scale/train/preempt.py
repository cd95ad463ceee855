"""Preemption: a signal or the clock asks for a save; the loop saves at its next step and ends with exit code 85.

The clock is the second source, for clusters whose signal never comes: the job's time limit, less a lead of twice (a
step + a save), both as measured, at least MIN_LEAD_S. Rank 0's clock counts for all. A signal may reach one rank
alone: the loop adds up the ranks' requests with the step's loss, so that all of them stop after the same step.

    limit         LIVT_STOP_AT, else SLURM_JOB_END_TIME (epoch seconds), else `scontrol show job` where Slurm started us
    turn 2 s      the longest from one asking to the next: a step, with evaluation and staging where they are due
    save 9 s      the longest, from its call to its checkpoint's name
    lead 22 s     stop as soon as less is left
"""

from __future__ import annotations

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

# SIGUSR1 is NCCL's: it catches it, so it is honoured only where it reaches us.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)
MIN_LEAD_S = 10.0
UNMEASURED_SAVE_S = 30.0  # what a save is taken for until the first one has ended
SCONTROL_S = 20.0  # a controller that answers later is not waited for


class Preemption:
    """While entered, the signals set `requested` (the signal's name) instead of ending the process.

    stop_at: when the job is ended from outside, in epoch seconds; None: nobody says, or not to this rank.
    """

    def __init__(self, stop_at: float | None = None) -> None:
        self.requested: str | None = None
        self._stop_at = stop_at
        self._before: dict[signal.Signals, Any] = {}
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
        """The loop begins. Its first turn (compiling, filling the loader) tells nothing about the others."""
        self._asked = None
        self._longest_turn_s = 0.0

    def wanted(self, *, save_s: float | None) -> bool:
        """Whether to stop after this step. To be asked once a step, which is how a turn is measured.

        save_s: what a save took, at the longest; None: not known yet.
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
        self.requested = signal.Signals(number).name


def lead(*, turn_s: float, save_s: float | None) -> float:
    """How long before the time limit a run stops, in seconds."""
    return max(2 * (turn_s + (UNMEASURED_SAVE_S if save_s is None else save_s)), MIN_LEAD_S)


def time_limit(environ: Mapping[str, str] = os.environ) -> float | None:
    """When this job will be ended, in epoch seconds; None where nobody says. UsageError where it is no number."""
    for name in ("LIVT_STOP_AT", "SLURM_JOB_END_TIME"):
        if given := environ.get(name):
            try:
                return float(given)
            except ValueError:
                raise UsageError(f"{name} is {given!r}", remedy="give seconds since 1970, as `date +%s` does") from None
    job = environ.get("SLURM_JOB_ID")
    return _ask_slurm(job) if job else None


def _ask_slurm(job: str) -> float | None:
    """EndTime of a job from its controller, for versions of Slurm that do not set SLURM_JOB_END_TIME."""
    try:
        asked = ["scontrol", "--oneliner", "show", "job", job]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=SCONTROL_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # no Slurm here, or it does not answer: signals are left
    end = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", told)  # local time; "Unknown" without a limit
    return time.mktime(time.strptime(end[1], "%Y-%m-%dT%H:%M:%S")) if end else None
