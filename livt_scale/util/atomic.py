"""Files and folders that are complete or absent, also after a power cut; and the lock that lets one process write.

    write_atomic(run / "eval.json", data)              # either the old bytes or the new ones
    with new_folder(out) as temporary:                # out appears when the block ends without an error
        (temporary / "config.json").write_bytes(data)
    with file_lock(run / ".lock"):                    # LockHeld names the process that holds it
        …

The writers write beside the target under a hidden temporary name, sync the bytes, rename, and sync the folder that
holds the name (rename(2) is atomic, but durable only after the folder is synced). An error removes the temporary file.
The lock is flock(2): the kernel releases it when the process ends, however it ends, so no lock is ever stale. Where the
file system has none, LIVT_LOCK=file chooses a lock that does without (`livt_scale.util.held_file`).

What is written gets the mode that the umask says, also from a library that writes through a private temporary file.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from livt_scale.util import held_file
from livt_scale.util.errors import DataError, LivtError, UsageError
from livt_scale.util.log import ANNOUNCE_AFTER_S, EVERY_RANK
from livt_scale.util.outside import check_regular

_log = logging.getLogger(__name__)

PREFIX = ".livt-writing-"  # a leftover of a killed process starts so; nothing ever reads one
PRIVATE = 0o600  # what mkstemp and its like give a file, whatever the umask
HELD = ".held"  # the ending of a lock file of LIVT_LOCK=file
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what flock answers where it is missing


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
            mode = os.fstat(file.fileno()).st_mode  # as the umask says
            yield file
            file.flush()
        _publish(temporary, mode=mode)
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
    mode = temporary.stat().st_mode & 0o666  # of a file, by the umask
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _publish(file, mode=mode)
        for folder in (*(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            sync_folder(folder)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _publish(file: Path, *, mode: int) -> None:
    """Sync `file`, and give it `mode` where a library has made it for its owner alone (safetensors does)."""
    with file.open("rb") as opened:
        if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) == PRIVATE:
            os.fchmod(opened.fileno(), stat.S_IMODE(mode))
        os.fsync(opened.fileno())


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
    """Another process holds a lock. `holder`: "process 4711 on node3", for the caller's own error.

    Occurs: two processes would write to the same place at a time.
    What to do: wait for that process, or end it. A leftover of `LIVT_LOCK=file` is named, to be removed by hand.
    """

    def __init__(self, path: Path, holder: str) -> None:
        leftover = f"; if it has ended, remove {path}" if path.suffix == HELD else ""
        super().__init__(f"{holder} holds {path}", remedy=f"wait for it, or end it{leftover}")
        self.holder = holder


class LocksMissing(LivtError):
    """The file system has no locks.

    Occurs: a run directory, a build or a cache is on a file system without flock, as Lustre can be mounted.
    What to do: choose a folder on another file system, or set `LIVT_LOCK=file` in all processes (docs/environment.md).
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be locked: the file system there has no flock ({error.strerror})",
            remedy="choose a folder on another file system, or set LIVT_LOCK=file in all processes "
            "(docs/environment.md, File systems without locks)",
        )


class FileLock:
    """A lock that this process holds, until the end of a `with` block. `handle` None: the file itself is the lock."""

    def __init__(self, path: Path, handle: int | None, *, remove: bool) -> None:
        self._path, self._handle, self._remove = path, handle, remove

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._remove:
            self._path.unlink(missing_ok=True)
        if self._handle is not None:
            os.close(self._handle)


def file_lock(path: Path, *, wait_s: float = 0.0, mode: int = 0o644, remove: bool = False) -> FileLock:
    """Take the lock `path`, a file in an existing folder that then names this process.

    remove: the file is deleted when the lock is released. Raises LockHeld after `wait_s`, LocksMissing where the file
    system has none, OSError where the file cannot be opened.
    """
    held = _lock_kind() == "file"
    if held:
        path = path.with_name(path.name + HELD)
    began, pause_s, announced = time.monotonic(), 0.002, False
    while True:
        holder: int | str | None = held_file.take(path) if held else _flock(path, mode=mode)
        if not isinstance(holder, str):
            return FileLock(path, holder, remove=remove or held)
        waited_s = time.monotonic() - began
        if waited_s >= wait_s:
            raise LockHeld(path, holder)
        if waited_s > ANNOUNCE_AFTER_S and not announced:
            announced = True
            _log.info("waiting for %s, held by %s, up to %g s", path, holder, wait_s, extra=EVERY_RANK)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock `path`; None: nobody, or it cannot be seen. Nothing is written, and no lock is kept."""
    if _lock_kind() == "file":
        return held_file.holder(path.with_name(path.name + HELD))
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _try_flock(handle, path)
    except OSError:
        return None
    finally:
        os.close(handle)


def lock_works(folder: Path) -> bool:
    """Whether files in `folder`, which exists, can be locked. Raises OSError where nothing can be written there."""
    path = _beside(folder / "lock")
    try:
        with file_lock(path, remove=True):
            return True
    except LocksMissing:
        path.unlink(missing_ok=True)
        return False


def _lock_kind() -> str:
    kind = os.environ.get("LIVT_LOCK", "flock")
    if kind not in ("flock", "file"):
        raise UsageError(f"LIVT_LOCK is {kind!r}", remedy="set it to flock or file, or leave it unset")
    return kind


def _flock(path: Path, *, mode: int) -> int | str:
    """The descriptor of the locked file; else who holds it."""
    # O_NONBLOCK: a named pipe in its place is refused, instead of being waited for
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    try:
        check_regular(handle, path)
        holder = _try_flock(handle, path)
        if holder is None:
            with suppress(OSError):  # a full disk costs the name, not the lock
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return handle
    except OSError as error:
        os.close(handle)
        if error.errno in NO_LOCKS:
            raise LocksMissing(path, error) from error
        raise
    os.close(handle)
    return holder


def _try_flock(handle: int, path: Path) -> str | None:
    """None: locked; else who holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A holder with `remove` may have deleted the file between our open and our lock.
        return None if os.fstat(handle).st_ino == path.stat().st_ino else "another process"
    except BlockingIOError:
        return os.read(handle, 200).decode(errors="replace").strip() or "another process"
    except FileNotFoundError:
        return "another process"


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
