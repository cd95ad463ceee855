"""Kills this process if none of its Python threads runs: C code that holds the interpreter's lock stops them all.

    guard = Guard()
    guard.allow(540.0)     again and again: SIGKILL if this is not called for so many seconds
    guard.end()

A second process counts the seconds, and only those in which both processes run. A timer in this process, such as
faulthandler's, would expire while the process is stopped, and end it when it is resumed. The second process is this
file, started by its path, so it imports the standard library alone:

    python -IS guard.py PID     its standard input has a line with the seconds that are left
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

TICK_S = 1.0
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # for the process it guards


class Guard:
    """The second process. Without it (it could not be started, or has ended), nothing is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-IS", __file__, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if self._process.stdin is not None:
                os.set_blocking(self._process.stdin.fileno(), False)  # a full pipe must not stop the caller

    def allow(self, seconds: float) -> None:
        """Kill this process if `allow` is not called again for `seconds` in which it ran."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), f"{seconds:.1f}\n".encode())

    def end(self) -> None:
        """Stop counting."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()


def guard(pid: int) -> None:
    """Returns when the other process has ended, or closes the pipe."""
    left_s = float("inf")
    while os.getppid() == pid:
        if select.select([0], [], [], TICK_S)[0]:
            lines = os.read(0, 65536).split()
            if not lines:
                return
            left_s = float(lines[-1])
        elif not is_stopped(pid):
            left_s -= TICK_S  # not by a clock: this process may have been stopped too
        if left_s <= 0:
            os.kill(pid, signal.SIGKILL)
            return


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    guard(int(sys.argv[1]))
