"""Checks the directory of the zip archive that `torch.save` writes, before torch reads it.

    with open_checked(path, "weights") as file:
        found = read_archive(file)         # found.pickle, found.pieces {"0": 4096, …}; None: not a zip archive

torch trusts the directory. Here each entry must be uncompressed (a deflated one can be a thousand times as long),
be inside the file without overlapping another, have a unique name, and match its CRC-32: a flipped bit in a weight
would otherwise pass unnoticed.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

MAX_ENTRIES = 200_000
MAX_PICKLE_BYTES = 2**26  # 300 KB for a ViT-H with its optimizer
CHUNK = 2**20
_END, _LOCAL = b"PK\x05\x06", b"PK\x03\x04"


@dataclass(frozen=True)
class Archive:
    pickle: bytes  # data.pkl
    pieces: dict[str, int]  # bytes of data/KEY


def read_archive(file: BinaryIO, *, check_crc: bool = True) -> Archive | None:
    """The archive in `file`; None where it is not a zip archive. Raises ValueError, which names the entry.

    check_crc: false for bytes that were hashed already.
    """
    file.seek(0)
    if file.read(4) != _LOCAL:
        return None
    _check_directory(file)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise ValueError(f"it is not a complete zip archive: {error}") from None
    _check_entries(file, entries, check_crc=check_crc)
    by_name = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "constants.pkl" in by_name:
        raise ValueError("it is a program for TorchScript, not a file of torch.save")
    if "data.pkl" not in by_name:
        raise ValueError("it has no data.pkl: torch.save did not write it")
    entry = by_name["data.pkl"]
    if entry.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {entry.file_size:,} bytes, more than {MAX_PICKLE_BYTES:,}")
    file.seek(_data_start(file, entry))
    pieces = {name.removeprefix("data/"): e.file_size for name, e in by_name.items() if name.startswith("data/")}
    return Archive(file.read(entry.file_size), pieces)


def _check_directory(file: BinaryIO) -> None:
    """The number of entries, which `zipfile` would make objects of."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 2**16))
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError("it is a zip archive that is cut: its directory is missing")
    num_bytes, begin = struct.unpack_from("<II", tail, at + 12)
    if num_bytes == 2**32 - 1 or begin == 2**32 - 1:  # more than 4 GB: the figures are in a record before this one
        number = num_bytes = _zip64_size(file, tail, at)
    number = num_bytes // 46  # the least that an entry takes
    if number > MAX_ENTRIES:
        raise ValueError(f"its directory has {num_bytes:,} bytes, enough for {number:,} entries")


def _zip64_size(file: BinaryIO, tail: bytes, at: int) -> int:
    if at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
        raise ValueError("it is a zip archive without its directory's record")
    file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
    record = file.read(56)
    if record[:4] != b"PK\x06\x06" or len(record) < 56:
        raise ValueError("it is a zip archive without its directory's record")
    return int(struct.unpack_from("<Q", record, 40)[0])


def _check_entries(file: BinaryIO, entries: list[zipfile.ZipInfo], *, check_crc: bool) -> None:
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("two of its entries have the same name")
    check_crc = check_crc and any(entry.CRC for entry in entries)  # torch can be set to write no CRCs
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename} in it is compressed or encrypted, which torch.save does not do")
        start = _data_start(file, entry)
        if entry.header_offset < end:
            raise ValueError(f"{entry.filename} overlaps another entry")
        end = start + entry.file_size
        if check_crc and _crc_of(file, start, entry.file_size) != entry.CRC:
            raise ValueError(f"{entry.filename} in it was changed since it was written (CRC-32)")


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != _LOCAL:
        raise ValueError(f"{entry.filename} is not where the directory says")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    return entry.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def _crc_of(file: BinaryIO, start: int, size: int) -> int:
    file.seek(start)
    crc = 0
    while size > 0:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            return -1  # the file ends before
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc
