"""The state of a run: its own record, joined with what Slurm reports about its jobs.

    view = look_at(run_dir)         view.state, view.why, view.stages, view.jobs, view.notes

The run's own record comes first and Slurm's accounting second: Slurm calls a job COMPLETED that was stopped half-way
and saved, and FAILED or PREEMPTED one whose successor has been running for hours. Each stage is in one of these states:

    pending      not started, or to be resumed: a job waits (with Slurm's reason), or there is no job yet
    running      by its record, and a process, a job or a fresh heartbeat confirms it; or its job is starting
    preempted    stopped and saved, and no job of it is in the queue
    failed       by its record; or its job failed before the run could record anything
    stalled      by its record it is running, but it has no process, no job and no fresh heartbeat
    done         by its record
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from livt_scale.config.load import load_saved
from livt_scale.config.run_place import SAVED
from livt_scale.slurm import processes, progress
from livt_scale.slurm.bad_nodes import read_bad_nodes
from livt_scale.slurm.commands import FAILS, JobState, Queue, look, seconds
from livt_scale.slurm.progress import Record, RunPlan
from livt_scale.slurm.reasons import reason_in_words
from livt_scale.slurm.records import CHAIN, EndRecord, is_evaluated, read_chain, read_end
from livt_scale.train.compare_run import compare_run
from livt_scale.train.resume_rules import describe
from livt_scale.train.run_files import EVAL, is_number, read_eval
from livt_scale.util.errors import LivtError

State = Literal["pending", "running", "preempted", "failed", "stalled", "done"]
GROUPS = ("all", "many", "medium", "few")
LAST = "evaluate"  # the chain's last job, which is not a stage of the recipe


@dataclass(frozen=True)
class ChainJob:
    """One job of the chain: what was submitted, what Slurm reports about it, and what it has recorded of its end."""

    id: str
    stage: str
    segment: int
    segments: int
    log: str
    now: JobState
    end: EndRecord | None = None  # of its last start
    gone: bool = False  # Slurm was asked, and does not know it
    has_log: bool = False

    @property
    def runs(self) -> bool:
        return self.now.runs and self.end is None

    @property
    def ended_at(self) -> float | None:
        """In seconds since 1970; None: it has not ended, or that is not known."""
        if self.end is not None:
            return self.end.at
        return seconds(self.now.end) if self.now.ended else None


@dataclass(frozen=True)
class Signs:
    """Whether anything of a stage is alive. process: one of the run's is; None: they are on another host."""

    process: bool | None
    silent_s: float | None  # since the last heartbeat
    fresh_s: float
    starting: bool = False  # a living process holds the run's lock

    @property
    def fresh(self) -> bool:
        return self.silent_s is not None and self.silent_s <= self.fresh_s


@dataclass(frozen=True)
class StageView:
    """One stage: its state, why, and all that it has written."""

    name: str
    state: State
    why: str
    record: Record
    epochs: int | None = None


@dataclass
class RunView:
    """One run."""

    run_dir: Path
    name: str
    state: State
    why: str
    stage: str
    stages: list[StageView] = field(default_factory=list)
    jobs: list[ChainJob] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mode: str = ""  # of the chain; empty: not submitted
    at: float = 0.0
    accuracy: dict[str, float] | None = None  # of a finished run: top-1 of all, many, medium and few, fractions of 1

    @property
    def starts_at(self) -> float | None:
        """When Slurm expects to start the job that the run waits for; None: it makes no estimate, or nothing waits."""
        waiting = [job.now for job in self.jobs if job.now.waits and job.stage == self.stage]
        times = [at for job in waiting if (at := seconds(job.start)) is not None and at >= self.at]
        return min(times, default=None) if self.state == "pending" else None

    @property
    def current(self) -> StageView | None:
        return next((stage for stage in self.stages if stage.name == self.stage), None)


def look_at(run_dir: Path, *, queue: Queue | None = None, brief: bool = False) -> RunView:
    """The run in `run_dir`. queue: what Slurm reported a moment ago; None: it is asked. Raises nothing.

    brief: as much as a line shows, for many runs.
    """
    plan, notes = progress.read_plan(run_dir)
    chain, wrong = chain_of(run_dir)
    notes += wrong
    submitted = chain.get("jobs", [])
    if queue is None:
        (queue,) = look([chain])
    jobs = [_job(entry, queue, run_dir) for entry in submitted]
    notes += queue.notes
    names = [*plan.stages, *([LAST] if any(job.stage == LAST for job in jobs) else [])]
    records = {name: progress.read_record(run_dir, name, brief=brief) for name in names}
    if LAST in records:
        records[LAST] = _evaluation(run_dir, plan, after=records.get("finetune"))
    current = next((name for name in names if records[name].state != "done"), names[-1] if names else "")
    stages = []
    for name in names:
        signs = signs_of(run_dir, records[name], fresh_s=plan.fresh_s, is_current=name == current)
        of_it = [job for job in jobs if job.stage == name]
        state, why = judge(records[name], of_it, signs)
        stages.append(StageView(name, state, why, records[name], plan.stages.get(name)))
        notes += records[name].damage
    notes += [] if brief else _other_recipe(run_dir)  # no line shows notes
    shown = next((stage for stage in stages if stage.name == current), None)
    view = RunView(
        run_dir,
        plan.name,
        shown.state if shown else "pending",
        shown.why if shown else "nothing of it was started",
        current,
        stages,
        jobs,
        notes,
        str(chain.get("mode") or ""),
        time.time(),
    )
    view.notes += _warnings(view, plan, chain)
    if view.state == "done":
        view.accuracy = _accuracy(run_dir, since=_ended_at(records.get("finetune")))
    return view


