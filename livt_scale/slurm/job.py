"""All decisions of a batch job (slurm/job.sbatch): which step is next, what its exit code means, how the job ends.

    next_action(job, [], signalled=False)                               ->  JobStep("check", ("srun", …))
    next_action(job, [("check", 0)], signalled=False)                   ->  JobStep("train", ("srun", …))
    next_action(job, [("check", 0), ("train", 85)], signalled=True)     ->  JobExit(85), after scontrol requeue

The batch shell asks after each step (`livt job next`) and follows the answer. Steps that have ended, with their
exit codes, are arguments; all else is in the run directory, so that a job may be killed between any two decisions:

    RUN/slurm/starts-STAGE.json   the newest checkpoint at the last start, and the starts since then without a newer one
    RUN/slurm/ends/ID             how each job ended: a segment does not start behind one that failed or was cancelled
    RUN/slurm/nodes/ID/NODE       what each node answered to the check
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from livt_scale.checkpoint.manifest import step_of
from livt_scale.config.recipe import Recipe
from livt_scale.data.staged import staged_variable
from livt_scale.distributed.ports import TRIES, free_port, port_of_job
from livt_scale.slurm import bad_nodes, commands
from livt_scale.slurm.bad_nodes import BadNode
from livt_scale.slurm.causes import cause_outside, was_cancelled, was_preempted, was_requeued
from livt_scale.slurm.code_snapshot import PACKAGE
from livt_scale.slurm.records import EndKind, is_evaluated, read_end, segments_before
from livt_scale.slurm.script import WhenStopped
from livt_scale.slurm.sites import JobKind
from livt_scale.slurm.srun import Srun
from livt_scale.train.run_files import read_status
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import EXIT_FAILED, EXIT_PREEMPTED, RunError
from livt_scale.util.outside import read_json

CLEAN_UP = "clean-up"
KILLED_BY_SIGNAL = (128 + 12, 128 + 15)  # SIGUSR2, SIGTERM: srun gives this for a task that does not handle them yet
EXCLUDE_TRIES, EXCLUDE_WAIT_S = 8, 0.5  # only a job that waits can be changed, and after a requeue it soon does


@dataclass(frozen=True)
class JobStep:
    """Start this command, and wait for it."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class JobExit:
    """End the batch script. kind, why: for the record of this end."""

    code: int
    kind: EndKind
    why: str = ""


@dataclass(frozen=True)
class JobOutcome:
    """How the work of a job ended. stopped: saved, to be continued. bad: nodes for which it did not begin."""

    kind: Literal["done", "stopped", "failed"]
    why: str = ""
    bad: tuple[BadNode, ...] = ()


