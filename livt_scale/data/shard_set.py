"""A folder of shards, or a set at a URL, opened for reading.

    shards = ShardSet.open("shards/fashion-mnist-lt/train-lt")
    shards.class_counts, shards.keys(np.array([7])), shards.labels(np.array([7]))

`ShardSet.open` costs the same for a thousand samples and for a billion: it reads the manifest, asks for the size of
each file and maps the index into memory. Each sample's bytes are checked when they are read, all of them by
`livt shards verify`. A sample has a number (its row of the index) and, once the quarantined ones are left out, a
position.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from livt_scale.config.recipe import Data
from livt_scale.data.manifest import (
    INDEX_DTYPE,
    QUARANTINE,
    FileInfo,
    Quarantine,
    Quarantined,
    ShardInfo,
    ShardManifest,
)
from livt_scale.data.remote.shards import RemoteShards
from livt_scale.data.staged import place_of
from livt_scale.util.errors import ManifestError, ShardError
from livt_scale.util.outside import first_mistake, open_checked, parse_json, read_checked
from livt_scale.util.text import first_line
from livt_scale.util.urls import below, is_url

MAX_SIZES = 1000  # shards whose sizes are compared where the samples are not read yet: a network answers in ms


@dataclass(frozen=True)
class SetFacts:
    """The facts of a set from its manifest and quarantine. Reading them costs the same for any number of samples."""

    folder: Path  # of a set at a URL: the cache's folder, where its index has another name
    manifest: ShardManifest
    quarantine: tuple[Quarantined, ...]  # by number
    remote: RemoteShards | None = None  # where shards are fetched from; None: they are in `folder`

    @classmethod
    def read(cls, location: str | Path, *, data: Data | None = None) -> SetFacts:
        """Those of the folder or URL `location`; its files must be there, index and samples are not looked at.

        Of more than MAX_SIZES shards the names are compared, and the sizes of some. Raises as `ShardSet.open`.
        """
        if isinstance(location, str) and is_url(location):
            remote = RemoteShards.at(location, data)
            manifest, listed, place = remote.manifest(), remote.quarantine(), below(location, QUARANTINE)
        else:
            remote, folder = None, place_of(Path(location))
            manifest, listed, place = ShardManifest.read(folder), _quarantine_bytes(folder), str(folder / QUARANTINE)
            _check_files(folder, manifest)
        quarantine = parse_quarantine(listed, manifest, where=str(location), path=place) if listed is not None else ()
        return SetFacts(remote.cache.folder if remote else Path(location), manifest, quarantine, remote)

    @property
    def where(self) -> str:
        """The folder or the URL, for messages."""
        return self.remote.url if self.remote else str(self.folder)

    @cached_property
    def place(self) -> Path:
        """Where the files of a local set are read: `folder`, or its copy on this node."""
        return place_of(self.folder)

    @property
    def class_names(self) -> tuple[str, ...]:
        """[C] The name of each class, in the order of their numbers."""
        return tuple(self.manifest.class_names)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.manifest.class_names)

    @property
    def num_samples(self) -> int:
        """Usable samples: those in the manifest except the quarantined ones."""
        return self.manifest.num_samples - len(self.quarantine)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """[num_shards + 1] The number of each shard's first sample, and the number of samples."""
        return np.concatenate([[0], np.cumsum([s.samples for s in self.manifest.shards])]).astype(np.int64)

    @cached_property
    def quarantined(self) -> NDArray[np.int64]:
        """[quarantined] Their sample numbers, ascending."""
        return np.array([q.number for q in self.quarantine], dtype=np.int64)

    @cached_property
    def usable_per_shard(self) -> NDArray[np.int64]:
        """[num_shards] Usable samples of each shard."""
        lost = np.bincount(self.shard_of(self.quarantined), minlength=len(self.manifest.shards))
        return np.diff(self.first) - lost

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """[C] Usable samples of each class."""
        lost = np.bincount(np.array([q.label for q in self.quarantine], dtype=np.int64), minlength=self.num_classes)
        return np.array(self.manifest.class_counts, dtype=np.int64) - lost

    @cached_property
    def digest(self) -> str:
        """SHA-256 of manifest and quarantine: with seed, epoch and batch size, all that the order depends on."""
        return hashlib.sha256(self.manifest.to_bytes() + self.quarantined.tobytes()).hexdigest()

    @cached_property
    def manifest_digest(self) -> str:
        """SHA-256 of the manifest: the same with a quarantine and without."""
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] The shard that contains each sample number."""
        return np.searchsorted(self.first, samples, side="right") - 1


@dataclass(frozen=True)
class ShardSet(SetFacts):
    """The shards of one folder, opened for reading by `ShardSet.open`. A pickle has no rows of the index."""

    index: np.ndarray = field(kw_only=True)  # [num_samples + quarantined] of INDEX_DTYPE, mapped

    @classmethod
    def open(cls, folder: str | Path, *, data: Data | None = None) -> Self:
        """Open `folder`, or the set at a URL with the settings of `data` (None: the defaults), in O(shards).

        Raises ManifestError (no folder, no manifest, another version, an index of the wrong size), ShardError (a shard
        that is missing or of the wrong size) and, for a URL, RemoteError.
        """
        if isinstance(folder, str) and is_url(folder):
            return cls._open_remote(RemoteShards.at(folder, data))
        folder = Path(folder)
        place = place_of(folder)
        manifest = ShardManifest.read(place)
        for info in (*manifest.shards, manifest.index, manifest.keys):
            _check_size(place, info)
        opened = cls._again(folder, manifest, (), None)
        return replace(opened, quarantine=read_quarantine(opened))

    @classmethod
    def _open_remote(cls, remote: RemoteShards) -> Self:
        manifest = remote.manifest()
        opened = cls._again(remote.cache.folder, manifest, (), remote)
        listed = remote.quarantine()
        if listed is None:
            return opened
        return replace(opened, quarantine=check_quarantine(opened, listed, below(remote.url, QUARANTINE)))

    @classmethod
    def _again(
        cls,
        folder: Path,
        manifest: ShardManifest,
        quarantine: tuple[Quarantined, ...],
        remote: RemoteShards | None,
    ) -> Self:
        """Map the files of a set whose manifest and quarantine are known, as in another process of the same run."""
        path = place_of(folder) / manifest.index.name
        if remote:
            for info in (manifest.index, manifest.keys):
                remote.keep(info)
            path = remote.cache.path(manifest.index)
        return cls(folder, manifest, quarantine, remote, index=map_index(path, manifest))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapped array would be pickled as a copy of the full index
        return type(self)._again, (self.folder, self.manifest, self.quarantine, self.remote)

    def usable_to_sample(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions among the usable samples, int64 [n], to sample numbers [n]. The identity without a quarantine."""
        # usable samples before the k-th quarantined one: numbers 3, 4, 9 -> 3, 3, 7; position 3 is then number 5
        before = self.quarantined - np.arange(len(self.quarantined))
        return positions + np.searchsorted(before, positions, side="right")

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] The class of each sample number."""
        return self.index["label"][samples].astype(np.int64)

    def impossible_rows(self, rows: np.ndarray, shard: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the index rows `rows` [n], for samples in the shards `shard` [n], are impossible.

        The sample is outside its shard, the image outside the sample, or the class or image type does not exist.
        Reading such a row could take any amount of memory.
        """
        room = self._shard_bytes[shard] - rows["start"]  # wraps around where start is beyond
        image_end = rows["data_offset"].astype(np.uint64) + rows["data_size"]
        outside = (rows["start"] > self._shard_bytes[shard]) | (rows["nbytes"] > room) | (image_end > rows["nbytes"])
        unknown = (rows["label"] < 0) | (rows["label"] >= self.num_classes)
        return np.flatnonzero(outside | unknown | (rows["image_type"] >= len(self.manifest.image_types)))

    @cached_property
    def _shard_bytes(self) -> NDArray[np.uint64]:
        return np.array([s.bytes for s in self.manifest.shards], dtype=np.uint64)

    def shard_path(self, shard: int) -> Path:
        """The path of a shard; of a set at a URL, its path in the cache once it has been fetched."""
        info = self.manifest.shards[shard]
        return self.remote.cache.path(info) if self.remote else self.place / info.name

    def shard_name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        name = self.manifest.shards[shard].name
        return below(self.remote.url, name) if self.remote else str(self.place / name)

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """The key of each sample number. Raises ManifestError where index or keys are damaged."""
        return [self._key(int(k)) for k in samples]

    def _key(self, sample: int) -> str:
        end = int(self.index["key_end"][sample])
        start = int(self.index["key_end"][sample - 1]) if sample else 0
        try:
            if not start <= end <= len(self._keys):
                raise ValueError(f"bytes {start} to {end} of {len(self._keys)}")
            return bytes(self._keys[start:end]).decode()
        except ValueError as error:
            raise ManifestError(
                f"{self.where}: the key of sample {sample} cannot be read: {error}",
                remedy=f"run `livt shards verify {self.where}` to find the damage",
            ) from error

    @cached_property
    def _keys(self) -> np.ndarray:
        keys = self.manifest.keys
        path = self.remote.cache.path(keys) if self.remote else self.place / keys.name
        if not self.manifest.keys.bytes:  # an empty file cannot be mapped
            return np.zeros(0, dtype=np.uint8)
        with open_checked(path, "keys") as file:
            return np.memmap(file, dtype=np.uint8, mode="r")


