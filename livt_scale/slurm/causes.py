"""Why a job is ended, by what the controller reports about it (`commands.show_job`): pure functions of those facts.

    facts = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "0", …}
    was_cancelled(facts, restarts=0)      True: by hand, and not by a time limit, a lost node or a preemption

restarts: how often Slurm had restarted the job when this start of it began (SLURM_RESTART_COUNT).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from livt_scale.slurm.commands import seconds

RESUMED_S = 120.0  # in which ranks find that they have lost one another, and end


def was_preempted(facts: Mapping[str, str]) -> bool:
    """Whether Slurm has recorded a preemption. It signals the tasks of the job, and not always its batch shell."""
    return facts.get("PreemptTime", "")[:1].isdigit()


def was_requeued(facts: Mapping[str, str], *, restarts: int) -> bool:
    """Whether Slurm has put this job back into the queue already: it counts that as a restart immediately."""
    counted = facts.get("Restarts", "")
    return counted.isdecimal() and int(counted) > restarts


def cause_outside(facts: Mapping[str, str], *, restarts: int) -> str:
    """What Slurm reports that ends tasks through no fault of theirs; empty: nothing.

    Where a node is lost, the ranks on the others lose their connections and fail, but srun waits for the node until the
    controller takes it for down. By then Slurm has put the job back, or ended it where it may not be requeued. Where a
    job was suspended for longer than a collective may wait, that ends as soon as the job is resumed.
    """
    if facts.get("Reason") == "NodeDown" and facts.get("JobState") in ("COMPLETING", "NODE_FAIL"):
        return "a node of this job is down"
    if was_requeued(facts, restarts=restarts):
        return "this job is back in the queue"
    resumed = seconds(facts.get("SuspendTime", ""))  # of the last suspension or resumption
    if resumed is not None and 0 <= time.time() - resumed <= RESUMED_S:
        return f"this job was resumed at {facts['SuspendTime']}"
    return ""


def was_cancelled(facts: Mapping[str, str], *, restarts: int) -> bool:
    """Whether this job was cancelled.

    Until the last task has ended, Slurm calls a job COMPLETING, whatever ended it. But it counts a requeue as a restart
    immediately, and names a time limit, a lost node and a preemption.
    """
    if facts.get("JobState") == "CANCELLED":
        return True
    ended = (facts.get("JobState"), facts.get("Reason"), facts.get("Restarts"))
    return not was_preempted(facts) and ended == ("COMPLETING", "None", str(restarts))
