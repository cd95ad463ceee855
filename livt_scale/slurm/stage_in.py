"""Shards copied to a node's own disk before training: one copy a node, each byte checked against the manifest.

    python -m livt_scale.slurm.stage_in /scratch/livt-shards-1234 pretrain RECIPE [--set a.b=c …]

The batch job starts it once on each node, and removes the folder when it ends (`livt_scale.slurm.job`). The training
then reads the copy in place of the set (`livt_scale.data.staged`). Sets at a URL do not need this: their cache is
already on the node.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe
from livt_scale.data.manifest import MANIFEST, QUARANTINE, FileInfo, ShardManifest
from livt_scale.data.shard_set import ShardSet
from livt_scale.slurm.code_snapshot import check_running_code
from livt_scale.util.atomic import file_lock, new_file, plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, LivtError, ShardError, UsageError
from livt_scale.util.outside import open_checked, read_checked, read_note
from livt_scale.util.urls import is_url

CHUNK = 1 << 22
WAIT_S = 4 * 3600.0  # for the task that copies; srun ends the step, and so this wait, when any task fails
COMPLETE = ".complete"  # which start of a job has copied all of it


def stage_in(recipe: Recipe, target: Path, *, stage: str) -> int:
    """Copy the sets that `stage` reads to `target`/train and `target`/val; the bytes copied.

    If two nodes share the folder, one copies and the other waits for it. Files of an earlier start of the job are
    removed first. Raises DataError: no room, or a file that does not match the manifest.
    """
    with _one_at_a_time(target), plain_disk_errors(target):
        complete = target / COMPLETE
        if complete.is_file() and read_note(complete) == this_start():
            return 0
        copied = _copy_all(recipe, target, stage=stage)
        complete.write_text(this_start())
        return copied


def this_start(environ: Mapping[str, str] = os.environ) -> str:
    """A name for this start of a job, different for each restart; outside Slurm, for this process."""
    return f"{environ.get('SLURM_JOB_ID') or os.getpid()}.{environ.get('SLURM_RESTART_COUNT', '0')}"


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    with plain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(Path(f"{target}.lock"), wait_s=WAIT_S, mode=0o600)
    with lock:
        yield


def _copy_all(recipe: Recipe, target: Path, *, stage: str) -> int:
    sets = {"train": recipe.data.train}
    if stage == "finetune" and recipe.data.val and not is_url(recipe.data.val):
        sets["val"] = recipe.data.val
    shutil.rmtree(target, ignore_errors=True)
    opened = {name: ShardSet.open(place) for name, place in sets.items()}  # sizes are checked here
    needed = sum(info.bytes for shards in opened.values() for info in _files(shards.manifest))
    with plain_disk_errors(target, needed=needed):
        target.mkdir(parents=True, mode=0o700)
        free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(
            f"{target} on {socket.gethostname()} has {free:,} bytes free, and the shards take {needed:,}",
            remedy="set slurm.stage_in_dir to a larger disk, or leave slurm.stage_in out",
        )
    for name, place in sets.items():
        copy_set(Path(place), target / name, opened[name].manifest)
    return needed


def copy_set(source: Path, target: Path, manifest: ShardManifest) -> None:
    """Copy a set of shards, the manifest last. Raises ShardError for a file that does not match the manifest."""
    target.mkdir()
    for info in _files(manifest):
        digest = hashlib.sha256()
        with (
            plain_disk_errors(target / info.name, needed=info.bytes),
            open_checked(source / info.name, "shard") as file,
            new_file(target / info.name) as copy,
        ):
            while data := file.read(CHUNK):
                digest.update(data)
                copy.write(data)
            if digest.hexdigest() != info.sha256:
                raise ShardError(
                    f"{source / info.name} is not what the manifest says (SHA-256)", remedy="see livt shards verify"
                )
    if (source / QUARANTINE).exists():
        write_atomic(target / QUARANTINE, read_checked(source / QUARANTINE, "quarantine"))
    write_atomic(target / MANIFEST, read_checked(source / MANIFEST, "manifest"))


def _files(manifest: ShardManifest) -> list[FileInfo]:
    return [*manifest.shards, manifest.index, manifest.keys]


def main(words: Sequence[str]) -> None:
    """TARGET STAGE RECIPE [--set A.B=C …]: exit code 0, or 1 with one line on stderr."""
    check_running_code()
    target, stage, recipe, *rest = words
    if rest[::2] != ["--set"] * (len(rest) // 2) or len(rest) % 2:
        raise UsageError(f"only --set A.B=C may follow the recipe, not {rest}")
    started = time.monotonic()
    copied = stage_in(load_recipe(recipe, sets=rest[1::2]), Path(target), stage=stage)
    took = time.monotonic() - started
    print(f"{socket.gethostname()}: {copied / 1e9:.2f} GB of shards copied to {target} in {took:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LivtError as error:
        print(f"livt: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
