"""End runs from outside: save first, and leave no job of their chains that could start them again.

    1. the jobs of the chain that wait are cancelled, so that nothing takes the place of the one that runs
    2. the one that runs may not be put back (Requeue=0), and its tasks get SIGUSR2: they save and exit with 85
    3. its end is waited for, within a bound; what came back into the queue all the same is cancelled

A local run gets SIGUSR2 itself, by the process and host in status.json: rank 0 is enough, the ranks agree at each step.
No process on another host, of another user, or that only has the number now, is ever signalled. Of several runs, all
are asked before the end of any is waited for, and one that cannot be ended does not keep the others.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import STAGES
from livt_scale.slurm import commands, processes, progress
from livt_scale.slurm.commands import RUNS, query
from livt_scale.slurm.progress import Record
from livt_scale.slurm.records import read_chain
from livt_scale.util.errors import ClusterError, LivtError, RunError

POLL_S = 1.0
REPORT_EVERY_S = 30.0
Say = Callable[[str], None]


@dataclass
class Stopped:
    """What was done for one run: jobs cancelled before they started, those that were ended, the local processes."""

    run_dir: Path
    waiting: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    error: LivtError | None = None  # why it is not over
    chain: dict[str, Any] | None = None
    began: dict[int, float | None] = field(default_factory=dict)  # when the processes had started

    @property
    def nothing(self) -> bool:
        return not (self.waiting or self.running or self.processes)

    @property
    def what(self) -> str:
        """What is waited for, for a person."""
        names = self.running or [str(pid) for pid in self.processes]
        return f"{'job' if self.running else 'process'} {', '.join(names)}"


def cancel(run_dirs: Sequence[Path], *, save: bool, wait_s: float, say: Say) -> list[Stopped]:
    """End the runs; with `save` the state of their step is saved first. All are over within `wait_s`, or have `error`.

    ClusterError: Slurm refuses, or does not answer. RunError: not over yet, or on another host.
    """
    runs = [Stopped(run_dir) for run_dir in run_dirs]
    for run in runs:
        try:
            _ask(run, save=save, say=_named(run, say, several=len(runs) > 1))
        except LivtError as error:
            run.error = error
    asked = [run for run in runs if run.error is None and (run.processes or (run.running and save))]
    for run, left in zip(asked, _wait(asked, wait_s=wait_s, say=say), strict=True):
        run.error = left
    _cancel_what_came_back([run for run in asked if run.error is None])
    return runs


def _named(run: Stopped, say: Say, *, several: bool) -> Say:
    return (lambda text: say(f"{run.run_dir}: {text}")) if several else say


def _ask(run: Stopped, *, save: bool, say: Say) -> None:
    """Cancel what waits, and signal what runs."""
    run.chain = read_chain(run.run_dir)
    if run.chain is not None:
        _ask_jobs(run, commands.alive([run.chain])[0], save=save, say=say)
    if run.running:
        return
    records = [progress.read_record(run.run_dir, stage) for stage in STAGES]
    record = next((r for r in records if r.state == "running"), None)
    if record is not None:
        _signal_processes(run, record, save=save, say=say)
    elif processes.lock_is_held(run.run_dir):
        raise RunError(f"the run in {run.run_dir} is starting or ending", remedy="try again in a moment")


def _ask_jobs(run: Stopped, jobs: dict[str, str], *, save: bool, say: Say) -> None:
    run.waiting = [job for job, state in jobs.items() if state not in RUNS]
    commands.cancel(run.waiting)
    if run.waiting:
        say(f"cancelled, they had not started: {', '.join(run.waiting)}")
    run.running = [job for job in jobs if job not in run.waiting]
    if not run.running:
        return
    if not save:
        _scancel("--signal=KILL", *run.running)
        commands.cancel(run.running)
        say(f"killed: {', '.join(run.running)}; the newest checkpoint stays as it is")
        return
    for job in run.running:
        _, refused, _ = query("scontrol", "update", f"JobId={job}", "Requeue=0")
        if refused:  # then it comes back, and is cancelled when it does, as long as this command is not ended
            say(f"note: {refused}")
    _scancel("--signal=USR2", "--full", *run.running)
    say(f"asked to save and stop: {', '.join(run.running)}")


def _scancel(*words: str) -> None:
    _, why, _ = query("scancel", *words)
    if why:
        raise ClusterError(why)


def _signal_processes(run: Stopped, record: Record, *, save: bool, say: Say) -> None:
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
    run.began = {p: processes.started_at(p) for p in ours}
    for process in sorted(ours):
        say(f"{number.name} to process {process}: {processes.command_of(process)[:200]}")
        with suppress(ProcessLookupError):  # ended this moment
            os.kill(process, number)
    run.processes = sorted(ours)
    if elsewhere:
        say(f"note: ranks on {', '.join(elsewhere)} were not signalled; they end when they miss the others")


def _wait(runs: Sequence[Stopped], *, wait_s: float, say: Say) -> list[LivtError | None]:
    """Until all of them are over, `wait_s` at most; for each, why it is not."""
    began = told = time.monotonic()
    problem = ""
    while True:
        states, now_wrong = _states(runs)
        if now_wrong not in ("", problem):
            say(f"note: {now_wrong}")
        problem, left = now_wrong, _left(runs, states)
        now = time.monotonic()
        if not any(left) or now - began >= wait_s:
            break
        if now - told >= REPORT_EVERY_S:
            told = now
            saving = "; ".join(run.what for run, names in zip(runs, left, strict=True) if names)
            say(f"{saving} is saving still, {now - began:.0f} s")
        time.sleep(min(POLL_S, max(wait_s - (now - began), 0.01)))
    return [
        _not_over(run, names, wait_s=wait_s, problem=problem) if names else None
        for run, names in zip(runs, left, strict=True)
    ]


def _states(runs: Sequence[Stopped]) -> tuple[list[dict[str, str]], str]:
    """(their jobs in the queue, why these are not known): then all are taken to run still, and are looked at again."""
    try:
        return commands.alive([run.chain if run.running else None for run in runs]), ""
    except ClusterError as error:
        return [dict.fromkeys(run.running, "RUNNING") for run in runs], str(error)


def _left(runs: Sequence[Stopped], states: Sequence[dict[str, str]]) -> list[list[str]]:
    """For each run, its jobs that still run, or its processes."""
    return [
        [job for job in run.running if jobs.get(job) in RUNS]
        if run.running
        else [str(p) for p in run.processes if run.began[p] is not None and processes.started_at(p) == run.began[p]]
        for run, jobs in zip(runs, states, strict=True)
    ]


def _not_over(run: Stopped, names: list[str], *, wait_s: float, problem: str) -> LivtError:
    if run.running and problem:
        return ClusterError(
            f"whether job {', '.join(names)} has saved and ended is not known: {problem}",
            remedy=f"it was asked to: see livt status {run.run_dir}",
        )
    what = f"job {', '.join(names)} still runs" if run.running else f"process {', '.join(names)} is still there"
    return RunError(
        f"{what} {wait_s:.0f} s after it was asked to stop; a step or a save may be long",
        remedy="wait longer with --wait-s, or end it with --now and lose what is not saved",
    )


def _cancel_what_came_back(runs: Sequence[Stopped]) -> None:
    """What was put back into the queue in spite of Requeue=0."""
    submitted = [run for run in runs if run.running]
    try:
        back = commands.alive([run.chain for run in submitted])
        commands.cancel([job for jobs in back for job in jobs])
    except ClusterError as error:
        for run in submitted:
            run.error = error
