"""Seconds in which this process ran: what it was stopped for (SIGSTOP, `scontrol suspend`) is not counted.

    clock = RunningClock(gap_s=5)
    clock.tick()     a thread, more often than every 5 s; True: the process was stopped, or this thread could not run
    clock.now()      any thread

Neither CLOCK_MONOTONIC nor a CPU clock measures this: one counts while a process is stopped, the other does not count
while it waits.
"""

from __future__ import annotations

import time


class RunningClock:
    """Starts at 0. One thread ticks, any thread reads. gap_s: a longer time between two ticks counts as this."""

    def __init__(self, *, gap_s: float) -> None:
        self._gap_s = gap_s
        self._last = (0.0, time.monotonic())  # counted until then, then; replaced, never changed: two threads read it

    def tick(self) -> bool:
        """Count the time since the last tick. Returns whether there was a gap."""
        counted, at = self._last
        now = time.monotonic()
        self._last = (counted + min(now - at, self._gap_s), now)
        return now - at > self._gap_s

    def now(self) -> float:
        """Seconds until now."""
        counted, at = self._last
        return counted + min(time.monotonic() - at, self._gap_s)