@dataclass(frozen=True)
class BatchJob:
    """One start of a batch script: what it was submitted for, and where it runs."""

    stage: JobKind
    recipe: Recipe
    recipe_path: str
    run_dir: Path
    sets: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()  # fields that may have changed since the last checkpoint
    when_stopped: WhenStopped = "requeue"
    segment: int = 1
    segments: int = 1
    exclude: str = ""  # nodes that are not used anyway
    stage_in_dir: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def id(self) -> str:
        return self.environ.get("SLURM_JOB_ID", "0")

    @property
    def name_for_scontrol(self) -> str:
        """The id; in an array that of the element alone: SLURM_JOB_ID of one element is the id of the array."""
        array, element = (self.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
        return f"{array}_{element}" if array and element else self.id

    @property
    def folder(self) -> Path:
        return self.run_dir / "slurm"

    @cached_property
    def srun(self) -> Srun:
        staging = self.stage_in_dir if self.recipe.slurm.stage_in and self.stage != "evaluate" else None
        return Srun(self.recipe, self.run_dir, PACKAGE.parent, self.environ, staging)

    @cached_property
    def facts(self) -> dict[str, str]:
        """What the controller reports about this job; empty if it does not answer."""
        return self.ask()

    def ask(self) -> dict[str, str]:
        """The same, as it is now."""
        return commands.show_job(self.id)

    @property
    def restarts(self) -> int:
        """How often Slurm had restarted this job when this start of it began."""
        return int(self.environ.get("SLURM_RESTART_COUNT") or 0)

    def steps(self) -> list[str]:
        """The steps in their order; the clean-up is not one of them."""
        check = self.recipe.slurm.check_nodes != "no" and bool(self.environ.get("SLURM_JOB_NODELIST"))
        names = ["check"] if check else []
        if self.stage == "evaluate":
            return [*names, "export", *(["eval"] if self.recipe.data.val else [])]
        return [*names, *(["stage-in"] if self.srun.staged else []), "train"]


def next_action(job: BatchJob, ended: Sequence[tuple[str, int]], *, signalled: bool) -> JobStep | JobExit:
    """What the batch shell does now. ended: (step, exit code), in order. signalled: the shell has received a signal."""
    if not ended and (stop := _begin(job)) is not None:
        return stop
    work = [step for step in ended if step[0] != CLEAN_UP]
    outcome = _judge(job, *work[-1], signalled=signalled) if work else None
    if outcome is None:
        left = [name for name in job.steps() if name not in dict(work)]
        if left and not signalled:
            return _step(job, left[0])
        outcome = JobOutcome("stopped" if left else "done")
    if job.srun.staged and "stage-in" in dict(work) and CLEAN_UP not in dict(ended):
        return JobStep(CLEAN_UP, tuple(job.srun.clean_up()))
    return _finish(job, outcome)


def parse_ended(words: Sequence[str]) -> list[tuple[str, int]]:
    """["check:0", "train:85"] -> [("check", 0), ("train", 85)]."""
    return [(name, int(code)) for name, _, code in (word.rpartition(":") for word in words)]


def _begin(job: BatchJob) -> JobExit | None:
    """End here if the stage is done or cannot be continued; None: there is work."""
    if (needed := "finetune" if job.stage == "evaluate" else job.stage) not in job.recipe.stage_names:
        log(f"the recipe has no stage {needed}: nothing to do")  # of an array, other runs have it
        return JobExit(0, "done")
    if _is_evaluated(job) if job.stage == "evaluate" else _status(job).get("state") == "done":
        log(f"{job.stage} is already done in {job.run_dir}: nothing to do")
        return JobExit(0, "done")
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.segment > 1 and (stop := _ended_before(job)) is not None:
        return stop
    if job.stage == "evaluate":
        return None
    if free_port(int(job.id)) is None:
        return _fail(job, f"port {port_of_job(int(job.id))} and {TRIES} others are taken on {socket.gethostname()}")
    return _count_start(job)


def _is_evaluated(job: BatchJob) -> bool:
    """Whether an earlier segment has done it; asked for again, it is done again."""
    since = str(_status(job, "finetune").get("since", ""))
    return job.segment > 1 and is_evaluated(job.run_dir, has_val=bool(job.recipe.data.val), since=since)


def _ended_before(job: BatchJob) -> JobExit | None:
    """End here if an earlier segment has failed or was cancelled; None: the rest of the stage was left to this one.

    One whose saving took longer than Slurm waits before it kills has no record: then Slurm is asked.
    """
    before = segments_before(job.run_dir, job.stage, job.segment)
    ends = [read_end(job.run_dir, each) for each in before]
    for end in ends:
        if end is not None and end.kind in ("failed", "cancelled"):
            word = "failed" if end.kind == "failed" else "was cancelled"
            log(f"{job.stage} {word} in an earlier segment, so this one does not start: {end.why}")
            return JobExit(EXIT_FAILED, end.kind, end.why)
    if before and ends[-1] is None and commands.end_state(before[-1]) == "CANCELLED":
        return _cancelled(job, f"job {before[-1]}, the segment before this one, was cancelled and has not saved")
    return None


def _count_start(job: BatchJob) -> JobExit | None:
    """Restarts that make no progress end here, instead of repeating forever."""
    newest = newest_checkpoint(job)
    before = _last_start(job) or {}
    repeats = 0
    if before.get("newest", "") == newest and isinstance(before.get("without_progress"), int):
        repeats = before["without_progress"] + 1
    start = {"job": job.id, "newest": newest, "without_progress": repeats, "status": _digest(_status(job))}
    write_atomic(job.folder / f"starts-{job.stage}.json", f"{json.dumps(start)}\n".encode())
    if repeats <= job.recipe.slurm.max_restarts_without_progress:
        return None
    why = (
        f"no progress: {repeats} starts of {job.stage} in a row found the same newest checkpoint ({newest or 'none'}). "
        f"What ended them is in the log of this stage's jobs and in {job.run_dir / job.stage / 'status.json'}"
    )
    return _fail(job, why)


def _step(job: BatchJob, name: str) -> JobStep:
    srun, kept = job.srun, (job.recipe_path, job.sets)
    if name == "check":
        shutil.rmtree(job.folder / "nodes" / job.id, ignore_errors=True)
        (job.folder / "nodes" / job.id).mkdir(parents=True)
        return JobStep(name, tuple(srun.check(job.folder / "nodes" / job.id)))
    if name == "stage-in":
        return JobStep(name, tuple(srun.stage_in(job.stage, *kept)))
    if name == "train":
        words = srun.train(job.stage, job.recipe_path, job.sets, allow=job.allow)
    else:
        words = srun.export() if name == "export" else srun.evaluate()
    variables = [*_stop_at(job), *([*_meet_at(job), *_read_staged(job)] if name == "train" else [])]
    return JobStep(name, (*(["env", *variables] if variables else []), *words))


def _read_staged(job: BatchJob) -> list[str]:
    """The copies that stage-in has made. Not as --set: the run would record folders that this job removes."""
    data, staged = job.recipe.data, job.srun.staged
    if staged is None:
        return []
    copies = {data.train: f"{staged}/train"}
    if data.val and Path(staged, "val").exists():
        copies[data.val] = f"{staged}/val"
    return [staged_variable(copies)]


def _stop_at(job: BatchJob) -> list[str]:
    """The time limit, if Slurm does not pass it to the tasks: older versions do not, and a container cannot ask."""
    if job.environ.get("SLURM_JOB_END_TIME"):
        return []
    end = commands.seconds(job.facts.get("EndTime", ""))
    return [] if end is None else [f"LIVT_STOP_AT={end:.0f}"]


def _meet_at(job: BatchJob) -> list[str]:
    """The port at which the ranks meet, where the one that they derive from the job's number is taken.

    This script runs on the job's first node, as rank 0 does.
    """
    number = int(job.id)
    port = free_port(number)
    if port is None or port == port_of_job(number):
        return []
    log(f"port {port_of_job(number)} is taken on this node: the ranks meet at {port}")
    return [f"MASTER_PORT={port}"]


def _judge(job: BatchJob, name: str, exit_code: int, *, signalled: bool) -> JobOutcome | None:
    """The outcome of the last step that ended; None: the next one may start."""
    if exit_code and (why := cause_outside(job.facts, restarts=job.restarts)):
        log(f"{why}: {name} ended with exit code {exit_code}")
        return JobOutcome("stopped")
    if name == "check":
        return None if signalled else _judge_nodes(job, exit_code)

    def was_asked() -> bool:
        return signalled or was_preempted(job.facts)

    if name == "stage-in":
        meaning = meaning_of(exit_code, new_state="", was_asked=was_asked)
        why = f"the shards could not be copied to {job.srun.staged} on each node"
        return None if meaning == "done" else JobOutcome(meaning, why)
    meaning = meaning_of(exit_code, new_state=_new_state(job), was_asked=was_asked)
    if meaning == "done" and name == "export":
        return None
    return JobOutcome(meaning, f"{job.stage} failed with exit code {exit_code}")


def meaning_of(
    exit_code: int, *, new_state: str, was_asked: Callable[[], bool]
) -> Literal["done", "stopped", "failed"]:
    """What an exit code of srun means. new_state: as this job wrote it, or empty. was_asked: to stop, by Slurm.

    The run's own record comes first: where one task has exited with 85, srun may have killed the others on their way
    out, and then gives 137. A task that is signalled before it handles signals, while it starts, ends with 140 or 143.
    """
    if exit_code == 0:
        return "done"
    if exit_code == EXIT_PREEMPTED or new_state == "preempted":
        return "stopped"
    if exit_code in KILLED_BY_SIGNAL and new_state != "failed" and was_asked():
        return "stopped"
    return "failed"


def _new_state(job: BatchJob) -> str:
    """The state in status.json, if that has changed since the job started; what an earlier job left there is empty."""
    now, start = _status(job), _last_start(job)
    if start is None or start.get("status") == _digest(now):
        return ""
    return str(now.get("state", ""))


def _judge_nodes(job: BatchJob, exit_code: int) -> JobOutcome | None:
    """Read what each node answered. Bad nodes are recorded, and end the job or are excluded from its next start."""
    folder, node_list = job.folder / "nodes" / job.id, job.environ["SLURM_JOB_NODELIST"]
    answers = bad_nodes.read_answers(folder, node_list, job=job.id, check_min=job.recipe.slurm.check_min)
    if not answers.nodes:
        return JobOutcome("failed", f"SLURM_JOB_NODELIST is {node_list!r}, which names no node: none is checked")
    bad = answers.bad
    if not bad:
        return None
    if not answers.started:
        why = f"srun failed with exit code {exit_code} and started the check on no node. No node is to blame"
        return JobOutcome("failed", why)
    for node in bad:
        log(f"node {node.name} is bad: {node.why}")
    if len(bad) == len(answers.nodes) > 1:
        return JobOutcome("failed", f"none of the {len(bad)} nodes passes the check, so the nodes are not the cause")
    bad_nodes.append(job.run_dir, bad)
    if job.recipe.slurm.check_nodes == "report":
        names = " ".join(node.name for node in bad)
        without = bad_nodes.without(job.run_dir, job.exclude)
        why = f"bad nodes: {names}. Submit again with --set slurm.exclude={without}, or slurm.check_nodes=exclude"
        return JobOutcome("failed", why)
    return JobOutcome("stopped", bad=tuple(bad))


def _finish(job: BatchJob, outcome: JobOutcome) -> JobExit:
    if outcome.kind == "done":
        log(f"{job.stage}: the step ended successfully")
        return JobExit(0, "done")
    if outcome.kind == "failed":
        return _fail(job, outcome.why)
    if outcome.bad:
        names = " ".join(node.name for node in outcome.bad)
        log(f"{job.stage} has not begun, and continues without {names}")
        nodes, element = bad_nodes.without(job.run_dir, job.exclude), job.environ.get("SLURM_ARRAY_TASK_ID", "")
        if not bad_nodes.exclude_from_waiting_jobs(job.id, nodes, element=element):
            log("waiting jobs of this chain could not be changed to exclude them")
    else:
        log(f"{job.stage} was stopped; its newest checkpoint: {newest_checkpoint(job) or 'none'}")
    if was_cancelled(job.facts, restarts=job.restarts):
        return _cancelled(job, f"{job.stage} was cancelled")
    if job.when_stopped == "requeue":
        return _requeue(job, excluding=bool(outcome.bad))
    if job.when_stopped == "next":
        return _stop(0, f"segment {job.segment} of {job.segments} ended; the next one continues")
    return _stop(
        EXIT_PREEMPTED,
        f"segment {job.segment} of {job.segments} was the last; livt submit continues where it stopped",
    )


def _requeue(job: BatchJob, *, excluding: bool) -> JobExit:
    """Put this job back into the queue, which ends its script: often before scontrol itself has ended."""
    if was_requeued(job.facts, restarts=job.restarts):
        return _stop(EXIT_PREEMPTED, "this job is back in the queue already")
    _, problem, code = commands.query("scontrol", "requeue", job.name_for_scontrol)
    if excluding:
        for _ in range(EXCLUDE_TRIES):
            if bad_nodes.exclude(job.name_for_scontrol, bad_nodes.without(job.run_dir, job.exclude)):
                break
            time.sleep(EXCLUDE_WAIT_S)
    if not problem or (code is not None and code < 0) or was_requeued(job.ask(), restarts=job.restarts):
        return JobExit(EXIT_PREEMPTED, "stopped", "this job was put back into the queue")
    why = f"this job could not be put back into the queue: {problem}. livt submit continues where it stopped"
    return _stop(EXIT_PREEMPTED, why)


def _stop(code: int, why: str) -> JobExit:
    """End with the rest of the stage left to the next start or segment."""
    log(why)
    return JobExit(code, "stopped", why)


def _cancelled(job: BatchJob, why: str) -> JobExit:
    """End a stage that a person has cancelled: neither a requeue nor a later segment continues it."""
    why = f"{why}, so {job.stage} is not restarted; livt submit continues it where it stopped"
    log(why)
    return JobExit(EXIT_FAILED, "cancelled", why)


def _fail(job: BatchJob, why: str) -> JobExit:
    """End as a failure; later segments of the stage end with the same reason."""
    status = job.run_dir / job.stage / "status.json"
    log(f"{why}. The lines above{f' and {status}' if status.exists() else ''} say why")
    return JobExit(EXIT_FAILED, "failed", why)


def newest_checkpoint(job: BatchJob) -> str | None:
    found: list[tuple[int, str]] = []
    with suppress(FileNotFoundError):
        names = (path.name for path in (job.run_dir / job.stage / "checkpoints").iterdir())
        found = [(step, name) for name in names if (step := step_of(name)) is not None]
    return max(found)[1] if found else None


def _status(job: BatchJob, stage: str | None = None) -> dict[str, Any]:
    """status.json of the stage; empty if it is missing, or unreadable, which the run itself reports."""
    with suppress(RunError):
        return dict(read_status(job.run_dir, stage or job.stage) or {})
    return {}


def _last_start(job: BatchJob) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        start = read_json(job.folder / f"starts-{job.stage}.json", "record")
        return start if isinstance(start, dict) else None
    return None


def _digest(status: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(status, sort_keys=True).encode()).hexdigest()


def log(message: str) -> None:
    """A line in the job's log, in the form that the batch shell uses."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} livt: {message}", file=sys.stderr, flush=True)
