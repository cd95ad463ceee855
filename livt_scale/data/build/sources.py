"""Labelled images in their usual layouts behind one interface: a `Source` with labels, keys and image bytes.

    image folder   root/CLASS/**/image                    classes: the folders, by name (folder.py)
    list file      "path label" lines, paths below root   as ImageNet-LT and Places-LT publish
    tars           WebDataset tars below root             key.jpg|jpeg|png + key.cls
    other formats  idx.py, cifar.py, inaturalist.py

Opening a source reads names and labels, not images, so errors in them come before a shard is written. Images are
checked by scan.py and brought into the form of shards by stored.py; what decides is their contents, not their name.
A source is a small picklable value once `part` has cut it down to the images that one process reads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from livt_scale.data.build.stored import stored
from livt_scale.data.build.tar import MAX_CLASSES, MAX_SAMPLE_BYTES, TarSample, is_key, read_tar
from livt_scale.util.errors import SourceError, UnusableImage
from livt_scale.util.outside import Kind, RefusedFile, open_checked, read_checked
from livt_scale.util.text import escaped

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
OTHER_IMAGE_ENDINGS = (".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic", ".pbm", ".pgm", ".pnm", ".ppm")
MAX_KEY_BYTES = 94  # with ".jpeg" or ".cls" it fits the 100 bytes of a tar header's name
_MISSING_SHOWN = 3  # files that a complaint names
_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]")
Indices = NDArray[np.int64]
Stamps = NDArray[np.int64]
LeftOut = tuple[str, str]  # path below the root, reason


@dataclass(frozen=True)
class Source(ABC):
    """Labelled images, numbered from 0."""

    name: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    @abstractmethod
    def key(self, i: int) -> str:
        """The name of image i in shards: unique in this source, the same whenever it is opened."""

    @abstractmethod
    def image(self, i: int) -> tuple[str, bytes]:
        """Image i as ("jpg" or "png", its bytes). Raises SourceError."""

    @abstractmethod
    def part(self, indices: Indices) -> Self:
        """The images `indices` alone, numbered from 0 again."""

    made_from_arrays: ClassVar[bool] = False  # by us, so that there is no image file to check

    def place(self, i: int) -> str:
        """Where image i is, for people: its path below the root, or else its key. Unique in this source."""
        return self.key(i)

    def raw(self, i: int) -> bytes:
        """The bytes that decide image i, before any conversion. Raises SourceError."""
        return self.image(i)[1]

    def stamps(self) -> Stamps | None:
        """[n, 2] Size (bytes) and mtime (ns) of the file that each image is in, −1 where it cannot be asked.

        None: unknown; whether an image has changed then shows only by reading it.
        """
        return None


S = TypeVar("S", bound=Source)


@dataclass(frozen=True)
class FileSource(Source):
    """Images in files: of a folder or of a list."""

    root: Path
    paths: tuple[str, ...]  # below root
    same_stem: frozenset[str] = frozenset()  # those that differ from another by their ending alone: it is in their key
    unusable: tuple[LeftOut, ...] = ()  # images that the folder holds and that no class can have
    ignored: tuple[LeftOut, ...] = ()  # files that are not taken for images

    def key(self, i: int) -> str:
        path = self.paths[i]
        return shard_key(path if path in self.same_stem else stem(path))

    def image(self, i: int) -> tuple[str, bytes]:
        return _stored(self.raw(i), escaped(self.root / self.paths[i]))

    def part(self, indices: Indices) -> Self:
        paths = tuple(self.paths[i] for i in indices)
        same_stem = self.same_stem and self.same_stem.intersection(paths)
        return replace(self, labels=self.labels[indices], paths=paths, same_stem=same_stem, unusable=(), ignored=())

    def place(self, i: int) -> str:
        return self.paths[i]

    def raw(self, i: int) -> bytes:
        path = self.root / self.paths[i]
        remedy = "put it back, or take it off the list"
        try:
            return read_checked(path, "image", max_bytes=MAX_SAMPLE_BYTES)
        except RefusedFile as error:
            reason = f"more than {MAX_SAMPLE_BYTES:,} bytes" if error.errno == errno.EFBIG else "not a regular file"
            raise UnusableImage(f"{escaped(path)}: {error.strerror}", reason=reason) from error
        except FileNotFoundError as error:
            reason = "a link to nothing" if path.is_symlink() else "missing"
            raise UnusableImage(f"there is no image {escaped(path)}", reason=reason, remedy=remedy) from error
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            raise UnusableImage(f"{escaped(path)}: the image {reason}", reason=reason, remedy=remedy) from error

    def stamps(self) -> Stamps | None:
        return stamps_of(self.root / path for path in self.paths)


@dataclass(frozen=True)
class TarSource(Source):
    """Images in WebDataset tars. The keys stay as they are, as far as they fit one tar header."""

    tars: tuple[Path, ...]
    samples: tuple[tuple[int, TarSample], ...] = field(repr=False)  # number of the tar, place in it

    def key(self, i: int) -> str:
        key = self.samples[i][1].key
        return key if len(key.encode()) <= MAX_KEY_BYTES else shard_key(key)

    def image(self, i: int) -> tuple[str, bytes]:
        return _stored(self.raw(i), self.place(i))

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], samples=tuple(self.samples[i] for i in indices))

    def place(self, i: int) -> str:
        number, sample = self.samples[i]
        return f"{self.tars[number].name}, offset {sample.start}, key {sample.key!r}"

    def raw(self, i: int) -> bytes:
        number, sample = self.samples[i]
        try:
            with open_checked(self.tars[number], "shard") as file:
                file.seek(sample.data_start)
                return file.read(sample.data_size)
        except OSError as error:
            raise SourceError(f"{escaped(self.tars[number])} cannot be read: {error.strerror}") from error

    def stamps(self) -> Stamps | None:
        return stamps_of(self.tars)[[number for number, _ in self.samples]]


def open_list(name: str, root: Path, *, list_file: Path, class_names: tuple[str, ...] | None = None) -> FileSource:
    """Lines `path label`; the path is below `root` and may hold spaces. Each image must be there."""
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(
        text_of(list_file, "list", remedy="give a list file of `path label` lines").split("\n"), 1
    ):
        if not line.strip():
            continue
        path, label = _list_line(line, f"{list_file}, line {number}")
        paths.append(path)
        labels.append(label)
    return check_all_there(file_source(name, numbered_names(class_names, labels), labels, root, paths))


def file_source(
    name: str,
    class_names: tuple[str, ...],
    labels: Sequence[int] | NDArray[np.int64],
    root: Path,
    paths: Sequence[str],
    *,
    unusable: Sequence[LeftOut] = (),
    ignored: Sequence[LeftOut] = (),
) -> FileSource:
    """The images `paths` [n] below `root`, each of the class labels[i]. Raises SourceError."""
    return checked(
        FileSource(
            name,
            class_names,
            np.array(labels, dtype=np.int64),
            root,
            tuple(paths),
            same_stem=sharing_stem(paths),
            unusable=tuple(unusable),
            ignored=tuple(ignored),
        )
    )


def open_tars(name: str, root: Path, *, class_names: tuple[str, ...] | None = None) -> TarSource:
    """Every *.tar in `root`, by name. Raises ShardError and SampleError for what is wrong in them."""
    tars = tuple(sorted(root / e.name for e in listed(root) if e.name.endswith(".tar") and e.is_file()))
    if not tars:
        raise SourceError(f"{root} holds no .tar", remedy="give the folder that holds them")
    samples = tuple((number, sample) for number, tar in enumerate(tars) for sample in read_tar(tar))
    labels = np.array([sample.label for _, sample in samples], dtype=np.int64)
    return checked(TarSource(name, numbered_names(class_names, labels), labels, tars, samples))


def shard_key(name: str) -> str:
    """`name` as a key: letters, digits, _ - and /; anything else as %hex; what is too long ends in its hash.

    "n01/a b.v2" -> "n01/a%20b%2Ev2". Different names give different keys.
    """
    key = _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in os.fsencode(found[0])), name)
    if len(key) <= MAX_KEY_BYTES:
        return key
    mark = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f"{key[: MAX_KEY_BYTES - len(mark) - 1]}~{mark}"  # no other key holds a ~


def stem(path: str) -> str:
    """`path` without its ending: a/b.v2.png -> a/b.v2."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def sharing_stem(paths: Sequence[str]) -> frozenset[str]:
    """Those of `paths` that are alike without their ending: a.jpg beside a.png. A path that is there twice is not."""
    counts = Counter(stem(path) for path in set(paths))
    several = {name for name, count in counts.items() if count > 1}
    return frozenset(path for path in paths if stem(path) in several) if several else frozenset()


