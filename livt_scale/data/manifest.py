"""What lies in a folder of shards: `manifest.json`, the index of byte offsets, the keys, and the quarantine.

    train/  manifest.json          classes, counts, and each shard's bytes, samples and SHA-256; written last
            index.npy  keys.bin    one row of INDEX_DTYPE a sample; the keys one after the other in UTF-8
            train-000000.tar …     plain WebDataset tars
            quarantine.json        only after `livt shards verify --quarantine`: samples that are left out

`ShardSet.open` costs the same for a thousand samples and for a billion: it reads the manifest, asks for each file's
size and maps the index into memory. Contents are checked sample by sample when read, and as a whole by `verify`.
A sample has a number (its row of the index) and, once the quarantined ones are left out, a position.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from livt_scale.config.recipe import Data
from livt_scale.util.errors import DataError, ManifestError, ShardError
from livt_scale.util.urls import below, is_url

if TYPE_CHECKING:
    from livt_scale.data.remote.prefetch import RemoteFiles

FORMAT = "livt-shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
KEYS = "keys.bin"
QUARANTINE = "quarantine.json"

INDEX_DTYPE = np.dtype(
    [
        ("start", "<u8"),  # offset in its shard of the sample's first tar header
        ("nbytes", "<u4"),  # from there to the end of its last member, padding included
        ("data_offset", "<u4"),  # of the image's bytes, from `start`
        ("data_size", "<u4"),  # of the image, bytes
        ("label", "<i4"),
        ("crc32", "<u4"),  # zlib.crc32 of [start, start + nbytes)
        ("image_type", "u1"),  # which of manifest.image_types
        ("key_end", "<u8"),  # where its key ends in keys.bin; it begins where the key before it ends
    ]
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=255)]  # a file in this folder, never elsewhere


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileInfo(_Part):
    name: PlainName
    bytes: NonNegativeInt
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_in_the_folder(self) -> Self:
        if self.name in (".", ".."):
            raise ValueError(f"{self.name!r} is not the name of a file")
        return self


class ShardInfo(FileInfo):
    samples: NonNegativeInt


class Manifest(_Part):
    """Everything about a set but its samples. Holds no absolute path and no date: a rebuild gives the same bytes."""

    format: Literal["livt-shards"] = "livt-shards"
    version: Literal[1] = 1
    name: str
    seed: int | None  # of the shuffle when written; None: the order of tars that others wrote
    num_samples: NonNegativeInt
    image_types: list[str]  # file endings, ["png"]
    class_names: list[str]
    class_counts: list[NonNegativeInt]  # quarantined samples included
    shards: list[ShardInfo]
    index: FileInfo
    keys: FileInfo
    source: dict[str, Any]  # what it was made from

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        sums = {"class_counts": sum(self.class_counts), "shards": sum(s.samples for s in self.shards)}
        for name, total in sums.items():
            if total != self.num_samples:
                raise ValueError(f"{name} add up to {total} samples, num_samples is {self.num_samples}")
        if len(self.class_names) != len(self.class_counts):
            raise ValueError(f"{len(self.class_names)} class_names for {len(self.class_counts)} class_counts")
        if len({s.name for s in self.shards}) != len(self.shards):
            raise ValueError("two shards have one name")
        return self

    def to_bytes(self) -> bytes:
        """The file's contents, in one spelling, with a digest of themselves at the end."""
        body = self.model_dump(mode="json")
        body["digest"] = hashlib.sha256(_spelt(body)).hexdigest()
        return _spelt(body)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of `folder`. Raises ManifestError, also if a single byte of it was changed."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise _no_manifest(folder, error) from error
        damaged = "build the set again, or copy the file again from where it came"
        try:
            body = dict(json.loads(raw))
            body.pop("digest", None)
            found = (body.get("format"), body.get("version"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ManifestError(f"{path}: not a manifest of shards: {error}", remedy=damaged) from error
        if found != (FORMAT, VERSION):
            raise ManifestError(
                f"{path}: format {found[0]!r} version {found[1]!r}, this livt_scale reads {FORMAT!r} version {VERSION}",
                remedy="write the set again with this version, or use the livt_scale that wrote it",
            )
        try:
            manifest = cls.model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "manifest"
            raise ManifestError(f"{path}: {where}: {first['msg']}", remedy=damaged) from None
        if manifest.to_bytes() != raw:
            raise ManifestError(f"{path}: changed since it was written: its digest does not match", remedy=damaged)
        return manifest


class Quarantined(_Part):
    """A sample that is left out, and why."""

    number: NonNegativeInt
    key: str
    shard: str
    label: NonNegativeInt = Field(alias="class")
    reason: str


class Quarantine(_Part):
    format: Literal["livt-quarantine"] = "livt-quarantine"
    version: Literal[1] = 1
    samples: list[Quarantined]

    def to_bytes(self) -> bytes:
        return _spelt(self.model_dump(mode="json", by_alias=True))


@dataclass(frozen=True)
class ShardSet:
    """The shards of one folder, opened for reading. Make it with `ShardSet.open`; pickled, it opens itself again."""

    folder: Path  # of a set at a URL: the cache's, where its index lies under another name
    manifest: Manifest
    index: np.ndarray  # [num_samples + quarantined] of INDEX_DTYPE, mapped
    quarantine: tuple[Quarantined, ...]  # by number
    remote: RemoteFiles | None = None  # where shards are fetched from; None: they lie in `folder`

    @classmethod
    def open(cls, folder: str | Path, *, data: Data | None = None) -> Self:
        """Open `folder`, or the set at a URL as `data` says (None: by default): O(shards), whatever the samples.

        Raises ManifestError (no folder, no manifest, another version, an index of another size), ShardError (a shard
        missing or of another size) and, for a URL, RemoteError.
        """
        if isinstance(folder, str) and is_url(folder):
            from livt_scale.data.remote.prefetch import RemoteFiles  # it knows this module

            return cls._open_remote(RemoteFiles.at(folder, data))
        folder = Path(folder)
        manifest = Manifest.read(folder)
        for info in (*manifest.shards, manifest.index, manifest.keys):
            _check_size(folder, info)
        opened = cls(folder, manifest, _map_index(folder / manifest.index.name, manifest), ())
        quarantine = read_quarantine(opened)
        return cls(folder, manifest, opened.index, quarantine)

    @classmethod
    def _open_remote(cls, remote: RemoteFiles, manifest: Manifest | None = None) -> Self:
        """`manifest`: known already, where another process opened the set."""
        manifest = manifest or remote.manifest()
        for info in (manifest.index, manifest.keys):
            remote.keep(info)
        cache = remote.cache
        opened = cls(cache.folder, manifest, _map_index(cache.path(manifest.index), manifest), (), remote)
        listed = remote.quarantine()
        if listed is None:
            return opened
        quarantine = check_quarantine(opened, listed, below(remote.url, QUARANTINE))
        return cls(opened.folder, manifest, opened.index, quarantine, remote)

    def __reduce__(self) -> tuple[Any, ...]:  # a mapped array would be pickled as a copy of the whole index
        if self.remote:
            return type(self)._open_remote, (self.remote, self.manifest)
        return type(self).open, (self.folder,)

    @property
    def where(self) -> str:
        """The folder or the URL, for messages."""
        return self.remote.url if self.remote else str(self.folder)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.class_names)

    @property
    def num_samples(self) -> int:
        """Usable samples: those in the manifest less those in quarantine."""
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
        """[num_shards] Samples less those in quarantine."""
        lost = np.bincount(self.shard_of(self.quarantined), minlength=len(self.manifest.shards))
        return np.diff(self.first) - lost

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """[C] Samples of each class less those in quarantine."""
        lost = np.bincount(np.array([q.label for q in self.quarantine], dtype=np.int64), minlength=self.num_classes)
        return np.array(self.manifest.class_counts, dtype=np.int64) - lost

    @cached_property
    def digest(self) -> str:
        """SHA-256 of manifest and quarantine: with seed, epoch and batch size, all that the order depends on."""
        return hashlib.sha256(self.manifest.to_bytes() + self.quarantined.tobytes()).hexdigest()

    def usable_to_sample(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions among the usable samples, int64 [n], to sample numbers [n]. The identity without a quarantine."""
        # usable samples before the k-th quarantined one: numbers 3, 4, 9 -> 3, 3, 7; position 3 is then number 5
        before = self.quarantined - np.arange(len(self.quarantined))
        return positions + np.searchsorted(before, positions, side="right")

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] The class of each sample number."""
        return self.index["label"][samples].astype(np.int64)

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] The shard in which each sample number lies."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def impossible_rows(self, rows: np.ndarray, shard: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `rows` [n] of the index, for samples in the shards `shard` [n], cannot be.

        They lie outside their shard, their image outside the sample, or there is no such class or type. Reading by
        such a row could take any memory.
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
        """Where a shard lies. Of a set at a URL: where it would, in the cache, if it is there."""
        info = self.manifest.shards[shard]
        return self.remote.cache.path(info) if self.remote else self.folder / info.name

    def shard_name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        name = self.manifest.shards[shard].name
        return below(self.remote.url, name) if self.remote else str(self.folder / name)

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """The key of each sample number. Raises ManifestError where index or keys are damaged."""
        return [self._key(int(k)) for k in samples]

    def _key(self, sample: int) -> str:
        end = int(self.index["key_end"][sample])
        start = int(self.index["key_end"][sample - 1]) if sample else 0
        try:
            if not start <= end <= len(self._keys):
                raise ValueError(f"it would lie at {start} to {end} of {len(self._keys)} bytes")
            return bytes(self._keys[start:end]).decode()
        except ValueError as error:
            raise ManifestError(
                f"{self.where}: the key of sample {sample} cannot be read: {error}",
                remedy=f"`livt shards verify {self.where}` says what is damaged",
            ) from error

    @cached_property
    def _keys(self) -> np.ndarray:
        keys = self.manifest.keys
        path = self.remote.cache.path(keys) if self.remote else self.folder / keys.name
        if not self.manifest.keys.bytes:  # an empty file cannot be mapped
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")


@contextmanager
def plain_disk_errors(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Turn what the system says while `path` is written into one DataError that names the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise DataError(
                f"{path}: no room to write it ({error.strerror}): {needed:,} bytes needed, {free:,} free",
                remedy="free some space or choose another --out, then give the command again: finished shards are kept",
            ) from error
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}", remedy="choose a folder that you may write to"
        ) from error


