"""The errors a user can meet. Each says what happened, where, and what to do about it.

LivtError                 exit code 1
├── UsageError            exit code 2: a wrong option or argument, before anything started
│   ├── RecipeError       a recipe that cannot be: field, file and line, nearest valid name
│   └── LauncherError     the launcher has started the processes in a way that cannot work
├── DataError             while shards are built, verified or read
│   ├── SourceError       the raw images or their list
│   ├── ManifestError     manifest or index missing, unreadable, or not what the shards are
│   ├── ShardError        a shard missing, truncated or changed
│   ├── SampleError       one image cannot be read: shard, offset and key
│   └── RemoteError       a file at a URL cannot be fetched: which, after how many tries and how long
├── RunError              while a run is opened or trained
│   ├── RunBusyError      another process works in this run directory
│   ├── Preempted         not a failure: a signal came, the run is saved (exit code 85)
│   ├── NonFiniteError    loss or gradient is NaN or infinite: the sample keys of the batch
│   ├── RankLostError     another rank is gone, has failed or comes no further: which, and what it said last
│   └── DivergedError     ranks hold other weights than the rest: which ranks, and the first tensor
├── CheckpointError       while a checkpoint is written or read
│   ├── SaveFailed        one save came to nothing, on all ranks; the earlier ones are as they were
│   ├── PruneFailed       it was saved, but an old one could not be removed
│   ├── CheckpointDamaged a file is missing, changed or cut: which one
│   └── CheckpointMismatch it belongs to another model or recipe: what differs, field by field
├── ClusterError          Slurm is not there, or refuses: in its own words
├── ExportError           a model cannot be written or read in a foreign layout
├── WeightsError          weights from elsewhere cannot be read, or belong to another network
└── InstallationError     the files that ship with the package are missing
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 85  # the batch script requeues on this one alone


class LivtError(Exception):
    """What happened and where (`message`), and what to do about it (`remedy`): printed on one line."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy[:1].upper()}{self.remedy[1:]}" if self.remedy else self.message


class UsageError(LivtError):
    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    pass


class LauncherError(UsageError):
    pass


class DataError(LivtError):
    pass


class SourceError(DataError):
    pass


class ManifestError(DataError):
    pass


class ShardError(DataError):
    pass


class SampleError(DataError):
    pass


class RemoteError(DataError):
    pass


class RunError(LivtError):
    pass


class RunBusyError(RunError):
    pass


class Preempted(RunError):
    exit_code = EXIT_PREEMPTED


class NonFiniteError(RunError):
    pass


class RankLostError(RunError):
    pass


class DivergedError(RunError):
    pass


class CheckpointError(LivtError):
    pass


class SaveFailed(CheckpointError):
    pass


class PruneFailed(CheckpointError):
    pass


class CheckpointDamaged(CheckpointError):
    pass


class CheckpointMismatch(CheckpointError):
    pass


class ClusterError(LivtError):
    pass


class ExportError(LivtError):
    pass


class WeightsError(LivtError):
    pass


class InstallationError(LivtError):
    pass


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: "did you mean 'epochs'?", else the list of valid names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(names)}"
