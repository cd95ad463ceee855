"""Labelled images as people have them, all seen as one thing: a `Source` with labels, keys and image bytes.

    image folder   root/CLASS/**/*.jpg                    classes: the folders, by name
    list file      "path label" lines, paths below root   as ImageNet-LT and Places-LT publish
    IDX            images and labels, .gz or not          as MNIST and Fashion-MNIST publish; they become grey PNGs
    tars           WebDataset tars below root             key.jpg|jpeg|png + key.cls

Opening a source reads names and labels, not images, so errors in them come before a shard is written.
Image bytes are passed on as they are, under the type that they are and not the one that their name claims.
A source is a small picklable value once `part` has cut it down to the images that one process reads.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import re
import stat
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from livt_scale.data.build.tar import MAX_CLASSES, MAX_SAMPLE_BYTES, TarSample, is_key, read_tar, shown
from livt_scale.util.errors import SourceError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
OTHER_IMAGE_ENDINGS = (".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic", ".ppm")
MAX_KEY_BYTES = 94  # with ".jpeg" or ".cls" it fits the 100 bytes of a tar header's name
_MAX_IDX_BYTES = 1 << 31  # it is kept in memory; EMNIST, the largest known, has 640 MB
_MISSING_SHOWN = 3  # files that a complaint names
_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]")
Indices = NDArray[np.int64]


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


S = TypeVar("S", bound=Source)


@dataclass(frozen=True)
class FileSource(Source):
    """Images in files: of a folder or of a list."""

    root: Path
    paths: tuple[str, ...]  # below root

    def key(self, i: int) -> str:
        folder, slash, name = self.paths[i].rpartition("/")
        return shard_key(folder + slash + (name.rpartition(".")[0] or name))

    def image(self, i: int) -> tuple[str, bytes]:
        path = self.root / self.paths[i]
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_SAMPLE_BYTES:  # a pipe would never end
                raise SourceError(f"{path}: no file of at most {MAX_SAMPLE_BYTES:,} bytes", remedy="take it away")
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(
                f"{path}: the image cannot be read: {error.strerror}", remedy="put it back, or take it off the list"
            ) from error
        return _image_type(data, str(path)), data

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], paths=tuple(self.paths[i] for i in indices))


@dataclass(frozen=True)
class IdxSource(Source):
    """Grey images of one size in one file of the IDX format, labels in another."""

    images: Path
    numbers: Indices  # of the images, in the file

    def key(self, i: int) -> str:
        return f"{self.name}-{self.numbers[i]:06d}"

    def image(self, i: int) -> tuple[str, bytes]:
        png = io.BytesIO()
        Image.fromarray(_read_idx(self.images)[self.numbers[i]]).save(png, "png", optimize=True)
        return "png", png.getvalue()

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])


@dataclass(frozen=True)
class TarSource(Source):
    """Images in WebDataset tars. The keys stay as they are, as far as they fit one tar header."""

    tars: tuple[Path, ...]
    samples: tuple[tuple[int, TarSample], ...] = field(repr=False)  # number of the tar, place in it

    def key(self, i: int) -> str:
        key = self.samples[i][1].key
        return key if len(key.encode()) <= MAX_KEY_BYTES else shard_key(key)

    def image(self, i: int) -> tuple[str, bytes]:
        number, sample = self.samples[i]
        try:
            with self.tars[number].open("rb") as file:
                file.seek(sample.data_start)
                data = file.read(sample.data_size)
        except OSError as error:
            raise SourceError(f"{self.tars[number]} cannot be read: {error.strerror}") from error
        return _image_type(data, f"{shown(self.tars[number])}, offset {sample.start}, key {sample.key!r}"), data

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], samples=tuple(self.samples[i] for i in indices))


def open_folder(name: str, root: Path, *, class_names: tuple[str, ...] | None = None) -> FileSource:
    """root/CLASS/**/image. Without `class_names`, the classes are the folders in the order of their names."""
    folders = sorted(e.name for e in _listed(root) if e.is_dir() and not e.name.startswith("."))
    if not folders:
        raise SourceError(f"{root} holds no folders", remedy="a folder source has one folder a class, images in it")
    unknown = sorted(set(folders) - set(class_names or folders))
    if unknown:
        raise SourceError(f"{root / unknown[0]} is no class of class_names", remedy="add it there, or move it away")
    classes = class_names or tuple(folders)
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = _images_below(root, folder) if folder in folders else []
        paths += found
        labels += [label] * len(found)
    return checked(FileSource(name, classes, np.array(labels, dtype=np.int64), root, tuple(paths)))


def open_list(name: str, root: Path, *, list_file: Path, class_names: tuple[str, ...] | None = None) -> FileSource:
    """Lines `path label`; the path is below `root` and may hold spaces. Each image must be there."""
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_text(list_file).split("\n"), start=1):
        if not line.strip():
            continue
        path, label = _list_line(line.rstrip("\r"), f"{list_file}, line {number}")
        paths.append(path)
        labels.append(label)
    source = FileSource(name, _names(class_names, labels), np.array(labels, dtype=np.int64), root, tuple(paths))
    check_all_there(source)
    return checked(source)


def open_idx(name: str, images: Path, *, labels: Path, class_names: tuple[str, ...] | None = None) -> IdxSource:
    """IDX images [n, height, width] and labels [n], unsigned bytes, gzipped or not."""
    pixels, targets = _read_idx(images), _read_idx(labels)
    if pixels.ndim != 3 or targets.ndim != 1 or len(pixels) != len(targets):
        raise SourceError(
            f"{images} has the shape {list(pixels.shape)} and {labels} {list(targets.shape)}",
            remedy="give images [n, height, width] and as many labels [n]",
        )
    wide = targets.astype(np.int64)
    return checked(IdxSource(name, _names(class_names, wide), wide, images, np.arange(len(wide), dtype=np.int64)))


def open_tars(name: str, root: Path, *, class_names: tuple[str, ...] | None = None) -> TarSource:
    """Every *.tar in `root`, by name. Raises ShardError and SampleError for what is wrong in them."""
    tars = tuple(sorted(root / e.name for e in _listed(root) if e.name.endswith(".tar") and e.is_file()))
    if not tars:
        raise SourceError(f"{root} holds no .tar", remedy="give the folder that holds them")
    samples = tuple((number, sample) for number, tar in enumerate(tars) for sample in read_tar(tar))
    labels = np.array([sample.label for _, sample in samples], dtype=np.int64)
    return checked(TarSource(name, _names(class_names, labels), labels, tars, samples))


def shard_key(name: str) -> str:
    """`name` as a key: letters, digits, _ - and /; anything else as %hex; what is too long ends in its hash.

    "n01/a b.v2" -> "n01/a%20b%2Ev2". Different names give different keys.
    """
    key = _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in os.fsencode(found[0])), name)
    if len(key) <= MAX_KEY_BYTES:
        return key
    mark = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f"{key[: MAX_KEY_BYTES - len(mark) - 1]}~{mark}"  # no other key holds a ~


def checked(source: S) -> S:
    """What every source must be: labels within the classes, no class without an image, no key twice."""
    num_classes = len(source.class_names)
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(outside):
        i = int(outside[0])
        raise SourceError(
            f"source {source.name}: {source.key(i)} has the label {source.label(i)}, "
            f"outside the {num_classes} classes 0 to {num_classes - 1}",
            remedy="correct the label, or give a name for each class in class_names",
        )
    counts = np.bincount(source.labels, minlength=num_classes)
    empty = np.flatnonzero(counts == 0)
    if len(empty) or not num_classes:
        which = f"class {empty[0]} ({source.class_names[empty[0]]!r}) has no image" if len(empty) else "no images"
        raise SourceError(f"source {source.name}: {which}", remedy="give it images, or leave the class out")
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
                remedy="each image needs a unique path, also without its ending",
            )
    return source


def _names(class_names: tuple[str, ...] | None, labels: list[int] | NDArray[np.int64]) -> tuple[str, ...]:
    if class_names is not None:
        return class_names
    largest = int(max(labels, default=-1))
    if largest >= MAX_CLASSES:
        raise SourceError(f"a label is {largest}, there are at most {MAX_CLASSES:,} classes")
    return tuple(str(c) for c in range(largest + 1))


def _image_type(data: bytes, where: str) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    raise SourceError(f"{where}: neither a JPEG nor a PNG image", remedy="convert it, or leave it out")


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}", remedy="give the folder that holds the data") from error


def _images_below(root: Path, folder: str) -> list[str]:
    """Paths below root of all images in root/folder, at any depth, by name. A folder may be a link, those in it not."""
    found: list[str] = []
    open_folders = [folder]
    while open_folders:
        here = open_folders.pop()
        for entry in _listed(root / here):
            ending = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                open_folders.append(f"{here}/{entry.name}")
            elif ending in IMAGE_ENDINGS:
                found.append(f"{here}/{entry.name}")
            elif ending in OTHER_IMAGE_ENDINGS:
                raise SourceError(f"{entry.path}: not a JPEG or PNG image", remedy="convert it, or move it away")
    return sorted(found)


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


def check_all_there(source: FileSource) -> None:
    """Each path of a list is a file: asked folder by folder, since asking for each of a million is slow on a server.

    Raises SourceError with the first missing ones, and how many there are.
    """
    inside: dict[str, set[str]] = {}
    missing: list[str] = []
    for path in source.paths:
        folder, _, name = path.rpartition("/")
        if folder not in inside:
            try:
                inside[folder] = {e.name for e in _listed(source.root / folder)}
            except SourceError:
                inside[folder] = set()
        if name not in inside[folder]:
            missing.append(path)
    if missing:
        first = ", ".join(shown(source.root / path) for path in missing[:_MISSING_SHOWN])
        all_of_them = f" and {len(missing) - _MISSING_SHOWN:,} more" if len(missing) > _MISSING_SHOWN else ""
        raise SourceError(
            f"source {source.name}: of {len(source):,} images {len(missing):,} are missing: "
            f"there is no image {first}{all_of_them}",
            remedy="put them there, or give the right root (--source NAME=FOLDER)",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "not text in UTF-8"
        raise SourceError(f"{path} cannot be read: {said}", remedy="give a list file of `path label` lines") from error


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file, kept between calls for as long as the file is the same."""
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}", remedy="install or copy the data set, or give its folder: --source NAME=FOLDER"
        ) from error
    return _parse_idx(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _parse_idx(path: Path, _mtime_ns: int, _size: int) -> NDArray[np.uint8]:
    """The array in an IDX file: two zero bytes, type 8 (unsigned byte), number of dims, dims as big-endian u4, data."""
    remedy = "get it again from where it came"
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_IDX_BYTES + 1)  # a gigabyte of zeros takes a megabyte
        if len(data) > _MAX_IDX_BYTES:
            raise SourceError(f"{path}: more than {_MAX_IDX_BYTES:,} bytes", remedy="make a folder of images of it")
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be read: {error}", remedy=remedy) from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise SourceError(f"{path} is not an IDX file of unsigned bytes", remedy=remedy)
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=data[3], offset=4))
    begin, size = 4 + 4 * data[3], int(np.prod([int(n) for n in shape], dtype=object))
    if len(data) - begin != size:
        raise SourceError(
            f"{path}: {len(data) - begin:,} bytes of data, its header {shape} says {size:,}", remedy=remedy
        )
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
