"""Slurm's own commands: facts about the cluster; jobs are submitted, listed and cancelled.

    facts = cluster_facts()             None where there is no scontrol; else partitions, accounts, PreemptMode
    sbatch(script, chdir=RUN, …)  ->  "1234"
    alive([chain.json, …])        ->  [{"1234": "PENDING"}, …]: by the comment that each job of a chain carries

Commands are started from lists, never through a shell. One that fails raises ClusterError with its message.
"""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from livt_scale.slurm import inherited
from livt_scale.slurm.facts import ClusterFacts, read_facts
from livt_scale.util.errors import ClusterError, UsageError

QOS_FORMAT = "format=name,preemptmode,maxwall,maxtres"
TIMEOUT_S = 120.0  # a controller under load answers late; one that is gone, never


def cluster_facts() -> ClusterFacts | None:
    """The facts from scontrol and sacctmgr; None without scontrol. Raises ClusterError if it fails."""
    try:
        config = _run("scontrol", "show", "config")
    except FileNotFoundError:
        return None
    partitions = _run("scontrol", "--oneliner", "show", "partition")
    try:
        who = ("user=" + getpass.getuser(), "format=account", "--noheader", "--parsable2")
        accounts = frozenset(_run("sacctmgr", "show", "associations", *who).split())
    except (FileNotFoundError, ClusterError, KeyError):
        accounts = frozenset()  # no accounting here
    try:
        qos = _run("sacctmgr", "show", "qos", QOS_FORMAT, "--noheader", "--parsable2")
    except (FileNotFoundError, ClusterError):
        qos = ""
    return read_facts(config, partitions, accounts or None, qos=qos)


def sbatch(
    script: Path, *, chdir: Path, log: str, comment: str, environ: Mapping[str, str], dependency: str | None = None
) -> str:
    """Submit `script`, to write into `log` below `chdir`; the job's id. Raises ClusterError with sbatch's message.

    environ: of sbatch, and of the job (`inherited.for_sbatch`).

    A user's path is a separate argument, in which nothing needs quoting; but a % in a log's path has to be doubled,
    also in the folder to which the path is relative (seen with Slurm 22.05).
    """
    if "\\" in str(chdir):  # Slurm would then not expand %j: one log for all jobs
        raise UsageError(f"run_dir is {str(chdir)!r}: Slurm cannot write logs below a name with a backslash")
    output = f"{chdir}/".replace("%", "%%") + log
    words = ["--parsable", f"--chdir={chdir}", f"--output={output}", f"--comment={comment}"]
    if dependency:
        words += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    try:
        told = _run("sbatch", *words, str(script), environ=environ)
    except FileNotFoundError:
        raise no_slurm("sbatch") from None
    job = told.strip().split(";")[0]  # "12;cluster" on a federation
    if not job.isdecimal():
        raise ClusterError(f"sbatch gave no job id, but printed: {told.strip()!r}")
    return job


def no_slurm(command: str) -> ClusterError:
    return ClusterError(
        f"there is no {command} here",
        remedy="give it on a login node of the cluster; livt submit --dry-run works anywhere",
    )


def alive(chains: Sequence[Mapping[str, Any] | None]) -> list[dict[str, str]]:
    """For each chain.json, the state by id of this user's jobs that carry its comment and have not ended.

    Runs that were submitted as an array share the comment: of those, the elements of the one run. None: no chain, and
    no jobs. Raises ClusterError.
    """
    if not any(chains):
        return [{} for _ in chains]
    try:
        told = _run("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%k")
    except FileNotFoundError:
        raise no_slurm("squeue") from None
    rows = [line.strip().split("|", 2) for line in told.splitlines() if line.count("|") >= 2]
    by_comment: dict[str, dict[str, str]] = {}
    for job, state, comment in rows:
        by_comment.setdefault(comment.strip(), {})[job] = state
    return [_elements_of(chain, by_comment.get(chain["chain"], {})) if chain else {} for chain in chains]


