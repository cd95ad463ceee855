"""Files and folders that appear under their name only when they are whole, and stay there after a power cut.

    write_atomic(run / "eval.json", data)              # either the old bytes or the new ones, never a half
    with new_folder(out) as temporary:                # out appears when the block ends without an error
        (temporary / "config.json").write_bytes(data)

Both write beside the target under a hidden temporary name, sync the bytes, rename, and sync the folder that holds
the name (rename(2) is atomic, but durable only after the folder is synced). An error takes the temporary away.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from livt_scale.util.errors import DataError

PREFIX = ".livt-writing-"  # a leftover of a killed process starts so; nothing ever reads one


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` (its folder is made); what stood there before stays until the new bytes are safe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file, open for writing, that becomes `path` when the block ends well."""
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
    """A temporary folder that becomes `path` when the block ends well; a folder at `path` is replaced.

    Whether what stands at `path` may go is the caller's to decide before. Replacing takes two renames: a process
    killed between them leaves the old folder whole, beside `path`, under a temporary name.
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
