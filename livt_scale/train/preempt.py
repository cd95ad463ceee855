"""Preemption: SIGTERM or SIGUSR2 asks for a save; the loop saves at its next step and ends with exit code 85.

A signal may reach one rank alone: the loop adds up the ranks' requests with the step's loss, so that all of them
stop after the same step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

# SIGUSR1 is NCCL's: it catches it, so it is honoured only where it reaches us.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)


class Preemption:
    """While entered, the signals set `requested` (the signal's name) instead of ending the process."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
