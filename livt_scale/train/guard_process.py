"""The second process of `guard.py`, started by its path: standard library only.

python -IS guard_process.py PID     its standard input has a line with the seconds that are left
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

TICK_S = 1.0
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # for the process it guards


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
