"""Caches fetched files on this node up to a size limit, shared by all its processes.

    cache = ShardCache.of(recipe.data.cache)
    with closing_fd(cache.hold(info, fetch, wait_s=900)) as handle:      # fetched once, by the first caller
        os.pread(handle, nbytes, start)

    /tmp/livt-cache-1000/v1/  lock                      held for a moment while room is made or a name changes
                              3fa9…                     a complete file, named by its SHA-256, checked on arrival
                              77c0….104857600.part      one that is being fetched, with its final size

Every claim is an flock(2), which the kernel releases with the process: exclusive on a .part for the process that
fetches it, shared on a file for each reader. So a kill at any point leaves at most a .part that nobody holds, which the
next process takes over or removes; nothing is ever stale, and there is no shared memory. When space is needed, unused
files are removed, least recently used first; files being fetched count with their final size. Names and owner identify
the cache's files: nothing else in the folder is touched, and data sets in local folders are never cached.
Not for a network folder: the cache belongs to one node.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from livt_scale.config import recipe
from livt_scale.data.manifest import FileInfo
from livt_scale.data.remote.fetch import Cancelled
from livt_scale.util.atomic import NO_LOCKS, FileLock, LockHeld, file_lock
from livt_scale.util.errors import DataError, UsageError
from livt_scale.util.outside import in_home

GIB = 2**30
VERSION = "v1"
LOCK = "lock"
LOCK_WAIT_S = 60.0  # whoever holds the lock does so for milliseconds; a stopped process could hold it for ever
_NAME = re.compile(r"[0-9a-f]{64}(?:\.(?P<bytes>\d+)\.part)?")

Fetch = Callable[[Path], object]


@dataclass(frozen=True)
class _File:
    """One of the cache's own files; `claim`: the space it takes, partial or complete."""

    path: Path
    claim: int
    used_ns: int
    is_part: bool


