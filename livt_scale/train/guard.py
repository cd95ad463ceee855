"""Kills this process if none of its Python threads runs: C code that holds the interpreter's lock stops them all.

    guard = Guard()
    guard.allow(540.0)     again and again: SIGKILL if this is not called for so many seconds
    guard.end()

A second process counts the seconds (`guard_process.py`), and only those in which both processes run. A timer in this
process, such as faulthandler's, would expire while the process is stopped, and end it when it is resumed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


class Guard:
    """The second process. Without it (it could not be started, or has ended), nothing is killed."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("guard_process.py")
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-IS", script, str(os.getpid())],
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
