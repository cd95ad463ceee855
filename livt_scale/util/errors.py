"""The errors a user can meet. Each says what happened, where, and what to do about it.

The docstring of each class has one sentence, when it occurs and what to do. `python scripts/errors_page.py` makes
docs/errors.md of them, with the tree. A class elsewhere that derives from one of these belongs to the tree too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from livt_scale.util.names import SHOWN_BESIDE_A_GUESS, closest, listed
from livt_scale.util.text import escaped

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 85  # the batch script requeues on this one alone
MAX_CHARS = 4000  # of a line: a name can have a million


class LivtError(Exception):
    """What happened and where (`message`), and what to do about it (`remedy`): printed on one line.

    Occurs: this is the class that all others derive from; a program that calls the package catches it.
    What to do: what `remedy` says.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str | Sequence[str], *, remedy: str = "") -> None:
        # A newline in one message comes from a name; several messages, one line each, are a list.
        lines = [message] if isinstance(message, str) else message
        self.message = "\n".join(_bounded(line) for line in lines)
        self.remedy = _bounded(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy[:1].upper()}{self.remedy[1:]}" if self.remedy else self.message


class UsageError(LivtError):
    """A wrong option, argument or environment variable.

    Occurs: a command is started with something that it cannot do. Nothing has been written, submitted or allocated by
    then.
    What to do: correct what the message names; it has the valid names or values. `--help` lists a command's options.
    """

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe that cannot be.

    Occurs: a recipe has an unknown field, an impossible value, or values that contradict each other, in a file or in
    `--set`.
    What to do: go to the file and line that the message names. `livt recipe show RECIPE` prints what a recipe
    resolves to.
    """


class LauncherError(UsageError):
    """The launcher has started the processes in a way that cannot work.

    Occurs: `accelerate launch` starts one process where several were asked for. The launcher is ended by SIGTERM: its
    exit code is 143.
    What to do: start the processes as the message says, or by torchrun.
    """


class DataError(LivtError):
    """Images, shards or their lists are not what they should be.

    Occurs: shards are built, verified or read; also for a full disk and for what no class below covers.
    What to do: the message names the file or the class and what is needed. `livt shards verify DIR` checks every byte
    of a set.
    """


class SourceError(DataError):
    """The raw images, or the list of them, cannot be used.

    Occurs: `livt shards build` reads a source: a folder, a list, annotations, class counts.
    What to do: correct the file that is named, or leave it out, and run the command again: finished shards are kept.
    """


class UnusableImage(SourceError):
    """One raw image cannot become a sample. `reason`: one of few, by which such images are counted.

    Occurs: `livt shards build` looks at the images of a source, or an image changes while shards are written.
    What to do: repair or remove the image, or leave it out with `--skip-bad`.
    """

    def __init__(self, message: str, *, reason: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason


class ManifestError(DataError):
    """A manifest, index, list of keys or quarantine is missing, unreadable, or not what the shards are.

    Occurs: a set of shards is opened.
    What to do: copy the set again, or recreate the file by the command in the message.
    """


class ShardError(DataError):
    """A shard is missing, truncated or changed.

    Occurs: a set is opened (size) or a sample is read (checksum).
    What to do: copy that shard again. `livt shards verify DIR` finds all that differ.
    """


class SampleError(DataError):
    """One image cannot be read.

    Occurs: training or evaluation reaches an image whose bytes changed or that does not decode. Shard, offset and key
    are named.
    What to do: `livt shards verify DIR --decode --quarantine` lists such samples, which are left out from then on.
    """


class RemoteError(DataError):
    """A file at a URL cannot be fetched.

    Occurs: shards are read from a server: after all tries, within the deadline, or at the first try where another one
    would not help.
    What to do: check the URL, the credentials and the server as the message says, then run the command again: it
    resumes.
    """


class RunError(LivtError):
    """A run cannot be opened or cannot continue.

    Occurs: a run directory is opened, or a process of a run fails in a way that no other class covers.
    What to do: see what the message names; the logs of the other ranks say more where a rank is named.
    """


class RunBusyError(RunError):
    """Another process works in this run directory.

    Occurs: a run is started a second time while the first start is alive.
    What to do: wait for that process, end it, or set another `run_dir`.
    """


class Preempted(RunError):
    """Not a failure: the run was asked to stop, and is saved.

    Occurs: SIGTERM, SIGUSR2, SIGUSR1 or Ctrl-C arrives, or the time limit of the job is near. The exit code is 85.
    What to do: start the same command again: it resumes. Batch scripts of `livt submit` do so by themselves.
    """

    exit_code = EXIT_PREEMPTED


class NonFiniteError(RunError):
    """The loss or its gradient is NaN or infinite, or spikes, more often than `faults` allows.

    Occurs: a step gives such a value and the policy of `faults` is to stop. The keys of the batch are named.
    What to do: look at those samples, lower `base_lr`, set `clip_grad`, or change `faults` (docs/checkpoints.md).
    """


class RankLostError(RunError):
    """Another rank is gone, has failed, or makes no progress.

    Occurs: a rank dies or hangs; the others end within a bound (docs/checkpoints.md), naming it and what it reported
    last.
    What to do: see the log of that rank, then start again: the run resumes from its newest checkpoint.
    """


class DivergedError(RunError):
    """Ranks hold other weights than the rest.

    Occurs: the comparison of replicas (`faults.digest_every_steps`) finds a difference. The ranks and the first
    tensor are named.
    What to do: exclude the node of those ranks, whose memory or GPU may be faulty, and resume.
    """


class CheckpointError(LivtError):
    """A checkpoint cannot be written or read.

    Occurs: a checkpoint is saved, loaded, listed or converted, for a reason that no other class covers.
    What to do: see the reason in the message; `livt ckpt ls RUN` shows which checkpoints are complete.
    """


class SaveFailed(CheckpointError):
    """One save failed, on all ranks.

    Occurs: a checkpoint cannot be written, such as on a full disk. The earlier checkpoints are as they were.
    What to do: free some space, or repair the file system; the run may already have continued and saved again.
    """


class PruneFailed(CheckpointError):
    """A checkpoint was saved, but an old one could not be removed.

    Occurs: the rights or the file system do not allow its removal.
    What to do: remove the old checkpoint by hand, or correct the rights of its folder.
    """


class CheckpointDamaged(CheckpointError):
    """A file of a checkpoint is missing, truncated, changed, or was refused.

    Occurs: a checkpoint or a file of weights is read and its bytes are not those that were written, or would have to
    be executed.
    What to do: remove that checkpoint to continue from the one before it; take a file from elsewhere from its source
    again.
    """


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another model, stage or recipe.

    Occurs: a run resumes with a recipe that differs in fields that decide what is learnt. Each is named with both
    values.
    What to do: set the fields back, choose another `run_dir`, or pass `--allow FIELD` where the message offers it.
    """


