"""Waits until submitted runs are over, up to a time limit, and prints a line when something changes.

    wait([run_dir], wait_s=3600, say=print)     0 all are done; 85 one is preempted, and not in the queue; 1 one failed

A run is over when it has no job in the queue any more; how it ended is in its own record. A controller that does not
answer for a while does not end the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from livt_scale.slurm import commands
from livt_scale.slurm.records import read_chain
from livt_scale.slurm.status import RunView, chain_of, look_at, span
from livt_scale.util.errors import EXIT_FAILED, EXIT_PREEMPTED, ClusterError

POLL_S = 30.0  # controllers are shared
REPORT_EVERY_S = 600.0


def wait(run_dirs: Sequence[Path], *, wait_s: float, say: Callable[[str], None]) -> int:
    """The exit code of the runs, once they are over. Raises ClusterError where they are not within `wait_s`."""
    began = time.monotonic()
    lines: dict[Path, str] = {}
    told: dict[Path, float] = {}
    while True:
        left = _in_queue(run_dirs, say)
        queues = commands.look([chain_of(run_dir)[0] for run_dir in run_dirs])
        views = {run: look_at(run, queue=queue, brief=True) for run, queue in zip(run_dirs, queues, strict=True)}
        for run_dir, view in views.items():
            now, line = time.monotonic(), line_of(view)
            if _key(view) != lines.get(run_dir) or now - told[run_dir] >= REPORT_EVERY_S:
                say(f"{run_dir}: {line}")
                lines[run_dir], told[run_dir] = _key(view), now
        if not left:
            return worst([exit_code(view) for view in views.values()])
        passed = time.monotonic() - began
        if passed >= wait_s:
            raise ClusterError(
                f"{len(left)} of {len(run_dirs)} runs are not over after {span(wait_s)}: "
                + ", ".join(str(run_dir) for run_dir in left[:5]),
                remedy="they continue; the same command with --wait waits for them again, livt cancel ends them",
            )
        time.sleep(max(min(POLL_S, wait_s - passed), 0.0))


def exit_code(view: RunView) -> int:
    """Of a run that has no job in the queue."""
    return {"done": 0, "preempted": EXIT_PREEMPTED}.get(view.state, EXIT_FAILED)


def worst(codes: Sequence[int]) -> int:
    """1 if any run has failed, else 85 if any was preempted, else 0."""
    return next((code for code in (EXIT_FAILED, EXIT_PREEMPTED) if code in codes), 0)


def line_of(view: RunView) -> str:
    """Where the run is: "running: pretrain, step 120 of 1000, 44 s left"."""
    parts, now = [f"{view.state}: {view.stage}" if view.stage else view.state], view.current
    if now is not None and now.state == "running" and now.record.total:
        parts.append(f"step {now.record.step} of {now.record.total}")
        if now.record.to_finish_s is not None:
            parts.append(f"{span(now.record.to_finish_s)} left")
    return ", ".join([*parts, *([view.why] if view.why else [])])


def _key(view: RunView) -> str:
    return f"{view.state} {view.stage} {view.why}"


def _in_queue(run_dirs: Sequence[Path], say: Callable[[str], None]) -> list[Path]:
    """The runs that have jobs in the queue; all of them where that is not known."""
    try:
        jobs = commands.alive([read_chain(run_dir) for run_dir in run_dirs])
    except ClusterError as error:
        say(f"note: {error}")
        return list(run_dirs)
    return [run_dir for run_dir, alive in zip(run_dirs, jobs, strict=True) if alive]
