"""The nodes that failed a job's check (slurm/pretrain.sbatch): RUN/slurm/bad-nodes, a line each.

    gpu03<tab>2026-01-31T12:00:00<tab>1234<tab>gpu 2: a product of whole numbers came out wrong

They are kept until a person removes the file: `livt submit` leaves them out where slurm.check_nodes is `exclude`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.slurm import Slurm

BAD_NODES = "slurm/bad-nodes"


@dataclass(frozen=True)
class BadNode:
    """One finding, with the job that made it."""

    name: str
    at: str
    job: str
    why: str


def read_bad_nodes(run_dir: Path) -> list[BadNode]:
    """What was found so far, the newest word on each node; a line that is none of ours is left out."""
    try:
        text = (run_dir / BAD_NODES).read_text(errors="replace")
    except OSError:
        return []
    rows = [line.split("\t", 3) for line in text.splitlines()]
    return list({row[0]: BadNode(*row) for row in rows if len(row) == 4 and re.fullmatch(r"[\w.-]+", row[0])}.values())


def excluding(slurm: Slurm, bad: list[BadNode]) -> Slurm:
    """`slurm` with the bad nodes beside those that the recipe excludes, where it asks for that."""
    if slurm.check_nodes != "exclude" or not bad:
        return slurm
    names = [*([slurm.exclude] if slurm.exclude else []), *sorted(node.name for node in bad)]
    return slurm.model_copy(update={"exclude": ",".join(names)})
