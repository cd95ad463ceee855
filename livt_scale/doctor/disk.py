"""Measures how fast a folder's disk writes and reads: the speeds that checkpoints and shards will get there.

One file is written in incompressible blocks, synced, dropped from the page cache where the system permits, and read
back; then small files are written, synced and renamed, as manifests and heartbeats are. All of this is bounded in
bytes and seconds, and uses one temporary folder, which is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK = 2**20
MAX_BYTES = 2**28
SMALL_FILES = 20
LEAVE_FREE = 2**30  # a disk with less is not written to


def measure(folder: Path, *, seconds: float) -> dict[str, Any]:
    """`write_mb_s` (with sync), `read_mb_s`, `small_file_s`, `free_gib`, `bytes`. OSError where it cannot be written.

    Half of `seconds` goes to the large file at most, a quarter each to reading and to the small ones.
    """
    free = shutil.disk_usage(folder).free
    if free < LEAVE_FREE:
        raise OSError(f"{free / 2**20:.0f} MiB are free, which is too few to measure with")
    with tempfile.TemporaryDirectory(prefix=".livt-doctor-", dir=folder) as name:
        large = Path(name) / "large"
        num_bytes, write_s = _write(large, seconds=seconds / 2)
        return {
            "folder": str(folder),
            "bytes": num_bytes,
            "write_mb_s": num_bytes / write_s / 1e6,
            "read_mb_s": _read_mb_s(large, seconds=seconds / 4),
            "small_file_s": _small_file_s(Path(name), seconds=seconds / 4),
            "free_gib": free / 2**30,
        }


def _write(path: Path, *, seconds: float) -> tuple[int, float]:
    """(bytes, seconds), sync included; as many blocks as the time allows."""
    block, written, begun = bytearray(os.urandom(BLOCK)), 0, time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < MAX_BYTES and time.perf_counter() - begun < seconds:
            block[:8] = written.to_bytes(8, "little")  # no two alike
            file.write(block)
            written += BLOCK
            if written % (16 * BLOCK) == 0:
                os.fdatasync(file.fileno())  # what waits in memory counts too, and ends in time
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written, time.perf_counter() - begun


def _read_mb_s(path: Path, *, seconds: float) -> float:
    """Raises OSError where what comes back is not what was written."""
    read, begun = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while (block := file.read(BLOCK)) and time.perf_counter() - begun < seconds:
            if int.from_bytes(block[:8], "little") != read:
                raise OSError(f"{path}: what is read at byte {read} is not what was written there")
            read += len(block)
    return read / (time.perf_counter() - begun) / 1e6


def _small_file_s(folder: Path, *, seconds: float) -> float:
    begun, files = time.perf_counter(), 0
    while files < SMALL_FILES and (not files or time.perf_counter() - begun < seconds):
        temporary = folder / f"tmp-{files}"
        with temporary.open("wb") as file:
            file.write(b"{}")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / f"small-{files}")
        files += 1
    return (time.perf_counter() - begun) / files
