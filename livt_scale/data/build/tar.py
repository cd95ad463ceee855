"""The headers of a tar, read strictly: bounded memory, one pass, and an error for whatever is not plain.

    with path.open("rb") as file:
        for member in members(file, size):      # TarMember(name, offset, data, size), plain files alone
            …

Reads ustar, old v7, GNU long names and sizes, and PAX `path` and `size`. Links, devices, pipes, sparse files, names
that lead out of the folder or are not UTF-8, sizes beyond the file, a checksum that is wrong: each is a BadTar.

Why not `tarfile`: it takes an extended header of any size into memory, parses it in more than linear time, can be led
round in circles by a negative size (CVE-2019-20907, CVE-2024-6232, CVE-2025-8194), reads `1_0` as a number, and ends in
silence at a header that it cannot read. The tests compare the two on tars that are in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from livt_scale.util.errors import SampleError, ShardError
from livt_scale.util.outside import open_checked

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of one extended header: long names and attributes take a few KB
MAX_END_BYTES = 1 << 24  # of zeros after the last file: tar writes at most a record, which is 10 KB unless asked for
MAX_NAME_BYTES = 4096  # what Linux takes for a path
CHUNK = 1 << 20

_REGULAR = (b"0", b"\0", b"7")  # 7: contiguous, on file systems that are gone
_DIRECTORY, _PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"5", b"x", b"g", b"L", b"K"
_OTHERS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_DECIMAL = re.compile(rb"[0-9]{1,18}")


class BadTar(ValueError):
    """What is wrong, at byte `offset`. The caller knows the file's name."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(what)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class TarMember:
    """A plain file in a tar; bytes from the beginning of the tar."""

    name: str
    offset: int  # of its first header, an extended one counts
    data: int
    size: int

    @property
    def end(self) -> int:
        """After its padding."""
        return self.data + padded(self.size)