def stamps_of(files: Iterable[Path]) -> Stamps:
    """[n, 2] Size (bytes) and mtime (ns) of each file, −1 where it cannot be asked."""
    return np.array([_stamp(file) for file in files], dtype=np.int64).reshape(-1, 2)


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def checked(source: S) -> S:
    """What every source must be: labels within the classes, an image, no key twice.

    A class may have no image here: whether a set can do without it depends on the set (builder.py).
    """
    num_classes = len(source.class_names)
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(outside):
        i = int(outside[0])
        raise SourceError(
            f"source {source.name}: {source.key(i)} has the label {source.label(i)}, "
            f"outside the {num_classes} classes 0 to {num_classes - 1}",
            remedy="correct the label, or give a name for each class in class_names",
        )
    if not len(source):
        raise SourceError(f"source {source.name}: no images", remedy="give the folder or the list that has them")
    seen: dict[str, int] = {}
    for i in range(len(source)):
        key = source.key(i)
        if not is_key(key) or len(key.encode()) > MAX_KEY_BYTES:
            raise SourceError(
                f"source {source.name}: {key!r} cannot be the key of a sample",
                remedy=f"a key has at most {MAX_KEY_BYTES} bytes, no dot in its last part and no folder __X__",
            )
        if seen.setdefault(key, i) != i:
            raise SourceError(
                f"source {source.name}: the key {key!r} is there twice (images {seen[key]} and {i})",
                remedy="list each image once",
            )
    return source


