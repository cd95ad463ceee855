"""One save, from pieces in memory to a checkpoint under its name, then pruning. Runs on every rank, in any thread.

Until the rename, everything is in `.step-N.partial`, which readers ignore and a failed save removes. Old checkpoints
are removed only after the new one is published (it is hashed while written), and only complete ones are counted. So
neither a failed save nor a damaged file can cost the last good checkpoint (NVIDIA-NeMo/Megatron-Bridge#5184, #4678).
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from livt_scale.checkpoint import io
from livt_scale.checkpoint.catalog import Retention, damages, list_checkpoints, temporary
from livt_scale.checkpoint.dcp import FolderWriter, Pieces, WritePlan
from livt_scale.checkpoint.manifest import MANIFEST, CheckpointManifest, FileEntry, step_name
from livt_scale.distributed.collectives import Peers
from livt_scale.util.atomic import sync_folder
from livt_scale.util.errors import CheckpointError, PruneFailed, SaveFailed


@dataclass(frozen=True)
class SaveJob:
    """What one save needs. `known_whole` remembers, by path, how files looked when their bytes were last checked."""

    folder: Path
    plan: WritePlan
    pieces: Pieces
    manifest: dict[str, Any]
    retention: Retention
    known_whole: dict[Path, object]

    @property
    def step(self) -> int:
        return self.manifest["position"]["step"]

    @property
    def partial(self) -> Path:
        return temporary(self.folder, self.step, "partial")


def publish(job: SaveJob, peers: Peers) -> None:
    """Write, publish, prune: a collective call. SaveFailed, or PruneFailed, on every rank if any rank failed."""
    try:
        peers.on_rank0(lambda: _start(job))
        _write(job, peers)
    except CheckpointError:  # raised by all ranks, so none of them still writes
        peers.on_rank0(lambda: _discard(job))
        raise
    except Exception as error:  # a peer is gone, so the ranks cannot agree any more
        if peers.leads:
            _discard(job)
        raise CheckpointError(f"{step_name(job.step)} was not saved: {error}") from error
    peers.on_rank0(lambda: _prune(job))


def _start(job: SaveJob) -> None:
    try:
        io.remove_folder(job.partial)
        free, needed = io.free_bytes(job.folder), job.plan.needed_bytes
        if free < needed:
            raise _full(job, f"it needs {io.readable(needed)}, {io.readable(free)} are free")
        job.partial.mkdir()
    except OSError as error:
        raise _failed(job, error) from error


def _write(job: SaveJob, peers: Peers) -> None:
    writer = FolderWriter(job.partial, peers)

    def pieces() -> Any:
        try:
            return writer.write_pieces(job.plan, job.pieces)
        except Exception as error:
            raise _failed(job, writer.full or error) from error

    results = peers.gather(peers.run_all(pieces))
    entries = peers.gather(writer.entries())

    def commit() -> None:
        assert results is not None
        assert entries is not None
        assert job.plan.metadata is not None
        try:
            writer.write_metadata(job.plan.metadata, results)
            _commit(job, [entry for rank in entries[1:] for entry in rank] + writer.entries())
        except OSError as error:
            raise _failed(job, error) from error

    peers.on_rank0(commit)


def _commit(job: SaveJob, entries: list[FileEntry]) -> None:
    entries = sorted(entries, key=lambda entry: (entry.rank, entry.name))
    assert job.plan.metadata is not None
    num_tensors = len(job.plan.metadata.state_dict_metadata)
    facts = {**job.manifest, "num_tensors": num_tensors, "torch": torch.__version__, "files": entries}
    manifest = CheckpointManifest.model_validate(facts)
    io.write_synced(job.partial / MANIFEST, manifest.to_bytes())
    sync_folder(job.partial)
    target = job.folder / step_name(job.step)
    aside = temporary(job.folder, job.step, "replaced")
    if target.exists():
        io.remove_folder(aside)
        target.rename(aside)
    try:
        job.partial.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(job.folder)
    io.remove_folder(aside)
    job.known_whole[target] = _looks(target)


def _discard(job: SaveJob) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed now is at the next start
        io.remove_folder(job.partial)


def _prune(job: SaveJob) -> None:
    """Remove what the rule does not keep. A failure here is reported; the new checkpoint is there all the same."""
    try:
        whole = [info for info in list_checkpoints(job.folder, quick=True) if info.whole and _is_whole(job, info.path)]
        kept = job.retention.kept([info.manifest for info in whole if info.manifest])
        for info in whole:
            if info.position not in kept and info.path.name != step_name(job.step):
                assert info.position is not None
                going = temporary(job.folder, info.position.step, "pruned")
                io.remove_folder(going)
                info.path.rename(going)  # no longer under its name, so never there in part
                io.remove_folder(going)
                job.known_whole.pop(info.path, None)
    except OSError as error:
        raise PruneFailed(
            f"{step_name(job.step)} was saved, but an old checkpoint could not be removed: {error}",
            remedy="The disk will fill up: check who may write there",
        ) from error


def _is_whole(job: SaveJob, path: Path) -> bool:
    """Whether every byte is correct; files are read again only if their stat has changed since the last check."""
    looks = _looks(path)
    if job.known_whole.get(path) == looks:
        return True
    if damages(path):
        return False
    job.known_whole[path] = looks
    return True


def _looks(path: Path) -> object:
    stats = [(entry.name, entry.stat()) for entry in os.scandir(path)]
    return sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


def _failed(job: SaveJob, error: Exception) -> SaveFailed:
    if isinstance(error, OSError) and error.errno in io.FULL:
        try:
            free = f"{io.readable(io.free_bytes(job.folder))} are free"
        except OSError:
            free = "how much is free cannot be read"
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.EFBIG: "a file would be larger than the limit of this process (ulimit -f) or file system",
        }[error.errno]
        return _full(job, f"{reason}: it needs {io.readable(job.plan.needed_bytes)}, {free}")
    detail = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return SaveFailed(f"{job.folder}: {step_name(job.step)} was not saved: {detail}{where}")


def _full(job: SaveJob, reason: str) -> SaveFailed:
    return SaveFailed(
        f"{job.folder}: {step_name(job.step)} was not saved: {reason}",
        remedy="The earlier checkpoints are as they were. Make room, or lower checkpoint.keep_last",
    )