def padded(size: int) -> int:
    """`size` rounded up to a multiple of the block size."""
    return -(-size // BLOCK) * BLOCK


def members(file: BinaryIO, size: int) -> Iterator[TarMember]:
    """The plain files of the tar `file` of `size` bytes, in their order. Raises BadTar; OSError as the system does.

    The file may be read elsewhere between two members: each header is sought.
    """
    position = 0
    while (header := _block(file, position, size)) is not None:
        offset = position
        extended: dict[bytes, bytes] = {}  # of the member that follows
        while header[156:157] in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            text = _extended(file, header, offset=position, size=size)
            _take(extended, header[156:157], text, offset=position)
            position += BLOCK + padded(len(text))
            following = _block(file, position, size)
            if following is None:
                raise BadTar(position, "the tar ends after an extended header")
            header = following
        name = _name(header, extended, offset=offset)
        kind, num_bytes = header[156:157], _size(header, extended, offset=offset)
        position += BLOCK
        if position + padded(num_bytes) > size:
            raise BadTar(offset, f"{name!r} claims {num_bytes:,} bytes, the tar ends before")
        if name.startswith("/") or ".." in name.split("/"):
            raise BadTar(offset, f"the name {name!r} leads out of the folder")
        if kind == _DIRECTORY or (kind == b"\0" and name.endswith("/")):
            if num_bytes:
                raise BadTar(offset, f"the folder {name!r} claims {num_bytes:,} bytes")
            continue
        if kind not in _REGULAR:
            what = _OTHERS.get(kind, f"of the unknown type {kind!r}")
            raise BadTar(offset, f"{name!r} is {what}: shards hold plain files")
        member = TarMember(name, offset, position, num_bytes)
        yield member
        position = member.end
    _check_end(file, position)


def _block(file: BinaryIO, position: int, size: int) -> bytes | None:
    """The header at `position`; None where the zeros begin that end a tar."""
    file.seek(position)
    header = file.read(BLOCK)
    if size < BLOCK:
        raise BadTar(0, f"not a tar: it has {size:,} bytes")
    if len(header) < BLOCK:
        raise BadTar(size, "it is cut: the zeros that end a tar are missing")
    if not header.strip(b"\0"):
        return None
    unsigned = 256 + sum(header[:148]) + sum(header[156:])  # its own field counts as eight spaces
    stated = _octal(header[148:156])
    if stated != unsigned:
        large = sum(byte >= 128 for byte in header[:148] + header[156:])
        if stated != unsigned - 256 * large:  # some old programs summed signed bytes
            raise BadTar(position, "not a tar from here on: the header's checksum is wrong")
    return header


def _extended(file: BinaryIO, header: bytes, *, offset: int, size: int) -> bytes:
    num_bytes = _number(header[124:136])
    if num_bytes is None or num_bytes > MAX_HEADER_BYTES:
        claimed = "no size" if num_bytes is None else f"{num_bytes:,} bytes"
        raise BadTar(offset, f"an extended header claims {claimed}, at most {MAX_HEADER_BYTES:,} are read")
    text = file.read(num_bytes)
    if offset + BLOCK + padded(num_bytes) > size or len(text) < num_bytes:
        raise BadTar(offset, "the tar ends in an extended header")
    return text


def _take(extended: dict[bytes, bytes], kind: bytes, text: bytes, *, offset: int) -> None:
    """Put the next member's name and size from the extended header into `extended`."""
    if kind == _LONG_LINK:  # of a link, and links are refused
        return
    records = {b"path": text.split(b"\0", 1)[0]} if kind == _LONG_NAME else _pax(text, offset=offset)
    known = {key: value for key, value in records.items() if key in (b"path", b"size") or key.startswith(b"GNU.sparse")}
    if kind == _PAX_GLOBAL and known:
        raise BadTar(offset, "a global header gives one name or size to every member")
    if any(key.startswith(b"GNU.sparse") for key in known):
        raise BadTar(offset, "a sparse file: shards hold plain files")
    for key, value in known.items():
        if key in extended:
            raise BadTar(offset, f"the {key.decode()} of a member is given twice")
        if value:  # PAX: an empty value means none
            extended[key] = value


def _pax(text: bytes, *, offset: int) -> dict[bytes, bytes]:
    """Records `length key=value\\n`, the length counting itself: `20 path=some/a.png\\n`."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(text):
        if not text[position] and not text[position:].strip(b"\0"):
            break
        found = _PAX_LENGTH.match(text, position)
        end = position + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            raise BadTar(offset, "an extended header holds what is no `length key=value` line")
        key, equals, value = text[found.end() : end - 1].partition(b"=")
        if not equals:
            raise BadTar(offset, "an extended header holds what is no `length key=value` line")
        records[key] = value
        position = end
    return records


def _name(header: bytes, extended: dict[bytes, bytes], *, offset: int) -> str:
    raw = extended.get(b"path")
    if raw is None:
        raw = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix and header[257:263] == b"ustar\0":  # GNU keeps dates there
            raw = prefix + b"/" + raw
    if len(raw) > MAX_NAME_BYTES:
        raise BadTar(offset, f"a name of {len(raw):,} bytes, more than {MAX_NAME_BYTES:,}")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadTar(offset, f"the name {raw!r} is not UTF-8") from error
    if "\0" in name:
        raise BadTar(offset, f"the name {name!r} holds a NUL")
    return name


def _size(header: bytes, extended: dict[bytes, bytes], *, offset: int) -> int:
    if b"size" in extended:
        text = extended[b"size"]
        found = int(text) if _DECIMAL.fullmatch(text) else None
    else:
        found = _number(header[124:136])
    if found is None:
        raise BadTar(offset, "a header whose size is no number")
    return found


def _number(field: bytes) -> int | None:
    """Octal digits, or, for sizes from 8 GiB on, a byte 128 and the number in base 256. None: neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _check_end(file: BinaryIO, position: int) -> None:
    """From here on only zeros, and at most MAX_END_BYTES: those of a sparse file take minutes to read."""
    file.seek(position)
    while chunk := file.read(CHUNK):
        if file.tell() > position + MAX_END_BYTES:
            raise BadTar(position, f"not a tar from here on: more than {MAX_END_BYTES:,} bytes follow its last file")
        if chunk.count(0) != len(chunk):
            raise BadTar(position, "not a tar from here on: something follows the zeros that end it")


IMAGE_TYPES = ("jpeg", "jpg", "png")
_KEY_AND_TYPE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_METADATA = re.compile(r"__[^/]*__($|/)")  # what webdataset's tar_file_iterator skips
MAX_CLASSES = 1_000_000  # ImageNet-21k has 21,841; counts and names of all of them are kept in memory
MAX_SAMPLE_BYTES = (
    1 << 29
)  # a sample is read in one piece; a 67-megapixel RGB image that no codec could shrink has 200 MB
_LABEL = re.compile(rb"[ \t\r\n]*[0-9]{1,9}[ \t\r\n]*")


@dataclass(frozen=True)
class TarSample:
    """One sample in a tar; offsets in bytes from the beginning of the file."""

    key: str
    label: int
    image_type: str  # "jpg", as its name ends
    start: int  # of its first header
    nbytes: int  # to the end of its last padded member
    data_start: int  # of the image
    data_size: int


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of the tar `path` in their order.

    Raises ShardError (unreadable, truncated, or with forbidden content) and SampleError (one sample is incomplete).
    """
    try:
        with open_checked(path, "shard") as file:
            for key, group in _grouped(path, _named(members(file, path.stat().st_size))):
                yield _sample(path, file, key, group)
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error
    except BadTar as error:
        where = f"{path}, offset {error.offset}"
        raise ShardError(f"{where}: {error}", remedy="copy it again, or write it again") from error


def is_key(key: str) -> bool:
    """Whether webdataset reads `key`.jpg in a tar as the sample `key`."""
    return _key_and_type(f"{key}.jpg") == (key, "jpg")


Part = tuple[str, str, TarMember]  # key, type, place in the tar


def _named(found: Iterable[TarMember]) -> Iterator[Part]:
    """The members that webdataset reads, with key and type by its own rule."""
    for member in found:
        if named := _key_and_type(member.name):
            yield named[0], named[1].lower(), member


def _key_and_type(name: str) -> tuple[str, str] | None:
    """("a/b", "seg.png") of the member a/b.seg.png, by webdataset's rule; None: a member that it passes over.

    Written out here because importing webdataset imports torch; the tests compare the two.
    """
    found = _KEY_AND_TYPE.match(name)
    return (found[1], found[2]) if found and not _METADATA.match(name) else None


def _grouped(path: Path, parts: Iterable[Part]) -> Iterator[tuple[str, list[Part]]]:
    group: list[Part] = []
    for part in parts:
        if group and part[0] != group[0][0]:
            yield group[0][0], group
            group = []
        group.append(part)
        first = group[0][2].offset
        if part[2].end - first > MAX_SAMPLE_BYTES:
            raise SampleError(
                f"{path}, offset {first}, key {part[0]!r}: more than {MAX_SAMPLE_BYTES:,} bytes",
                remedy="a sample is one image, its label and small things beside them",
            )
    if group:
        yield group[0][0], group


def _sample(path: Path, file: BinaryIO, key: str, group: list[Part]) -> TarSample:
    start = group[0][2].offset
    where = f"{path}, offset {start}, key {key!r}"
    kinds = [kind for _, kind, _ in group]
    if len(set(kinds)) != len(kinds):
        raise SampleError(f"{where}: the key is there twice", remedy="each sample needs a unique key")
    images = [(kind, info) for _, kind, info in group if kind in IMAGE_TYPES]
    labels = [info for _, kind, info in group if kind == "cls"]
    if len(images) != 1 or not labels:
        found = ", ".join(repr(kind)[:20] for kind in kinds[:8]) + (" …" if len(kinds) > 8 else "")
        raise SampleError(
            f"{where}: a sample has one image ({', '.join(IMAGE_TYPES)}) and one cls, this one has {found}"
        )
    file.seek(labels[0].data)
    text = file.read(min(labels[0].size, 64))
    if labels[0].size > 64 or not _LABEL.fullmatch(text):
        raise SampleError(f"{where}: the label is {text[:20]!r}", remedy="cls holds the class as digits: 0, 1, 2, …")
    if int(text) >= MAX_CLASSES:
        raise SampleError(f"{where}: the label is {int(text)}, there are at most {MAX_CLASSES:,} classes")
    kind, image = images[0]
    return TarSample(key, int(text), kind, start, group[-1][2].end - start, image.data, image.size)
