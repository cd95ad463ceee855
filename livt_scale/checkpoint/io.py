"""Writes, syncs and hashes files in one pass, and keeps the error of a full disk.

Hashing what is written, rather than what is read back, needs no second pass, and detects changes on the way to disk.
Why not `livt_scale.util.atomic`: there one process fills the temporary folder, here all ranks do.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from livt_scale.util.outside import sha256_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HashedFile:
    """A new file opened for writing that knows its bytes and SHA-256; `error` keeps the first failed write.

    torch's zip writer hides the OSError of a full disk behind a RuntimeError about positions, so we keep our own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.error: OSError | None = None
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(data)
        self.bytes += written
        return written

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_synced(path: Path, data: bytes) -> tuple[int, str]:
    """Write a new file and sync it; its bytes and SHA-256."""
    file = HashedFile(path)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    finally:
        file.close()
    return file.bytes, file.sha256


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sha256_of_all(paths: Iterable[Path]) -> list[str | OSError]:
    """The SHA-256 of each file, four at a time (hashing leaves the interpreter lock alone); an OSError in its place."""

    def one(path: Path) -> str | OSError:
        try:
            return sha256_of(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(4, thread_name_prefix="sha256") as pool:
        return list(pool.map(one, paths))


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write in `folder`'s file system."""
    return shutil.disk_usage(folder).free


def readable(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes / 2**10:,.1f} KiB"
