"""Files and folders that are complete or absent, also after a power cut; and the lock that lets one process write.

    write_atomic(run / "eval.json", data)              # either the old bytes or the new ones
    with new_folder(out) as temporary:                # out appears when the block ends without an error
        (temporary / "config.json").write_bytes(data)
    with file_lock(run / ".lock"):                    # LockHeld names the process that holds it
        …

The writers write beside the target under a hidden temporary name, sync the bytes, rename, and sync the folder that
holds the name (rename(2) is atomic, but durable only after the folder is synced). An error removes the temporary file.
The lock is flock(2): the kernel releases it when the process ends, however it ends, so no lock is ever stale.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from livt_scale.util.errors import DataError, LivtError

PREFIX = ".livt-writing-"  # a leftover of a killed process starts so; nothing ever reads one


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` (its folder is made); the old content stays until the new bytes are durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file, open for writing, that becomes `path` when the block ends without an error."""
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error; a folder at `path` is replaced.

    The caller decides first whether it may be. Replacing takes two renames: a process killed between them leaves the
    old folder complete, beside `path`, under a temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        for folder in (*(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            sync_folder(folder)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def plain_disk_errors(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Turn an OSError while `path` is written into a DataError with a remedy; `needed`: bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise DataError(
                f"{path}: not enough space ({error.strerror}): {needed:,} bytes needed, {free:,} free",
                remedy="free some space or choose another folder, then run the command again: finished files are kept",
            ) from error
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}", remedy="choose a folder that you can write to"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LockHeld(LivtError):
    """Another process holds the lock. `holder`: "process 4711 on node3", for the caller's own error."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{holder} holds {path}", remedy="wait for it, or end it")
        self.holder = holder


class FileLock:
    """A lock that this process holds, until the end of a `with` block."""

    def __init__(self, path: Path, handle: int, *, remove: bool) -> None:
        self._path, self._handle, self._remove = path, handle, remove

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._remove:
            self._path.unlink(missing_ok=True)
        os.close(self._handle)


def file_lock(path: Path, *, wait_s: float = 0.0, mode: int = 0o644, remove: bool = False) -> FileLock:
    """Take the lock `path`, a file in an existing folder that then names this process.

    remove: the file is deleted when the lock is released. Raises LockHeld after `wait_s`, OSError where the file
    cannot be opened.
    """
    handle = _locked(path, give_up_s=time.monotonic() + wait_s, mode=mode)
    with suppress(OSError):  # a full disk costs the name, not the lock
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return FileLock(path, handle, remove=remove)


def _locked(path: Path, *, give_up_s: float, mode: int) -> int:
    pause_s = 0.002
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        holder = "another process"
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder with `remove` may have deleted the file between our open and our lock.
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or holder
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)

        if time.monotonic() >= give_up_s:
            raise LockHeld(path, holder)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _beside(path: Path) -> Path:
    return path.parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = _beside(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
