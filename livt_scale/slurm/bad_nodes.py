"""The nodes that failed a job's check: RUN/slurm/bad-nodes, one line each; and their exclusion from jobs that wait.

    gpu03<tab>2026-01-31T12:00:00<tab>1234<tab>gpu 2: a product of whole numbers came out wrong

They are kept until a person removes the file: `livt submit` excludes them where slurm.check_nodes is `exclude`.
"""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.slurm import Slurm
from livt_scale.slurm import commands
from livt_scale.util.errors import UsageError
from livt_scale.util.host_list import expand
from livt_scale.util.outside import read_checked, read_note

BAD_NODES = "slurm/bad-nodes"


@dataclass(frozen=True)
class BadNode:
    """One finding, with the job that made it."""

    name: str
    at: str
    job: str
    why: str


def read_bad_nodes(run_dir: Path) -> list[BadNode]:
    """What was found so far, the newest finding of each node; damaged lines are skipped."""
    try:
        text = read_checked(run_dir / BAD_NODES, "status").decode(errors="replace")
    except OSError:
        return []
    rows = [line.split("\t", 3) for line in text.splitlines()]
    return list({row[0]: BadNode(*row) for row in rows if len(row) == 4 and re.fullmatch(r"[\w.-]+", row[0])}.values())


def excluding(slurm: Slurm, bad: list[BadNode]) -> Slurm:
    """`slurm` with the bad nodes added to those that the recipe excludes, if check_nodes is `exclude`."""
    if slurm.check_nodes != "exclude" or not bad:
        return slurm
    names = [*([slurm.exclude] if slurm.exclude else []), *sorted(node.name for node in bad)]
    return slurm.model_copy(update={"exclude": ",".join(names)})


@dataclass(frozen=True)
class Answers:
    """What the nodes of a job answered to its check. started: on at least one of them it has begun."""

    nodes: list[str]
    bad: list[BadNode]
    started: bool


def read_answers(folder: Path, node_list: str, *, job: str, check_min: int) -> Answers:
    """By what each node has written to folder/NODE: "ok", or what is wrong; and before that to folder/NODE.started.

    No nodes if `node_list` is not a host list.
    """
    nodes: list[str] = []
    with suppress(UsageError):
        nodes = list(expand(node_list))
    bad = []
    for node in nodes:
        try:
            answer = read_note(folder / node)
        except OSError:
            answer = f"no answer from its check, which has {check_min} min; see above"
        why = "; ".join(answer.split("\n")).strip("; ")
        if why != "ok":
            bad.append(BadNode(node, time.strftime("%Y-%m-%dT%H:%M:%S"), job, why))
    return Answers(nodes, bad, started=folder.is_dir() and any(folder.iterdir()))


def append(run_dir: Path, bad: Sequence[BadNode]) -> None:
    with (run_dir / BAD_NODES).open("a") as file:
        file.writelines(f"{node.name}\t{node.at}\t{node.job}\t{node.why}\n" for node in bad)


def without(run_dir: Path, excluded: str) -> str:
    """All nodes that are not to be used, as `sbatch --exclude` takes them. excluded: those of the submission."""
    names = {node.name for node in read_bad_nodes(run_dir)} | ({excluded} if excluded else set())
    return ",".join(sorted(names))


def exclude(job: str, nodes: str) -> bool:
    """Change a job that waits; False where Slurm refuses."""
    return not commands.query("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}").problem


def exclude_from_waiting_jobs(job: str, nodes: str, *, element: str) -> bool:
    """Change the waiting jobs of the chain that `job` belongs to: they carry the same comment.

    element: of an array, the number of this run: the other runs of the array have found other nodes bad.
    """
    comments, problem, _ = commands.query("squeue", "--noheader", f"--jobs={job}", "--format=%k")
    chain = comments.strip().split("\n")[0]
    if chain in ("", "(null)"):
        return not problem
    mine = ("--noheader", "--array", f"--user={getpass.getuser()}", "--states=PENDING", "--format=%i|%k")
    rows, problem, _ = commands.query("squeue", *mine)
    waiting = [row.split("|", 1)[0].strip() for row in rows.splitlines() if row.partition("|")[2].strip() == chain]
    own = [each for each in waiting if not element or each.endswith(f"_{element}")]
    return not problem and all(exclude(each, nodes) for each in own)
