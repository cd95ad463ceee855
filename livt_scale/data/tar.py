"""The one shape of tar that we write, and a reading of the tars that others wrote. Nothing is ever extracted.

    a-7.png  header 512 | data, padded to 512      one sample: neighbours that share all before the first dot of
    a-7.cls  header 512 | "3", padded to 512       their name; `cls` holds the label as ASCII digits

Written tars have no clock and no owner in them, so that equal samples give equal bytes. Reading uses tarfile's own
parser for headers, and then asks for more than it does: tarfile ends in silence at a header that it cannot read.
A path that leaves the folder, a link, a device, a sample without image or label, a key met twice: each an error.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from livt_scale.errors import SampleError, ShardError

BLOCK = 512
IMAGE_TYPES = ("jpeg", "jpg", "png")
END_OF_TAR = bytes(2 * BLOCK)
_KEY_AND_TYPE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's own rule
_LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
_MAX_NBYTES = 2**32 - 1  # of a sample: what the index can hold


@dataclass(frozen=True)
class TarSample:
    """One sample as it lies in a tar; offsets in bytes from the beginning of the file."""

    key: str
    label: int
    image_type: str  # "jpg", as its name ends
    start: int  # of its first header
    nbytes: int  # to the end of its last padded member
    data_start: int  # of the image
    data_size: int


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def sample_bytes(key: str, label: int, image: tuple[str, bytes]) -> tuple[bytes, int]:
    """One sample, (image type, image) and label, as the bytes of a tar; and where in them the image begins."""
    image_type, data = image
    return _member(f"{key}.{image_type}", data) + _member(f"{key}.cls", b"%d" % label), BLOCK


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert len(header) == BLOCK, name  # a key is short enough for one header: see sources.shard_key
    return header + data + bytes(padded(len(data)) - len(data))


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of the tar `path` in their order.

    Raises ShardError (cannot be read, is cut, holds what a shard must not) and SampleError (one sample is not whole).
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            members = _members(path, file, size)
            for key, group in _grouped(members):
                yield _sample(path, file, key, group)
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error


Member = tuple[str, str, tarfile.TarInfo]  # key, type, where it lies


def _members(path: Path, file: BinaryIO, size: int) -> Iterator[Member]:
    """The members that webdataset would take, by name; the others are looked at all the same."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                end = info.offset_data + padded(info.size)
                if info.size < 0 or end > size:
                    raise _broken(path, info.offset, f"{info.name!r} claims {info.size:,} bytes, the tar ends before")
                _check_member(path, info)
                match = _KEY_AND_TYPE.match(info.name)
                hidden = info.name.startswith("__") and info.name.endswith("__")
                if match and info.isreg() and not hidden:
                    yield match[1], match[2].lower(), info
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        # what tarfile raises on headers made to confuse it; a UnicodeError is a ValueError
        raise _broken(path, end, f"not a tar from here on: {error}") from error
    _check_end(path, file, end, size)


def _check_member(path: Path, info: tarfile.TarInfo) -> None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        raise _broken(path, info.offset, f"the name {info.name!r} leads out of the folder")
    if not (info.isreg() or info.isdir()) or info.sparse is not None:
        raise _broken(path, info.offset, f"{info.name!r} is a link, a device or a sparse file")


def _check_end(path: Path, file: BinaryIO, end: int, size: int) -> None:
    """tarfile ends where it finds no header: that must be the end of the tar, zeros and nothing else."""
    file.seek(end)
    seen = 0
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise _broken(path, end, "not a tar from here on")
        seen += len(chunk)
    if seen < BLOCK:
        raise _broken(path, size, "it is cut: the zeros that end a tar are missing")


def _broken(path: Path, offset: int, what: str) -> ShardError:
    return ShardError(f"{path}, offset {offset}: {what}", remedy="copy it again, or write it again")


def _grouped(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    group: list[Member] = []
    for member in members:
        if group and member[0] != group[0][0]:
            yield group[0][0], group
            group = []
        group.append(member)
    if group:
        yield group[0][0], group


def _sample(path: Path, file: BinaryIO, key: str, group: list[Member]) -> TarSample:
    start = group[0][2].offset
    where = f"{path}, offset {start}, key {key!r}"
    kinds = [kind for _, kind, _ in group]
    if len(set(kinds)) != len(kinds):
        raise SampleError(f"{where}: the key is there twice", remedy="each sample needs a key of its own")
    images = [(kind, info) for _, kind, info in group if kind in IMAGE_TYPES]
    labels = [info for _, kind, info in group if kind == "cls"]
    if len(images) != 1 or not labels:
        raise SampleError(
            f"{where}: a sample has one image ({', '.join(IMAGE_TYPES)}) and one cls, this one has {', '.join(kinds)}"
        )
    here = file.tell()
    file.seek(labels[0].offset_data)
    text = file.read(min(labels[0].size, 64))
    file.seek(here)
    if labels[0].size > 64 or not _LABEL.fullmatch(text):
        raise SampleError(f"{where}: the label is {text[:20]!r}", remedy="cls holds the class as digits: 0, 1, 2, …")
    kind, image = images[0]
    last = group[-1][2]
    nbytes = last.offset_data + padded(last.size) - start
    if nbytes > _MAX_NBYTES:
        raise SampleError(f"{where}: {nbytes:,} bytes, more than a sample may have ({_MAX_NBYTES:,})")
    return TarSample(key, int(text), kind, start, nbytes, image.offset_data, image.size)
