"""Manifest, index and keys beside tars that others wrote, which stay as they are: `livt shards index`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from livt_scale.data.build.scan import Progress
from livt_scale.data.build.sources import text_of
from livt_scale.data.build.writer import Shard, publish, scan_shard
from livt_scale.data.manifest import MANIFEST, ShardManifest
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, ManifestError, SampleError, SourceError, UsageError
from livt_scale.util.outside import real_path
from livt_scale.util.process_pool import in_processes, usable_cores
from livt_scale.util.text import escaped


def index_tars(
    folder: str | Path,
    *,
    class_names: list[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ShardSet:
    """Make manifest, index and keys for the tars in `folder`, which stay as they are.

    Raises ShardError and SampleError (shard, offset, key) for what cannot be a shard, DataError for a folder that was
    built from a spec.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() and "spec_sha256" in ShardManifest.read(folder).source:
        raise DataError(f"{folder} was built from a spec and has its manifest", remedy="there is nothing to do")
    paths = _tars(folder)
    shards: dict[int, Shard] = {}
    num_bytes = 0
    for number, shard in in_processes(scan_shard, paths, workers=workers or usable_cores(), num_jobs=len(paths)):
        shards[number] = shard
        num_bytes += shard.info.bytes
        if progress:
            progress(folder.name, len(shards), len(paths), num_bytes)
    ordered = [shards[k] for k in range(len(paths))]
    labels = np.concatenate([s.rows["label"] for s in ordered]).astype(np.int64)
    names = class_names or [str(c) for c in range(int(labels.max(initial=-1)) + 1)]
    _check_indexed(folder, ordered, num_classes=len(names))
    publish(
        folder,
        ordered,
        name=real_path(folder).name,
        seed=None,
        class_names=names,
        class_counts=[int(n) for n in np.bincount(labels, minlength=len(names))],
        source={"indexed": True},
    )
    return ShardSet.open(folder)


def _tars(folder: Path) -> list[Path]:
    remedy = "give the folder that holds the tars"
    try:
        paths = sorted(p for p in folder.iterdir() if p.name.endswith(".tar") and p.is_file())
    except OSError as error:
        raise ManifestError(f"{folder}: {error.strerror}", remedy=remedy) from error
    if not paths:
        raise ManifestError(f"{folder} holds no .tar", remedy=remedy)
    return paths


def _check_indexed(folder: Path, shards: list[Shard], *, num_classes: int) -> None:
    """No key twice in the folder, and no label outside the classes."""
    seen: dict[bytes, str] = {}
    for shard in shards:
        start = 0
        for row in shard.rows:
            key = shard.keys[start : int(row["key_end"])]
            start = int(row["key_end"])
            where = f"{escaped(folder / shard.info.name)}, offset {row['start']}, key {key.decode()!r}"
            if key in seen:
                raise SampleError(
                    f"{where}: the key is there twice, also in {seen[key]}", remedy="each sample needs a unique key"
                )
            if row["label"] >= num_classes:
                raise SampleError(f"{where}: the label {row['label']} is outside the {num_classes} classes")
            seen[key] = shard.info.name
    if not seen:
        raise SampleError(f"{folder}: there is no sample in its tars", remedy="a sample is key.jpg|png + key.cls")


def class_names_in(path: Path) -> list[str]:
    """The names in a text file, one per line, stripped. Raises UsageError for a blank line or a duplicate."""
    remedy = "give a file with one class name a line"
    try:
        names = [line.strip() for line in text_of(path, "class names", remedy=remedy).rstrip().splitlines()]
    except SourceError as error:
        raise UsageError(error.message, remedy=error.remedy) from error
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        where = f"{escaped(path)}, line {number}"
        if not name:
            raise UsageError(f"{where} is blank", remedy=remedy)
        if seen.setdefault(name, number) != number:
            raise UsageError(f"{where}: {name!r} is on line {seen[name]} already", remedy="give each class its name")
    return names
