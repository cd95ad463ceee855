"""What a user can do next about a run, as one line that can be pasted into a shell: a command, and a comment.

    next_line(view)   "livt logs runs/a  # why it failed; livt submit runs/a/slurm/submitted.yaml continues it, …"

NEXT has a line for each situation; a situation is a state of the run, or a special case of one. Nothing is decided from
the text of a reason, except for Slurm's reasons why a job waits.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from livt_scale.config.run_place import SAVED
from livt_scale.slurm.reasons import HELD, first_word
from livt_scale.slurm.status import RunView

Situation = Literal[
    "pending",
    "pending: in the queue",
    "pending: held",
    "pending: can never start",
    "running",
    "preempted",
    "failed",
    "stalled",
    "done",
    "done: pretrained",
]
# {run}: its folder, quoted; {resume}: the command that starts or continues it; {job}: the one that waits; {where}
NEXT: Mapping[Situation, str] = {
    "pending": "{resume}  # starts it",
    "pending: in the queue": "livt status {run} --watch  # Slurm starts it; livt cancel {run} withdraws it",
    "pending: held": "scontrol release {job}  # it waits until it is released, by an administrator if they hold it",
    "pending: can never start": "livt cancel {run}  # removes the jobs that can never start; then {resume}",
    "running": "livt logs {run} -f  # follows it; livt cancel {run} saves and stops it",
    "preempted": "{resume}  # continues it from {where}",
    "failed": "livt logs {run}  # shows why; when that is corrected, {resume} continues it from {where}",
    "stalled": "livt logs {run}  # shows its last lines; {resume} continues it from {where}",
    "done": "livt predict {run} PHOTOS --out photos.csv  # classifies images; livt export {run} writes the weights",
    "done: pretrained": "livt export {run} --to hf  # writes the weights; --to mae for the layout of MAE's code",
}


def next_line(view: RunView) -> str:
    """The line for the run's situation."""
    job = _first_waiting(view)
    values = {"run": quoted(view.run_dir), "resume": resume_command(view), "job": job, "where": _where(view)}
    return NEXT[situation_of(view)].format(**values)


def situation_of(view: RunView) -> Situation:
    if view.state == "done":
        return "done" if any(stage.name == "finetune" for stage in view.stages) else "done: pretrained"
    if view.state != "pending":
        return view.state
    waiting = [job.now for job in view.jobs if job.now.waits and job.stage == view.stage]
    if any(job.never_starts for job in waiting):
        return "pending: can never start"
    if any(first_word(job.reason) in HELD for job in waiting):
        return "pending: held"
    return "pending: in the queue" if waiting else "pending"


def resume_command(view: RunView) -> str:
    """What starts the run, or continues it: in the way in which it was started before."""
    submitted, saved = view.run_dir / "slurm" / "submitted.yaml", view.run_dir / SAVED
    if view.mode or not saved.is_file():
        return f"livt submit {quoted(submitted)}" if submitted.is_file() or view.mode else "livt train RECIPE"
    return f"livt train {quoted(saved)}"


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _first_waiting(view: RunView) -> str:
    return next((job.id for job in view.jobs if job.now.waits), "JOB")


def _where(view: RunView) -> str:
    """The newest checkpoint of the current stage; without one, the stage's beginning."""
    saved = view.current.record.saved if view.current else None
    return saved.name if saved else f"the start of {view.stage or 'the run'}"
