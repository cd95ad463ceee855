"""Slurm's reasons why a job waits, in words.

    reason_in_words("Resources")                  "the nodes that it needs are busy"
    reason_in_words("QOSMaxJobsPerUserLimit")     "a limit of its QOS is reached"
    reason_in_words("SomethingNew")               "": Slurm's own word is shown in any case

The words are those of `man squeue`, JOB REASON CODES (22.05 and 24.05); some have details after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "Resources": "the nodes that it needs are busy",
    "Priority": "jobs of higher priority are before it",
    "Dependency": "it starts when the job before it has ended",
    "BeginTime": "its time to start has not come; Slurm pauses before it starts a requeued job",
    "Cleaning": "Slurm still cleans up after its last start",
    "JobArrayTaskLimit": "as many runs of its array as are allowed run already",
    "Licenses": "it waits for a license",
    "Reservation": "its reservation has not begun",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs now",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows; it can never start so",
    "PartitionTimeLimit": "it asks for more time than its partition allows; it can never start so",
    "BadConstraints": "no node has what it asks for; it can never start so",
    "JobHeldUser": "its user holds it",
    "JobHeldAdmin": "an administrator holds it",
    "JobLaunchFailure": "it could not be launched",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "AccountNotAllowed": "its account may not use this partition",
    "QOSNotAllowed": "its QOS may not be used here",
    "launch": "it could not be launched, and is held",  # "launch failed requeued held"
    "None": "Slurm has not looked at it yet",
}
LIMITS = (
    (r"QOS(Max|Grp|Min|Usage|Time|Resource)\w*", "a limit of its QOS is reached"),
    (r"Assoc(Max|Grp|ation)\w*|Max\w*PerAccount", "a limit of its account is reached"),
)
HELD = frozenset({"JobHeldUser", "JobHeldAdmin", "launch"})


def first_word(reason: str) -> str:
    """Slurm's name for the reason, without the details that may follow."""
    return re.split(r"[,\s()]", reason.strip("( "), maxsplit=1)[0]


def reason_in_words(reason: str) -> str:
    """For a person; empty: Slurm's name for it is all that is known."""
    word = first_word(reason)
    if word in REASONS:
        return REASONS[word]
    return next((words for pattern, words in LIMITS if re.fullmatch(pattern, word)), "")