def _check_size(folder: Path, info: FileInfo) -> None:
    error = ShardError if isinstance(info, ShardInfo) else ManifestError
    path = folder / info.name
    try:
        found = path.stat()
    except OSError as cause:
        raise error(f"{path} is missing", remedy="copy it again, or rebuild the set") from cause
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a regular file", remedy="copy it again, or rebuild the set")
    size = found.st_size
    if size != info.bytes:
        raise error(
            f"{path} has {size:,} bytes, but the manifest says {info.bytes:,}",
            remedy="the file was truncated or changed: copy it again, or rebuild the set",
        )


def map_index(path: Path, manifest: ShardManifest) -> np.ndarray:
    """The rows of the index `path`, mapped. Raises ManifestError where they are not those of `manifest`."""
    is_built = "spec_sha256" in manifest.source  # by us, from a spec; else tars of others were indexed
    other = "remove it and build the set again" if is_built else f"recreate it with `livt shards index {path.parent}`"
    remedy = f"copy it again, or {other}"
    try:
        with open_checked(path, "index"):
            index = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is parsed as Python literals: damaged, it fails in many ways
        raise ManifestError(f"{path}: not an index: {first_line(error)}", remedy=remedy) from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.num_samples,):
        raise ManifestError(
            f"{path}: {index.shape} rows of {index.dtype}, but the manifest has {manifest.num_samples} index rows",
            remedy=remedy,
        )
    return index