def numbered_names(class_names: tuple[str, ...] | None, labels: list[int] | NDArray[np.int64]) -> tuple[str, ...]:
    if class_names is not None:
        return class_names
    largest = int(max(labels, default=-1))
    if largest >= MAX_CLASSES:
        raise SourceError(f"a label is {largest}, there are at most {MAX_CLASSES:,} classes")
    return tuple(str(c) for c in range(largest + 1))


def _stored(data: bytes, where: str) -> tuple[str, bytes]:
    try:
        return stored(data)
    except UnusableImage as error:
        raise UnusableImage(f"{where}: {error.message}", reason=error.reason, remedy=error.remedy) from error


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder`. Raises SourceError."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}", remedy="give the folder that holds the data") from error


def _list_line(line: str, where: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*\S)\s+([0-9]{1,9})\s*", line)
    if not found:
        raise SourceError(f"{where}: {line[:100]!r} is not `path label`", remedy="write a path, a space and a number")
    return below_root(found[1], where), int(found[2])


def below_root(path: str, where: str) -> str:
    """`path` of a list or JSON file, in its plainest form. Raises SourceError: it leads out of root, or is no name."""
    if path.startswith("/") or ".." in path.split("/"):
        raise SourceError(f"{where}: {path[:100]!r} is not below the root folder", remedy="give paths relative to root")
    if "\0" in path or not _is_encodable(path):  # JSON can spell half a character, "\\ud800"
        raise SourceError(f"{where}: {path[:100]!r} cannot be the name of a file", remedy="correct it")
    return posixpath.normpath(path)


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def check_all_there(source: FileSource) -> FileSource:
    """Check that each path of a list is a file, folder by folder: a million single look-ups are slow on a file server.

    Raises SourceError with the first missing ones, and how many there are.
    """
    inside: dict[str, set[str]] = {}
    missing: list[str] = []
    for path in source.paths:
        folder, _, name = path.rpartition("/")
        if folder not in inside:
            try:
                inside[folder] = {e.name for e in listed(source.root / folder)}
            except SourceError:
                inside[folder] = set()
        if name not in inside[folder]:
            missing.append(path)
    if missing:
        first = ", ".join(escaped(source.root / path) for path in missing[:_MISSING_SHOWN])
        all_of_them = f" and {len(missing) - _MISSING_SHOWN:,} more" if len(missing) > _MISSING_SHOWN else ""
        raise SourceError(
            f"source {source.name}: of {len(source):,} images {len(missing):,} are missing: "
            f"there is no image {first}{all_of_them}",
            remedy="put them there, or name the folder that their paths begin in",
        )
    return source


def text_of(path: Path, kind: Kind, *, remedy: str) -> str:
    """The text file `path` in UTF-8, with or without a byte order mark, lines ended by \\n. Raises SourceError."""
    try:
        text = read_checked(path, kind).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not text in UTF-8"
        raise SourceError(f"{escaped(path)} cannot be read: {what}", remedy=remedy) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
