"""Shards copied to a node's own disk before training: one copy a node, each byte checked against the manifest.

    python -m livt_scale.cluster.stage_in /scratch/livt-shards-1234 pretrain RECIPE [--set a.b=c …]

What the batch script starts once on each node (slurm/pretrain.sbatch); it takes the folder away when the job ends. The
training then reads the copy in place. Sets at a URL have no need of this: their cache is on the node already.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from livt_scale.data.manifest import MANIFEST, QUARANTINE, FileInfo, Manifest, ShardSet, plain_disk_errors
from livt_scale.durable import new_file
from livt_scale.errors import DataError, LivtError, ShardError, UsageError
from livt_scale.location import is_url
from livt_scale.recipe import Recipe
from livt_scale.recipe_file import load_recipe

CHUNK = 1 << 22


def stage_in(recipe: Recipe, target: Path, *, stage: str) -> int:
    """Copy the sets that `stage` reads to `target`/train and `target`/val; the bytes copied.

    What an earlier start of the same job left in `target` is taken away first. Raises DataError: no room, or a file
    that is not what the manifest says.
    """
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


def copy_set(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy a set of shards, the manifest last. Raises ShardError for a file that is not what the manifest says."""
    target.mkdir()
    for info in _files(manifest):
        digest = hashlib.sha256()
        with (
            plain_disk_errors(target / info.name, needed=info.bytes),
            (source / info.name).open("rb") as file,
            new_file(target / info.name) as copy,
        ):
            while data := file.read(CHUNK):
                digest.update(data)
                copy.write(data)
            if digest.hexdigest() != info.sha256:
                raise ShardError(
                    f"{source / info.name} is not what the manifest says (SHA-256)", remedy="see livt shards verify"
                )
    for name in (QUARANTINE, MANIFEST):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _files(manifest: Manifest) -> list[FileInfo]:
    return [*manifest.shards, manifest.index, manifest.keys]


def main(words: Sequence[str]) -> None:
    """TARGET STAGE RECIPE [--set A.B=C …]: exit code 0, or 1 with one line on stderr."""
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