def _check_files(folder: Path, manifest: ShardManifest) -> None:
    """Raise ManifestError or ShardError for a missing file, or one of another size if sizes are compared."""
    shards = manifest.shards
    step = -(-len(shards) // MAX_SIZES) or 1
    if step > 1:
        with os.scandir(folder) as entries:
            there = {entry.name for entry in entries}
        missing = next((info for info in shards if info.name not in there), None)
        if missing is not None:
            _check_size(folder, missing)
    for info in (*shards[::step], manifest.index, manifest.keys):
        _check_size(folder, info)


def read_quarantine(shards: ShardSet) -> tuple[Quarantined, ...]:
    """The samples in quarantine.json, by number; none without the file. Raises ManifestError if it does not match."""
    raw = _quarantine_bytes(shards.place)
    return () if raw is None else check_quarantine(shards, raw, str(shards.place / QUARANTINE))


def _quarantine_bytes(folder: Path) -> bytes | None:
    try:
        return read_checked(folder / QUARANTINE, "quarantine")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{folder / QUARANTINE} cannot be read: {error.strerror}") from error


def check_quarantine(shards: ShardSet, raw: bytes, path: str) -> tuple[Quarantined, ...]:
    """The samples in the bytes `raw` of the quarantine file `path`. Raises ManifestError if they do not match."""
    listed = parse_quarantine(raw, shards.manifest, where=shards.where, path=path)
    for q in listed:
        if (shards._key(q.number), int(shards.index["label"][q.number])) != (q.key, q.label):
            raise _foreign(q, path, shards.where)
    return listed


def parse_quarantine(raw: bytes, manifest: ShardManifest, *, where: str, path: str) -> tuple[Quarantined, ...]:
    """The samples in `raw`, compared with the manifest alone; `check_quarantine` compares with the index too."""
    remedy = _RECREATE.format(where)
    try:
        listed = Quarantine.model_validate(parse_json(raw)).samples
    except ValidationError as error:
        raise ManifestError(f"{path}: {first_mistake(error)}", remedy=remedy) from None
    except ValueError as error:
        raise ManifestError(f"{path}: {error}", remedy=remedy) from None
    numbers = [q.number for q in listed]
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ManifestError(f"{path}: its samples are not in ascending order", remedy=remedy)
    for q in listed:
        if q.number >= manifest.num_samples or q.label >= len(manifest.class_names):
            raise _foreign(q, path, where)
    return tuple(listed)


_RECREATE = "recreate it with `livt shards verify {} --decode --quarantine`"


def _foreign(q: Quarantined, path: str, where: str) -> ManifestError:
    return ManifestError(
        f"{path}: sample {q.number} is not {q.key!r}: made for other shards", remedy=_RECREATE.format(where)
    )