class ClusterError(LivtError):
    """Slurm is not there, does not answer, or refuses.

    Occurs: `livt submit`, `status` or `cancel` calls a command of Slurm. Its own words are quoted.
    What to do: correct what Slurm names, such as account, partition or limits; `--dry-run` shows what would be
    submitted.
    """


class ExportError(LivtError):
    """A model cannot be written or read in the layout of other code.

    Occurs: `livt export` writes or a command reads an export that is incomplete, changed, or in the way of something
    else.
    What to do: choose another `--out`, or export the run again.
    """


class WeightsError(LivtError):
    """Weights from elsewhere cannot be read, or belong to another network.

    Occurs: `livt import`, or a run that starts from weights, reads a file with other names, shapes or values than the
    model takes.
    What to do: take another file, or set the fields of the model that the message names (docs/weights.md).
    """


class InstallationError(LivtError):
    """The files that ship with the package are missing.

    Occurs: a shipped recipe, set, script or profile is looked up in an incomplete installation.
    What to do: install the package again, or restore the files by `git checkout`.
    """


def _bounded(line: str) -> str:
    line = escaped(line)
    return line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]} …"


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a wrong name: "did you mean 'vit_b'? Valid names: …"; without a likely one, the valid names alone."""
    names = sorted(names)
    valid = f"alid names: {', '.join(names)}"
    guesses = closest(name, names)
    if not guesses:
        return f"v{valid}"
    guess = f"did you mean {listed(guesses)}?"
    return f"{guess} V{valid}" if len(guesses) < len(names) <= SHOWN_BESIDE_A_GUESS else guess
