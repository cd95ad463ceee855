"""Slurm's view of a chain's jobs: what squeue shows of those that wait or run, and sacct of those that ended.

    (queue,) = look([chain.json])       any number of chains at the price of one squeue and one sacct
    queue.jobs["1235"]                  JobState(state="PENDING", reason="Dependency", …)
    queue.notes                         what could not be asked, and why: no squeue here, no accounting, no answer

A job's number may be given again when a cluster is set up anew, so a row of squeue counts only with the chain's
comment, and one of sacct only if it is not older than the submission. Nothing here raises: what cannot be asked is
told.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

ASK_S = 15.0  # a screen that waits longer is no use; --watch asks again
JOB_ID = r"[0-9]+(_[0-9]+)?"  # 12, or 12_3 of an array
SQUEUE = "--format=%i|%T|%r|%M|%L|%S|%N|%k"
SACCT = "--format=JobID,State,ExitCode,Start,End,NodeList,Reason"
EARLIER_S = 120.0  # clocks of login node and controller may differ so much

WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
RUNS = frozenset({"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
FAILS = frozenset({"FAILED", "OUT_OF_MEMORY"})  # the job's own doing; TIMEOUT, NODE_FAIL, CANCELLED are not


@dataclass(frozen=True)
class JobState:
    """One job. Times as Slurm writes them; empty: not said."""

    id: str
    state: str  # Slurm's word, without "by 1000"; "" where nobody knows
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
    """The jobs that are known, by id, and what could not be asked."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def look(chains: Sequence[Mapping[str, Any]]) -> list[Queue]:
    """Ask for the jobs of each chain.json: squeue first, sacct for those that it does not show any more."""
    ids = [[job for job in (str(j.get("id")) for j in c.get("jobs", [])) if re.fullmatch(JOB_ID, job)] for c in chains]
    queues, wanted = [Queue() for _ in chains], list(dict.fromkeys(job for jobs in ids for job in jobs))
    if not wanted:
        return queues
    told, why = ask("squeue", "--noheader", "--array", f"--jobs={','.join(wanted)}", SQUEUE)
    if "Invalid job id" in why:  # squeue's word for a single one that is gone already
        why = ""
    for queue, chain, jobs in zip(queues, chains, ids, strict=True):
        queue.notes += [why] if why and jobs else []
        queue.jobs |= read_squeue(told, comment=str(chain.get("chain")))
    gone = [[job for job in jobs if job not in q.jobs] for q, jobs in zip(queues, ids, strict=True)]
    wanted = list(dict.fromkeys(job for jobs in gone for job in jobs))
    if not wanted:
        return queues
    told, why = ask(
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"-j{','.join(wanted)}", SACCT
    )
    for queue, chain, jobs in zip(queues, chains, gone, strict=True):
        queue.notes += [why] if why and jobs else []
        submitted = {str(job.get("id")): str(job.get("submitted_at", "")) for job in chain.get("jobs", [])}
        queue.jobs |= read_sacct(told, submitted={job: submitted[job] for job in jobs})
    return queues


def ask(*words: str) -> tuple[str, str]:
    """(output, why there is none) of one of Slurm's commands."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_S, errors="replace")
    except FileNotFoundError:
        return "", f"there is no {words[0]} here"
    except subprocess.TimeoutExpired:
        return "", f"{words[0]} did not answer within {ASK_S:.0f} s"
    except OSError as error:
        return "", f"{words[0]} cannot be started: {error.strerror}"
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:300] or "nothing"
        return "", f"{words[0]} failed with exit code {done.returncode} and said: {said}"
    return done.stdout, ""


def read_squeue(told: str, *, comment: str) -> dict[str, JobState]:
    """The jobs that carry `comment`, from rows as SQUEUE orders them."""
    found = {}
    for line in told.splitlines():
        parts = [part.strip() for part in line.split("|", 7)]
        if len(parts) == 8 and parts[7] == comment:
            job, state, reason, _, left, start, nodes, _ = parts
            found[job] = JobState(
                job, state, reason=_said(reason), left=_said(left), start=_said(start), nodes=_said(nodes)
            )
    return found


def read_sacct(told: str, *, submitted: Mapping[str, str]) -> dict[str, JobState]:
    """The last word on each job: of one that was requeued, sacct has a row a start, in their order."""
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
        from datetime import datetime

        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


def _is_before(one: str, other: str) -> bool:
    first, second = seconds(one), seconds(other)
    return first is not None and second is not None and first < second - EARLIER_S