@dataclass(frozen=True)
class ShardCache:
    """The files below `folder`, `limit` bytes at most. Holds nothing open: may be pickled, and used in any process."""

    folder: Path
    limit: int

    @classmethod
    def of(cls, part: recipe.Cache) -> ShardCache:
        """The cache that the recipe sets. Makes the folder. Raises UsageError if it cannot, or it is another user's."""
        folder = in_home(part.dir).absolute() if part.dir else default_folder()
        for one in (folder, folder / VERSION):
            try:
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = one.lstat()
            except OSError as error:
                raise UsageError(
                    f"{one}: the cache of shards cannot be made there: {error.strerror}",
                    remedy="set data.cache.dir, or LIVT_CACHE_DIR, to a folder on this node that you may write to",
                ) from error
            if stat.S_ISLNK(found.st_mode) and one is not folder:
                raise UsageError(f"{one} is a link: the cache's own folder cannot be", remedy="remove the link")
        if (folder / VERSION).stat().st_uid != os.getuid():
            raise UsageError(
                f"{folder}: this cache belongs to another user",
                remedy="set data.cache.dir or LIVT_CACHE_DIR to a folder that you own",
            )
        return cls(folder / VERSION, math.floor(part.limit_gib * GIB))

    def hold(self, info: FileInfo, fetch: Fetch, *, wait_s: float, cancelled: threading.Event | None = None) -> int:
        """A descriptor of the file for reading; while it is open the file stays. The caller closes it.

        If the file is not here, one process calls `fetch(path)`, which writes and checks it; the others wait, and the
        next one takes over if that one dies. Raises DataError if this takes longer than `wait_s`, or the limit is too
        small; and what `fetch` raises.
        """
        if info.bytes > self.limit:
            raise too_small(self.limit, info.bytes, f"{info.name} alone")
        try:
            return self._hold(info, fetch, wait_s=wait_s, stop=cancelled or threading.Event())
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise DataError(
                    f"{self.folder}: the cache of shards needs locks, and the file system there has no flock "
                    f"({error.strerror})",
                    remedy="set data.cache.dir, or LIVT_CACHE_DIR, to a folder on a disk of this node",
                ) from error
            raise DataError(
                f"{self.folder}: the cache of shards cannot be used for {info.name}: {error.strerror or error}",
                remedy="check the disk and the owner of the files there, or choose another data.cache.dir",
            ) from error

    def has(self, info: FileInfo) -> bool:
        """Whether the file is here now; it may be gone the next moment."""
        return (self.folder / info.sha256).is_file()

    def path(self, info: FileInfo) -> Path:
        """The path of the file; only valid while it is held."""
        return self.folder / info.sha256

    def drop(self, info: FileInfo) -> None:
        """Remove a file that is corrupt on the disk; open readers are not affected."""
        with self._locked():
            self.path(info).unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes of all files, those on their way in full."""
        return sum(file.claim for file in self._files())

    def tidy(self) -> None:
        """Remove what killed processes left on its way."""
        with self._locked():
            for file in self._files():
                if file.is_part:
                    _remove_unless_held(file.path)

    def _hold(self, info: FileInfo, fetch: Fetch, *, wait_s: float, stop: threading.Event) -> int:
        give_up, pause_s = time.monotonic() + wait_s, 0.01
        while True:
            handle = self._open(info)
            if handle is not None:
                return handle
            part = self._claim(info)
            if isinstance(part, _PartialFile):
                return self._bring(info, part, fetch)
            if time.monotonic() > give_up:
                raise self._waited(info, part, wait_s)
            if stop.wait(pause_s):
                raise Cancelled
            pause_s = min(2 * pause_s, 0.2)

    def _open(self, info: FileInfo) -> int | None:
        try:
            handle = os.open(self.folder / info.sha256, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(handle)
            if found.st_nlink and found.st_size == info.bytes:
                os.utime(handle)  # the last use
                return handle
            if found.st_nlink:
                self.drop(info)
        except BlockingIOError:  # being removed this moment
            pass
        os.close(handle)
        return None

    def _claim(self, info: FileInfo) -> _PartialFile | str | None:
        """The .part, ours to fill, with room for it; else why not: "fetched" by another, "full", None: it came."""
        path = self.folder / f"{info.sha256}.{info.bytes}.part"
        with self._locked():
            if self.has(info):
                return None
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return "fetched"
            if not os.fstat(handle).st_nlink:  # its fetch failed, and removed it, between our open and our lock
                os.close(handle)
                return "fetched"
            if self._make_room(info.bytes, apart_from=path):
                return _PartialFile(path, handle)
            path.unlink(missing_ok=True)
            os.close(handle)
            return "full"

    def _bring(self, info: FileInfo, part: _PartialFile, fetch: Fetch) -> int:
        try:
            fetch(part.path)
            os.fchmod(part.handle, 0o400)
            with self._locked():  # else it could be removed between the two locks
                part.path.rename(self.folder / info.sha256)
                fcntl.flock(part.handle, fcntl.LOCK_SH)
        except BaseException:
            part.path.unlink(missing_ok=True)
            os.close(part.handle)
            raise
        return part.handle

    def _make_room(self, needed: int, *, apart_from: Path) -> bool:
        files = [file for file in self._files() if file.path != apart_from]
        used = sum(file.claim for file in files)
        for file in sorted(files, key=lambda file: (not file.is_part, file.used_ns)):
            if file.is_part or used + needed > self.limit:  # a .part that nobody holds was left by a killed process
                used -= file.claim if _remove_unless_held(file.path) else 0
        return used + needed <= self.limit

    def _files(self) -> list[_File]:
        """The cache's own files: by name, plain, this user's."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if not name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid():
                        claim = int(name["bytes"]) if name["bytes"] else about.st_size
                        found.append(_File(Path(entry.path), claim, about.st_mtime_ns, bool(name["bytes"])))
        return found

    def _locked(self) -> FileLock:
        try:
            return file_lock(self.folder / LOCK, wait_s=LOCK_WAIT_S, mode=0o600)
        except LockHeld as error:
            raise DataError(
                f"{error.holder} has held {self.folder / LOCK} for {LOCK_WAIT_S:.0f} s",
                remedy="end it if it is stopped, or choose another cache",
            ) from None

    def _waited(self, info: FileInfo, why: str | None, wait_s: float) -> DataError:
        if why == "full":
            in_use = self.used()
            return DataError(
                f"{self.folder}: no room for {info.name} ({info.bytes:,} bytes) within {wait_s:.0f} s: "
                f"all of the {self.limit:,} bytes are in use",
                remedy=f"raise data.cache.limit_gib to at least {_gib_up(in_use + info.bytes)}",
            )
        return DataError(
            f"{self.folder}: {info.name} was not there after {wait_s:.0f} s: another process fetches it without end",
            remedy="look for a stopped process of this run on the node",
        )


@dataclass(frozen=True)
class _PartialFile:
    path: Path
    handle: int  # with an exclusive lock


def default_folder() -> Path:
    """LIVT_CACHE_DIR; else one of this user's in the temporary folder ($TMPDIR, /tmp), which is a node's own."""
    chosen = os.environ.get("LIVT_CACHE_DIR")
    return in_home(chosen).absolute() if chosen else Path(tempfile.gettempdir()) / f"livt-cache-{os.getuid()}"


def too_small(limit: int, needed: int, for_what: str) -> DataError:
    return DataError(
        f"data.cache.limit_gib is {limit / GIB:g} ({limit:,} bytes), {for_what} needs {needed:,}",
        remedy=f"set it to at least {_gib_up(needed)}",
    )


def _gib_up(num_bytes: int) -> str:
    """In GiB, rounded up to a figure that suffices."""
    digits = max(0, 3 - math.ceil(math.log10(max(num_bytes, 1) / GIB)))
    return f"{math.ceil(num_bytes / GIB * 10**digits) / 10**digits:.{digits}f}"


@contextmanager
def closing_fd(handle: int) -> Iterator[int]:
    """`handle`, closed at the end."""
    try:
        yield handle
    finally:
        os.close(handle)


def _remove_unless_held(path: Path) -> bool:
    """Remove the file if no process reads or fetches it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
