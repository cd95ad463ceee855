"""The one shape of tar that we write, and a reading of the tars that others wrote. Nothing is ever extracted.

    a-7.png  header 512 | data, padded to 512      one sample: neighbours that share all before the first dot of
    a-7.cls  header 512 | "3", padded to 512       their name; `cls` holds the label as ASCII digits

Written tars have no clock and no owner in them, so that equal samples give equal bytes. Headers are read by
`tar_headers`, which takes plain files and nothing else; here they become samples. A sample without image or label,
with two, with a label that is no class, or larger than a sample may be: each an error that says where.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from livt_scale.data.tar_headers import BLOCK, BadTar, Member, members, padded
from livt_scale.errors import SampleError, ShardError

IMAGE_TYPES = ("jpeg", "jpg", "png")
END_OF_TAR = bytes(2 * BLOCK)
_KEY_AND_TYPE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's own rule
MOST_CLASSES = 1_000_000  # ImageNet-21k has 21,841; counts and names of all of them are kept in memory
MOST_SAMPLE_BYTES = 1 << 29  # a sample is read at once; a 67-megapixel RGB image that no codec could shrink has 200 MB
_LABEL = re.compile(rb"[ \t\r\n]*[0-9]{1,9}[ \t\r\n]*")


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


def shown(path: Path) -> str:
    """The path on one line: a name with a newline in it is quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of the tar `path` in their order.

    Raises ShardError (cannot be read, is cut, holds what a shard must not) and SampleError (one sample is not whole).
    """
    try:
        with path.open("rb") as file:
            for key, group in _grouped(path, _named(members(file, path.stat().st_size))):
                yield _sample(path, file, key, group)
    except OSError as error:
        raise ShardError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    except BadTar as error:
        where = f"{shown(path)}, offset {error.offset}"
        raise ShardError(f"{where}: {error}", remedy="copy it again, or write it again") from error


Part = tuple[str, str, Member]  # key, type, where it lies


def _named(found: Iterable[Member]) -> Iterator[Part]:
    """The members that webdataset would take, by name."""
    for member in found:
        match = _KEY_AND_TYPE.match(member.name)
        if match and not (member.name.startswith("__") and member.name.endswith("__")):
            yield match[1], match[2].lower(), member


def _grouped(path: Path, parts: Iterable[Part]) -> Iterator[tuple[str, list[Part]]]:
    group: list[Part] = []
    for part in parts:
        if group and part[0] != group[0][0]:
            yield group[0][0], group
            group = []
        group.append(part)
        first = group[0][2].offset
        if part[2].end - first > MOST_SAMPLE_BYTES:
            raise SampleError(
                f"{shown(path)}, offset {first}, key {part[0]!r}: more than {MOST_SAMPLE_BYTES:,} bytes",
                remedy="a sample is one image, its label and small things beside them",
            )
    if group:
        yield group[0][0], group


def _sample(path: Path, file: BinaryIO, key: str, group: list[Part]) -> TarSample:
    start = group[0][2].offset
    where = f"{shown(path)}, offset {start}, key {key!r}"
    kinds = [kind for _, kind, _ in group]
    if len(set(kinds)) != len(kinds):
        raise SampleError(f"{where}: the key is there twice", remedy="each sample needs a key of its own")
    images = [(kind, info) for _, kind, info in group if kind in IMAGE_TYPES]
    labels = [info for _, kind, info in group if kind == "cls"]
    if len(images) != 1 or not labels:
        told = ", ".join(repr(kind)[:20] for kind in kinds[:8]) + (" …" if len(kinds) > 8 else "")
        raise SampleError(
            f"{where}: a sample has one image ({', '.join(IMAGE_TYPES)}) and one cls, this one has {told}"
        )
    file.seek(labels[0].data)
    text = file.read(min(labels[0].size, 64))
    if labels[0].size > 64 or not _LABEL.fullmatch(text):
        raise SampleError(f"{where}: the label is {text[:20]!r}", remedy="cls holds the class as digits: 0, 1, 2, …")
    if int(text) >= MOST_CLASSES:
        raise SampleError(f"{where}: the label is {int(text)}, there are at most {MOST_CLASSES:,} classes")
    kind, image = images[0]
    return TarSample(key, int(text), kind, start, group[-1][2].end - start, image.data, image.size)