def chain_of(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """(chain.json, what is wrong with it): empty where nothing was submitted."""
    try:
        return read_chain(run_dir) or {}, []
    except (LivtError, OSError, RecursionError) as error:
        told = str(error)
        return {}, [told if str(run_dir) in told else f"{run_dir / CHAIN} cannot be read: {told}"]


def _job(entry: dict[str, Any], queue: Queue, run_dir: Path) -> ChainJob:
    job = str(entry["id"])
    now, end = queue.jobs.get(job, JobState(job, "")), read_end(run_dir, job)
    if end is not None and (now.waits or _began_after(now, end.at)):
        end = None  # of an earlier start
    return ChainJob(
        job,
        str(entry.get("stage", "")),
        int(entry["segment"]) if progress.is_number(entry.get("segment")) else 1,
        int(entry["segments"]) if progress.is_number(entry.get("segments")) else 1,
        str(entry.get("log") or ""),
        now,
        end,
        gone=queue.answered and not now.state,
        has_log=bool(entry.get("log")) and (run_dir / str(entry["log"])).is_file(),
    )


def signs_of(run_dir: Path, record: Record, *, fresh_s: float, is_current: bool) -> Signs:
    """Look for the processes that the stage's files name, and for the age of its last heartbeat."""
    now, known = time.time(), []
    status = record.status
    if progress.is_number(status.get("pid")) and isinstance(status.get("host"), str):
        known.append(processes.is_there(int(status["pid"]), status["host"], wrote_at=record.since))
    known += [processes.is_there(b.pid, b.host, wrote_at=b.since) for b in record.beats if b.state == "running"]
    process = True if True in known else None if None in known or not known else False
    starting = is_current and processes.lock_is_held(run_dir)
    silent_s = None if record.wrote_at is None else max(now - record.wrote_at, 0.0)
    return Signs(process, silent_s, fresh_s, starting)


def judge(record: Record, jobs: Sequence[ChainJob], signs: Signs) -> tuple[State, str]:
    """(state, why) of a stage, by its record, then by its jobs."""
    said, why = record.state, str(record.status.get("why") or "")
    if said == "done":
        return "done", why
    jobs = [job for job in jobs if not _is_older(job, record.since)]
    runs = next((job for job in jobs if job.runs), None)
    waits = next((job for job in jobs if job.now.waits), None)
    if not signs.starting and (gave_up := _gave_up(jobs, said, why)) is not None:
        return gave_up
    if said == "running":
        return _says_running(jobs, runs, waits, signs)
    if said == "failed":
        again = runs is not None and _began_after(runs.now, record.since)
        put_back = waits is not None and not waits.now.reason.startswith("Dependency")
        if not (again or put_back or signs.starting):
            return "failed", why
    if runs is not None:
        return "running", f"job {runs.id} is running" if record.stage == LAST else f"job {runs.id} is starting"
    if signs.starting:
        return "running", "it is starting"
    if waits is not None:
        return "pending", _waits(waits) + (f"; before it: {why}" if why else "")
    if said:
        return "preempted", why
    return _ended(jobs) or ("pending", "not started, and no job of it is in the queue")


def _gave_up(jobs: Sequence[ChainJob], said: str, why: str) -> tuple[State, str] | None:
    """By the first job whose record says that nothing continues the stage. said, why: by the run's own record."""
    job = next((job for job in jobs if job.end is not None and job.end.kind in ("failed", "cancelled")), None)
    if job is None or job.end is None:
        return None
    told = f"job {job.id}: {job.end.why or f'ended with exit code {job.end.code}'}"
    if job.end.kind == "cancelled":
        return ("preempted" if said == "preempted" else "stalled"), told
    return "failed", why if said == "failed" and why else f"{told}; its log: {job.log}"


def _says_running(
    jobs: Sequence[ChainJob], runs: ChainJob | None, waits: ChainJob | None, signs: Signs
) -> tuple[State, str]:
    silent = "no sign of life" if signs.silent_s is None else f"no sign of life for {span(signs.silent_s)}"
    ended = _ended(jobs)
    if signs.process or (signs.fresh and signs.process is None and (runs or not (waits or ended))):
        return "running", "" if signs.fresh else f"{silent}, but its process is there"
    if runs is not None:
        return "running", f"job {runs.id} runs, {silent} from its ranks"
    if waits is not None:
        return "pending", f"{_waits(waits)}; before it: ended without a record"
    gone = "its processes are gone" if signs.process is False else "none of its jobs is there" if jobs else ""
    return ended or ("stalled", ", ".join(part for part in (gone, silent) if part))


def _is_older(job: ChainJob, since: float | None) -> bool:
    """Whether it had ended before the stage entered its recorded state."""
    return since is not None and job.ended_at is not None and job.ended_at < since


def _last_ended(jobs: Sequence[ChainJob]) -> ChainJob | None:
    """The last job that is over. One that was killed comes before segments that were then cancelled as they waited."""
    over = [job for job in jobs if job.now.ended or job.end or job.gone]
    if not over or over[-1].now.state not in ("CANCELLED", ""):
        return over[-1] if over else None
    started = next((job for job in reversed(over) if job.has_log or job.end), over[-1])
    return over[-1] if started.end or started.now.state == "COMPLETED" else started


def _ended(jobs: Sequence[ChainJob]) -> tuple[State, str] | None:
    """What is known about the last job that ended, where the run itself recorded nothing."""
    last = _last_ended(jobs)
    if last is None or (last.end is None and last.now.state == "COMPLETED"):
        return None
    if last.end is not None:
        told = f"job {last.id}: {last.end.why}" if last.end.why else f"job {last.id} ended with {last.end.code}"
        return "preempted" if last.end.kind == "stopped" else "stalled", told
    if last.gone:
        told = f"job {last.id} is gone from the queue"
        if last.has_log:
            return "stalled", f"{told} and left no record of its end; its log: {last.log}"
        return "stalled", f"{told}; it has not started, or could not write its log ({last.log})"
    told = f"job {last.id} ended as {last.now.state}"
    told += f", exit code {last.now.exit_code}" if last.now.exit_code not in ("", "0:0") else ""
    log = f"; its log: {last.log}" if last.has_log or last.now.state in FAILS else ""
    if last.now.state == "PREEMPTED":
        return "preempted", f"{told}, without a save{log}"
    if last.now.state in FAILS:
        return "failed", told + log
    return "stalled", f"{told}, and no other job of it is in the queue{log}"


def _waits(job: ChainJob) -> str:
    if job.now.never_starts:
        return f"job {job.id} can never start: the job that it waits for did not end well"
    words = reason_in_words(job.now.reason or "None")
    return f"job {job.id} waits" + (f": {words}" if words else "") + (f" ({job.now.reason})" if job.now.reason else "")


def _began_after(job: JobState, at: float | None) -> bool:
    start = seconds(job.start)
    return at is not None and start is not None and start > at


def _other_recipe(run_dir: Path) -> list[str]:
    """Where the saved recipe, which the epochs shown are from, is not what the stages were trained by."""
    with suppress(LivtError):
        differences = compare_run(load_saved(run_dir / SAVED), run_dir, sets=False)
        return [f"{SAVED} is not what {d.stage} was trained by: {describe(d.change)}" for d in differences]
    return []


def _accuracy(run_dir: Path, *, since: str) -> dict[str, float] | None:
    """The final top-1: of the export where the chain has evaluated it, else of the end of fine-tuning."""
    exported = [run_dir / "export" / EVAL] if is_evaluated(run_dir, has_val=True, since=since) else []
    for path in (*exported, run_dir / "finetune" / EVAL):
        with suppress(LivtError):
            top1 = read_eval(path).get("top1")
            if isinstance(top1, dict) and (found := {g: float(top1[g]) for g in GROUPS if is_number(top1.get(g))}):
                return found
    return None


def _evaluation(run_dir: Path, plan: RunPlan, *, after: Record | None) -> Record:
    """The last job keeps no status.json: its result is its record."""
    record = Record(LAST)
    if is_evaluated(run_dir, has_val=plan.evaluates, since=_ended_at(after)):
        record.status = {"state": "done"}
    return record


def _ended_at(finetuned: Record | None) -> str:
    return finetuned.status.get("since", "") if finetuned is not None else ""


def _warnings(view: RunView, plan: RunPlan, chain: dict[str, Any]) -> list[str]:
    """What a person should look at, although the run continues."""
    told = []
    now = view.current
    if now is not None and now.state == "running" and now.record.beats:
        running = [beat for beat in now.record.beats if beat.state == "running"]
        old = [beat.rank for beat in running if view.at - beat.at > plan.fresh_s]
        if old and len(old) < len(running):
            told.append(f"no heartbeat of ranks {', '.join(map(str, old[:8]))} for more than {span(plan.fresh_s)}")
    told += [_waits(job) for job in view.jobs if job.now.never_starts]
    told += [f"node {n.name} failed the check of job {n.job} at {n.at}: {n.why}" for n in read_bad_nodes(view.run_dir)]
    if chain.get("taken_back"):
        told.append(f"the chain was taken back when it was submitted: {chain['taken_back']}")
    return told


def span(seconds_: float) -> str:
    """A time for people: 34 s, 12 min, 3 h 05 min, 2 d 4 h."""
    whole = max(int(seconds_), 0)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
