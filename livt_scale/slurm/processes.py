"""Processes that a run's files name: is one still alive, and is it the same one, so that it may be signalled.

A number alone proves nothing: numbers are reused, and on another host it is another process. The process that wrote a
file started before it did; one that has the number now and started later is another.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from livt_scale.util.outside import open_checked

SLACK_S = 2.0  # btime is in full seconds, and changes when a clock is set


def started_at(pid: int) -> float | None:
    """When process `pid` of this host started, seconds since 1970; None: it is gone, or has ended as a zombie."""
    with suppress(psutil.Error, ValueError, OverflowError):  # a number in a file can be any
        process = psutil.Process(pid)
        return None if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else process.create_time()
    return None


def is_there(pid: int, host: str, *, wrote_at: float | None) -> bool | None:
    """Whether the process that wrote something at `wrote_at` is there still; None: it is of another host."""
    if host != socket.gethostname():
        return None
    began = started_at(pid)
    return began is not None and (wrote_at is None or began <= wrote_at + SLACK_S)


def may_be_signalled(pid: int, host: str, *, wrote_at: float) -> bool:
    """Whether it is there, the same one, and this user's."""
    if pid <= 1 or not is_there(pid, host, wrote_at=wrote_at):
        return False
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).uids().effective == os.geteuid())
    return False


def command_of(pid: int) -> str:
    """Its command line, for people; empty where it cannot be read."""
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def lock_is_held(run_dir: Path) -> bool:
    """Whether a process of this host works in the run. The lock is only looked at: taking it could refuse a start."""
    try:
        with open_checked(run_dir / ".lock", "note") as file:
            found = re.fullmatch(r"process (\d{1,10}) on (\S+)\s*", file.read(300).decode(errors="replace"))
            told = os.fstat(file.fileno())
    except OSError:
        return False
    if found is None or not is_there(int(found[1]), found[2], wrote_at=told.st_mtime):
        return False
    try:  # the process may have released the lock since
        return re.search(rf":{told.st_ino} \d+ ", Path("/proc/locks").read_text()) is not None
    except OSError:
        return True