def _elements_of(chain: Mapping[str, Any], jobs: Mapping[str, str]) -> dict[str, str]:
    element = f"_{chain['array']['index']}" if chain.get("array") else ""
    return {job: state for job, state in jobs.items() if job.endswith(element)}


def cancel(jobs: Sequence[str]) -> None:
    """End the jobs, also those that wait. Raises ClusterError."""
    if jobs:
        _run("scancel", *jobs)


def _run(*words: str, environ: Mapping[str, str] | None = None) -> str:
    """The output of a command. FileNotFoundError where it is not there; ClusterError where it fails or is silent."""
    env = inherited.for_commands(os.environ) if environ is None else environ
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, errors="replace", env=env)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{words[0]} did not answer within {TIMEOUT_S:.0f} s", remedy="try again later") from None
    if done.returncode:
        output = " ".join((done.stderr or done.stdout).split()) or "nothing"
        raise ClusterError(f"{words[0]} failed with exit code {done.returncode} and printed: {output}")
    return done.stdout


ASK_S = 15.0  # a screen should not wait longer; --watch asks again
JOB_ID = r"[0-9]+(_[0-9]+)?"  # 12, or 12_3 of an array
SQUEUE = "--format=%i|%T|%r|%e|%L|%S|%N|%k"
SACCT = "--format=JobID,State,ExitCode,Start,End,NodeList,Reason"
EARLIER_S = 120.0  # the most that clocks of login node and controller may differ

WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
RUNS = frozenset({"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
FAILS = frozenset({"FAILED", "OUT_OF_MEMORY"})  # the job's own doing; TIMEOUT, NODE_FAIL, CANCELLED are not


@dataclass(frozen=True)
class JobState:
    """One job. Times as Slurm writes them; empty: not known."""

    id: str
    state: str  # as Slurm spells it, without "by 1000"; empty: not known
    reason: str = ""
    left: str = ""
    start: str = ""
    end: str = ""
    nodes: str = ""
    exit_code: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITS

    @property
    def runs(self) -> bool:
        return self.state in RUNS

    @property
    def ended(self) -> bool:
        return bool(self.state) and not self.waits and not self.runs

    @property
    def never_starts(self) -> bool:
        """It waits for a job that did not end well."""
        return self.waits and self.reason == "DependencyNeverSatisfied"


@dataclass
class Queue:
    """The known jobs, by id, and the queries that failed. answered: squeue has listed the jobs that it knows."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    answered: bool = False


def look(chains: Sequence[Mapping[str, Any]]) -> list[Queue]:
    """Ask for the jobs of each chain.json: squeue first, then sacct for those that have ended.

    squeue knows a job for some minutes after its end (MinJobAge), which is all that there is without accounting.
    """
    ids = [[job for job in (str(j.get("id")) for j in c.get("jobs", [])) if re.fullmatch(JOB_ID, job)] for c in chains]
    queues, wanted = [Queue() for _ in chains], list(dict.fromkeys(job for jobs in ids for job in jobs))
    if not wanted:
        return queues
    told, why, _ = query("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}", SQUEUE)
    if "Invalid job id" in why:  # squeue's message for a single job that it has forgotten
        why = ""
    for queue, chain, jobs in zip(queues, chains, ids, strict=True):
        queue.notes += [why] if why and jobs else []
        queue.answered = not why
        queue.jobs |= read_squeue(told, comment=str(chain.get("chain")))
    over = [
        [job for job in jobs if job not in q.jobs or q.jobs[job].ended] for q, jobs in zip(queues, ids, strict=True)
    ]
    wanted = list(dict.fromkeys(job for jobs in over for job in jobs))
    if not wanted:
        return queues
    told, why, _ = query(
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"-j{','.join(wanted)}", SACCT
    )
    for queue, chain, jobs in zip(queues, chains, over, strict=True):
        queue.notes += [why] if why and any(job not in queue.jobs for job in jobs) else []
        submitted = {str(job.get("id")): str(job.get("submitted_at", "")) for job in chain.get("jobs", [])}
        queue.jobs |= read_sacct(told, submitted={job: submitted[job] for job in jobs})
    return queues


class Answer(NamedTuple):
    """What a command printed; or why there is nothing, and its exit code (negative: the signal that ended it)."""

    text: str
    problem: str = ""
    code: int | None = None  # None: it was not started, or did not end


def query(*words: str) -> Answer:
    """Run one of Slurm's commands. Raises nothing."""
    try:
        env = inherited.for_commands(os.environ)
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_S, errors="replace", env=env)
    except FileNotFoundError:
        return Answer("", f"there is no {words[0]} here")
    except subprocess.TimeoutExpired:
        return Answer("", f"{words[0]} did not answer within {ASK_S:.0f} s")
    except OSError as error:
        return Answer("", f"{words[0]} cannot be started: {error.strerror}")
    if done.returncode:
        output = " ".join((done.stderr or done.stdout).split())[:300] or "nothing"
        problem = f"{words[0]} failed with exit code {done.returncode} and printed: {output}"
        return Answer("", problem, done.returncode)
    return Answer(done.stdout, "", 0)


def show_job(job: str) -> dict[str, str]:
    """What the controller reports about a job, by name; empty where it does not know the job, or does not answer."""
    text = query("scontrol", "--oneliner", "show", "job", job).text
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    return next((row for row in rows if job in (row.get("JobId"), _element_id(row))), {})


def _element_id(row: Mapping[str, str]) -> str:
    """12_3: an element has a number of its own too, and that is its JobId."""
    return f"{row.get('ArrayJobId')}_{row.get('ArrayTaskId')}"


def end_state(job: str) -> str:
    """The state in which a job ended: by the controller, which forgets it, else by accounting; empty: not known."""
    if state := show_job(job).get("JobState"):
        return state
    told = query("sacct", "--noheader", "--parsable2", "--allocations", f"-j{job}", SACCT).text
    known = read_sacct(told, submitted={job: ""}).get(job)
    return known.state if known else ""


def read_squeue(told: str, *, comment: str) -> dict[str, JobState]:
    """The jobs that carry `comment`, from rows as SQUEUE orders them."""
    found = {}
    for line in told.splitlines():
        parts = [part.strip() for part in line.split("|", 7)]
        if len(parts) == 8 and parts[7] == comment:
            job, state, reason, end, left, start, nodes, _ = parts
            now = JobState(job, state, _said(reason), _said(left), _said(start), _said(end), _said(nodes))
            found[job] = now if now.ended else replace(now, end="")  # of one that has not, when it will at the latest
    return found


def read_sacct(told: str, *, submitted: Mapping[str, str]) -> dict[str, JobState]:
    """The last row of each job: sacct has one for each start of a job that was requeued, in their order."""
    found = {}
    for line in told.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) < 7 or parts[0] not in submitted:
            continue
        job, state, exit_code, start, end, nodes, reason = parts[:7]
        if _is_before(end, submitted[job]):  # another job, of the cluster before this one
            continue
        state = state.split(" ")[0]  # "CANCELLED by 1000"
        found[job] = JobState(
            job, state, _said(reason), "", _said(start), _said(end), _said(nodes, "None assigned"), exit_code
        )
    return found


def _said(text: str, *nothing: str) -> str:
    return "" if text in ("None", "N/A", "Unknown", "(null)", *nothing) else text


def seconds(text: str) -> float | None:
    """A time as Slurm writes it (of this place) or as chain.json does (with its zone), in seconds since 1970."""
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    with suppress(ValueError):
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


def _is_before(one: str, other: str) -> bool:
    first, second = seconds(one), seconds(other)
    return first is not None and second is not None and first < second - EARLIER_S
