"""What is recorded of a chain in RUN/slurm: the jobs that were submitted, and how each of them ended.

    RUN/slurm/chain.json     written by `livt_scale.slurm.submit`
    RUN/slurm/ends/ID        how the last start of job ID ended; absent while it runs, and if its shell was killed

    2026-11-29T19:40:00+0000 1 failed
    module load cuda failed

The batch script writes the second one when it exits, in bash alone: Python, or the module that brings it, may be what
is missing. Accounting is not needed to read it. One file per job, so that no two jobs write the same one.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from livt_scale.slurm.commands import JOB_ID, seconds
from livt_scale.slurm.processes import SLACK_S
from livt_scale.util.errors import EXIT_PREEMPTED, ClusterError
from livt_scale.util.outside import read_json, read_note

CHAIN = "slurm/chain.json"
ENDS = "slurm/ends"
MAX_WHY = 2000

# stopped: saved, to be continued; cancelled: the same, but by a person, so that nothing continues it
EndKind = Literal["done", "stopped", "cancelled", "failed"]


@dataclass(frozen=True)
class EndRecord:
    """How one start of a job ended."""

    kind: EndKind
    code: int
    why: str = ""
    at: float | None = None  # seconds since 1970


def read_chain(run_dir: Path) -> dict[str, Any] | None:
    """RUN/slurm/chain.json; None where nothing was submitted. Raises ClusterError where it cannot be read."""
    try:
        chain: dict[str, Any] = read_json(run_dir / CHAIN, "record")
        listed = isinstance(chain["jobs"], list) and isinstance(chain.get("earlier", []), list)
        if not chain["chain"] or not listed or not all(isinstance(job, dict) and "id" in job for job in chain["jobs"]):
            raise ValueError("its jobs are not what livt submit writes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{run_dir / CHAIN} cannot be read: {error}", remedy="see squeue, then remove it") from error
    return chain


def what_it_runs(chain: dict[str, Any]) -> str | None:
    """What its jobs run (`submit.what_runs`); None: it does not say."""
    code = chain.get("code")
    return code.get("runs") if isinstance(code, dict) else None


def segments_before(run_dir: Path, stage: str, segment: int) -> list[str]:
    """The ids of the segments of `stage` before number `segment`, in their order; none where they are not known."""
    with suppress(ClusterError):
        jobs = (read_chain(run_dir) or {"jobs": []})["jobs"]
        return [str(job.get("id")) for job in jobs if job.get("stage") == stage][: segment - 1]
    return []


def read_end(run_dir: Path, job: str) -> EndRecord | None:
    """The record of job `job`; None: it does not exist or cannot be read."""
    if not re.fullmatch(JOB_ID, job):
        return None
    try:
        return parse_end(read_note(run_dir / ENDS / job))
    except OSError:
        return None


def is_evaluated(run_dir: Path, *, has_val: bool, since: str) -> bool:
    """Whether the chain's last job has exported, and evaluated, the weights that fine-tuning has ended with at `since`.

    An earlier submission's result is of other weights. since: of status.json; empty: not known.
    """
    made = run_dir / "export" / ("eval.json" if has_val else "config.json")
    with suppress(OSError):
        return made.stat().st_mtime >= (seconds(since) or 0) - SLACK_S
    return False


def parse_end(text: str) -> EndRecord | None:
    """The record that the batch script wrote as `text`. One without a kind did not end as Python decided."""
    found = re.match(r"(\S+) (\d{1,3}) ?(\w*)\s*", text)
    if found is None:
        return None
    code = int(found[2])
    by_code: EndKind = "stopped" if code == EXIT_PREEMPTED else "failed"
    kind = cast(EndKind, found[3]) if found[3] in get_args(EndKind) else by_code
    return EndRecord(kind, code, " ".join(text[found.end() :].split())[:MAX_WHY], seconds(found[1]))
