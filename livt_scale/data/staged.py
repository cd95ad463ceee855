"""Where the files of a set are read: in its folder, or in a copy that a batch job has made on the node's own disk.

    LIVT_STAGED={"/shared/train": "/scratch/livt-shards-77/train"}
    place_of(Path("/shared/train"))  ->  /scratch/livt-shards-77/train          of any other folder: that folder

The job sets the variable for its tasks and removes the copy when it ends (`livt_scale.slurm.job`). So recipe,
checkpoints and reports name the shared folder, which is still there afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from livt_scale.util.errors import UsageError
from livt_scale.util.outside import parse_json

STAGED = "LIVT_STAGED"


def staged_variable(copies: Mapping[str, str]) -> str:
    """NAME=VALUE for a process that reads each folder of `copies` in its copy."""
    return f"{STAGED}={json.dumps(copies)}"


def place_of(folder: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder in which the set `folder` is read. Raises UsageError for a variable that is no such mapping."""
    given = environ.get(STAGED)
    if not given:
        return folder
    try:
        copies = {Path(shared): Path(copy) for shared, copy in parse_json(given.encode()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{STAGED} is {given[:200]!r}, which does not name folders and their copies",
            remedy="unset it: only a batch job sets it, for its own tasks",
        ) from error
    return copies.get(folder, folder)
