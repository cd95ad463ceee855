"""End a run from outside: save first, and leave no job of its chain that could start it again.

    1. the jobs of the chain that wait are cancelled, so that nothing takes the place of the one that runs
    2. the one that runs may not be put back (Requeue=0), and its tasks get SIGUSR2: they save and exit with 85
    3. its end is waited for, within a bound; what came back into the queue all the same is cancelled

A local run gets SIGUSR2 itself, by the process and host in status.json: rank 0 is enough, the ranks agree at each step.
No process on another host, of another user, or that only has the number now, is ever signalled.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import STAGES
from livt_scale.slurm import commands, processes, progress
from livt_scale.slurm.commands import RUNS, query
from livt_scale.slurm.progress import Record
from livt_scale.slurm.submit import read_chain
from livt_scale.util.errors import ClusterError, RunError

POLL_S = 1.0
REPORT_EVERY_S = 30.0
Say = Callable[[str], None]


@dataclass
class Stopped:
    """What was done: the jobs cancelled before they started, those that were ended, the local processes."""

    waiting: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        return not (self.waiting or self.running or self.processes)


def cancel(run_dir: Path, *, save: bool, wait_s: float, say: Say, poll_s: float = POLL_S) -> Stopped:
    """End the run in `run_dir`; with `save` its state of this step is saved first.

    Raises ClusterError (Slurm refuses, or does not answer), RunError (not over within `wait_s`; on another host).
    """
    chain = read_chain(run_dir)
    done = Stopped()
    if chain is not None:
        _cancel_chain(chain, done, save=save, wait_s=wait_s, say=say, poll_s=poll_s)
    if done.running:
        return done
    records = [progress.read_record(run_dir, stage) for stage in STAGES]
    record = next((r for r in records if r.state == "running"), None)
    if record is not None:
        _end_processes(record, done, save=save, wait_s=wait_s, say=say, poll_s=poll_s)
    elif processes.lock_is_held(run_dir):
        raise RunError(f"the run in {run_dir} is starting or ending", remedy="try again in a moment")
    return done


def _cancel_chain(chain: dict[str, Any], done: Stopped, *, save: bool, wait_s: float, say: Say, poll_s: float) -> None:
    (jobs,) = commands.alive([chain])
    done.waiting = [job for job, state in jobs.items() if state not in RUNS]
    commands.cancel(done.waiting)
    if done.waiting:
        say(f"cancelled, they had not started: {', '.join(done.waiting)}")
    running = [job for job in jobs if job not in done.waiting]
    if not running:
        return
    done.running = running
    if not save:
        _scancel("--signal=KILL", *running)
        commands.cancel(running)
        say(f"killed: {', '.join(running)}; the newest checkpoint stays as it is")
        return
    for job in running:
        _, refused, _ = query("scontrol", "update", f"JobId={job}", "Requeue=0")
        if refused:  # then it comes back, and is cancelled when it does, as long as this command is not ended
            say(f"note: {refused}")
    _scancel("--signal=USR2", "--full", *running)
    say(f"asked to save and stop: {', '.join(running)}")
    left = _wait(
        lambda: [job for job, state in commands.alive([chain])[0].items() if job in running and state in RUNS],
        what=f"job {', '.join(running)}",
        wait_s=wait_s,
        say=say,
        poll_s=poll_s,
    )
    if left:
        raise RunError(
            f"job {', '.join(left)} still runs {wait_s:.0f} s after it was asked to stop; a step or a save may be long",
            remedy="wait longer with --wait-s, or end it with --now and lose what is not saved",
        )
    commands.cancel(list(commands.alive([chain])[0]))  # what was put back into the queue


def _scancel(*words: str) -> None:
    _, why, _ = query("scancel", *words)
    if why:
        raise ClusterError(why)


def _end_processes(record: Record, done: Stopped, *, save: bool, wait_s: float, say: Say, poll_s: float) -> None:
    """A run without a job: the process that wrote status.json, or with `save` False all that wrote heartbeats."""
    pid, host, since = record.status.get("pid"), record.status.get("host"), record.since
    if not (pid is not None and host is not None and since is not None):
        raise RunError(f"{record.stage}/status.json does not say which process runs", remedy="end it by hand")
    named = [(int(pid), host, since)]
    if not save:
        named += [(b.pid, b.host, b.since) for b in record.beats if b.state == "running"]
    elsewhere = sorted({h for _, h, _ in named if h != socket.gethostname()})
    ours = {p for p, h, at in named if processes.may_be_signalled(p, h, wrote_at=at)}
    if not ours:
        if elsewhere:
            raise RunError(
                f"{record.stage} runs as process {int(pid)} on {host}, by its status.json, and this is another host",
                remedy=f"give the same command on {host}",
            )
        if processes.is_there(int(pid), host, wrote_at=since):
            raise RunError(f"process {int(pid)} is another user's: {processes.command_of(int(pid))}")
        return  # it has ended without a record
    number = signal.SIGUSR2 if save else signal.SIGKILL
    began = {p: processes.started_at(p) for p in ours}
    for process in sorted(ours):
        say(f"{number.name} to process {process}: {processes.command_of(process)[:200]}")
        with suppress(ProcessLookupError):  # ended this moment
            os.kill(process, number)
    done.processes = sorted(ours)
    if elsewhere:
        say(f"note: ranks on {', '.join(elsewhere)} were not signalled; they end when they miss the others")
    left = _wait(
        lambda: [str(p) for p in ours if began[p] is not None and processes.started_at(p) == began[p]],
        what=f"process {', '.join(map(str, sorted(ours)))}",
        wait_s=wait_s,
        say=say,
        poll_s=poll_s,
    )
    if left:
        raise RunError(
            f"process {', '.join(left)} is still there after {wait_s:.0f} s; a step or a save may be long",
            remedy="wait longer with --wait-s, or end it with --now and lose what is not saved",
        )


def _wait(left: Callable[[], list[str]], *, what: str, wait_s: float, say: Say, poll_s: float) -> list[str]:
    """Until nothing is `left()`, `wait_s` at most; what is left then."""
    began = told = time.monotonic()
    while remaining := left():
        now = time.monotonic()
        if now - began >= wait_s:
            return remaining
        if now - told >= REPORT_EVERY_S:
            told = now
            say(f"{what} is saving still, {now - began:.0f} s")
        time.sleep(min(poll_s, max(wait_s - (now - began), 0.01)))
    return []
