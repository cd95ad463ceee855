"""The guard: kills a process of which no thread calls it, and counts only the time in which that process runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from livt_scale.train import running_clock
from livt_scale.train.running_clock import RunningClock

REPO = Path(__file__).resolve().parents[2]
GUARDED = f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
from livt_scale.train.guard import Guard
guard = Guard()
guard.allow(float(sys.argv[2]))
print(guard._process.pid, flush=True)
time.sleep(float(sys.argv[1]))
guard.end()
"""


def guarded(seconds: float, *, allowed_s: float = 0.5) -> tuple[subprocess.Popen[str], int]:
    """A process that ends after `seconds` without another call, and its guard's number."""
    words = [sys.executable, "-IS", "-c", GUARDED, str(seconds), str(allowed_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process.stdout:
        return process, int(process.stdout.readline())


def test_a_process_that_does_not_call_its_guard_is_killed():
    process, guard = guarded(60)
    assert process.wait(20) == -signal.SIGKILL
    assert gone(guard)


def test_the_time_in_which_it_is_stopped_is_not_counted_and_the_guard_leaves_with_it():
    process, guard = guarded(0.1, allowed_s=2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(20) == 0
    assert gone(guard)


def test_signals_to_all_processes_of_a_job_do_not_end_the_guard():
    process, guard = guarded(60)
    while not ignored(guard) >> (signal.SIGTERM - 1) & 1:  # it has begun
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(guard, number)
    assert process.wait(20) == -signal.SIGKILL


def ignored(pid: int) -> int:
    """The signals that a process ignores, as a bit mask."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16)


def gone(pid: int, *, within_s: float = 10) -> bool:
    ends = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_the_running_clock_counts_a_gap_as_its_bound(monkeypatch):
    now = 100.0
    monkeypatch.setattr(running_clock.time, "monotonic", lambda: now)
    clock = RunningClock(gap_s=5)
    now += 2
    assert clock.now() == 2
    assert not clock.tick()
    now += 3600
    assert clock.now() == 7
    assert clock.tick()
    now += 1
    assert clock.now() == 8