def _spelt(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def _no_manifest(folder: Path, error: OSError) -> ManifestError:
    if not folder.exists():
        return ManifestError(f"there is no folder {folder}", remedy="give the folder that holds manifest.json")
    if not isinstance(error, FileNotFoundError):
        return ManifestError(f"{folder / MANIFEST} cannot be read: {error.strerror}", remedy="give a folder of shards")
    inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return ManifestError(f"{folder} holds no {MANIFEST}", remedy=f"its sets are: {', '.join(inside)}: take one")
    if any(folder.glob("*.tar")):
        return ManifestError(
            f"{folder} holds tars but no {MANIFEST}",
            remedy=f"if others wrote them, `livt shards index {folder}`; if a build was stopped, start it again",
        )
    return ManifestError(f"{folder} holds no {MANIFEST}", remedy="make the set with `livt shards build`")


def _check_size(folder: Path, info: FileInfo) -> None:
    error = ShardError if isinstance(info, ShardInfo) else ManifestError
    path = folder / info.name
    try:
        size = path.stat().st_size
    except OSError as cause:
        raise error(f"{path} is missing", remedy="copy it again, or build the set again") from cause
    if size != info.bytes:
        raise error(
            f"{path} has {size:,} bytes, the manifest says {info.bytes:,}",
            remedy="it was cut or changed: copy it again, or build the set again",
        )


def _map_index(path: Path, manifest: Manifest) -> np.ndarray:
    remedy = f"copy it again, or make it again with `livt shards index {path.parent}`"
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is parsed as Python literals: damaged, it fails in many ways
        raise ManifestError(f"{path}: not an index: {error}", remedy=remedy) from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.num_samples,):
        raise ManifestError(
            f"{path}: {index.shape} rows of {index.dtype}, the manifest wants {manifest.num_samples} of an index",
            remedy=remedy,
        )
    return index


def read_quarantine(shards: ShardSet) -> tuple[Quarantined, ...]:
    """What quarantine.json says, by number; nothing if there is none. Raises ManifestError if it is of other shards."""
    path = shards.folder / QUARANTINE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    return check_quarantine(shards, raw, str(path))


def check_quarantine(shards: ShardSet, raw: bytes, path: str) -> tuple[Quarantined, ...]:
    """What the bytes of a quarantine.json, from `path`, say of `shards`. Raises ManifestError if it is of others."""
    remedy = f"write it again with `livt shards verify {shards.where} --decode --quarantine`"
    try:
        listed = Quarantine.model_validate_json(raw, strict=True).samples
    except ValidationError as error:
        raise ManifestError(f"{path}: {error.errors(include_url=False)[0]['msg']}", remedy=remedy) from None
    numbers = [q.number for q in listed]
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ManifestError(f"{path}: its samples are not in ascending order", remedy=remedy)
    for q in listed:
        known = q.number < shards.manifest.num_samples
        if not known or (shards._key(q.number), int(shards.index["label"][q.number])) != (q.key, q.label):
            raise ManifestError(f"{path}: sample {q.number} is not {q.key!r}: made for other shards", remedy=remedy)
    return tuple(listed)
