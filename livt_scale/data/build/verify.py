"""Checks that every byte of a shard set is as it was written, and that every image decodes.

    verify(folder)                    sizes, SHA-256 of each file, CRC-32 of each sample: a changed byte is found, and
                                      named by shard, offset and, inside a sample, key
    verify(folder, decode=True)       also decodes each image, as training does
    verify(…, quarantine=True)        and writes the bad samples beside the manifest: from then on they are left out

Nothing is repaired and nothing replaced. Quarantine is for samples; a set whose manifest, index or keys are damaged,
or that lacks a shard, has to be copied or built again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from livt_scale.data.build.scan import Progress
from livt_scale.data.image.decode import BadImage, decode
from livt_scale.data.manifest import INDEX, MANIFEST, QUARANTINE, FileInfo, Quarantine, Quarantined, ShardManifest
from livt_scale.data.remote.cache import closing_fd
from livt_scale.data.shard_set import ShardSet, map_index, read_quarantine
from livt_scale.util.atomic import plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, ManifestError, RemoteError, UsageError
from livt_scale.util.outside import open_checked, open_fd, read_checked
from livt_scale.util.process_pool import in_processes, usable_cores
from livt_scale.util.text import escaped
from livt_scale.util.urls import is_url

CHUNK = 1 << 20
CHANGED = "changed since it was written (CRC-32)"
FILE_CHANGED = "changed since it was written (SHA-256)"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    shard: str  # the file's name: a shard, or index, keys or manifest
    key: str | None  # of the sample, where it is one
    offset: int | None  # in the file: where the sample begins, or the damage, as far as it is known
    what: str
    number: int | None = None  # of the sample
    left_out: bool = False  # it is in quarantine already

    def __str__(self) -> str:
        place = f", offset {self.offset}" if self.offset is not None else ""
        known = " (in quarantine)" if self.left_out else ""
        return escaped(
            f"{self.shard}{place}{f', key {self.key!r}' if self.key is not None else ''}: {self.what}{known}"
        )


@dataclass(frozen=True)
class _Job:
    """Check one shard against its rows of the index, [samples] of INDEX_DTYPE, and the samples' keys."""

    path: Path
    expected: FileInfo
    first: int  # number of its first sample
    rows: np.ndarray
    keys: list[str]
    decode: bool


def verify(
    folder: str | Path,
    *,
    decode: bool = False,
    quarantine: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Fault]:
    """All faults of the set, by shard and offset; none: complete. Those of samples in quarantine are marked `left_out`.

    Raises ManifestError if there is no set at all, DataError if a quarantine is requested and cannot be written
    or would not suffice.
    """
    if isinstance(folder, str) and is_url(folder):
        if quarantine:
            raise UsageError(
                "a quarantine is written to the folder of the set", remedy="give --quarantine there, to the folder"
            )
        return _verify_url(folder, decode=decode, progress=progress)
    folder = Path(folder)
    try:
        manifest = ShardManifest.read(folder)
    except ManifestError as error:
        if not (folder / MANIFEST).is_file():
            raise
        return [Fault(MANIFEST, None, None, error.message)]
    faults = [f for info in (manifest.index, manifest.keys) for f in _check_file(folder / info.name, info)]
    if faults:  # without them the places of the samples are unknown: only each shard's digest is checked
        for shard in manifest.shards:
            faults += _check_file(folder / shard.name, shard)
    else:
        faults = _check_shards(folder, manifest, decode=decode, workers=workers or usable_cores(), progress=progress)
        if not quarantine:  # else it is written again
            faults = _with_quarantine(folder, manifest, faults)
    if quarantine:
        _write_quarantine(folder, manifest, faults, decoded=decode)
    return faults


def _verify_url(url: str, *, decode: bool, progress: Progress | None) -> list[Fault]:
    """Every file of the set at `url`, fetched unless the cache holds it; one that cannot be fetched is a fault.

    Raises what opening the set does: without manifest, index and keys there is nothing to compare with.
    """
    shards = ShardSet.open(url)
    assert shards.remote is not None
    index = shards.index
    impossible = shards.impossible_rows(index, shards.shard_of(np.arange(len(index))))
    faults = [Fault(INDEX, None, None, f"an impossible row for sample {k}: {index[k].tolist()}") for k in impossible]
    num_bytes = 0
    for k, info in enumerate(() if faults else shards.manifest.shards):
        try:
            with closing_fd(shards.remote.hold(info)):
                job = _job(shards, k, path=shards.shard_path(k), decode=decode)
                faults += [replace(fault, shard=info.name) for fault in _check_shard(job)]
        except RemoteError as error:
            faults.append(Fault(info.name, None, None, error.message))
        num_bytes += info.bytes
        if progress:
            progress(shards.manifest.name, k + 1, len(shards.manifest.shards), num_bytes)
    return _marked(faults, shards.quarantine)


def _job(shards: ShardSet, shard: int, *, path: Path, decode: bool) -> _Job:
    first, end = (int(n) for n in shards.first[shard : shard + 2])
    rows, keys = np.array(shards.index[first:end]), shards.keys(np.arange(first, end))
    return _Job(path, shards.manifest.shards[shard], first=first, rows=rows, keys=keys, decode=decode)


def _check_file(path: Path, expected: FileInfo) -> list[Fault]:
    """Size and SHA-256. A file of another size is not read: it can be of any size."""
    try:
        digest = hashlib.sha256()
        with open_checked(path, "shard") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                return [Fault(path.name, None, size, f"has {size:,} bytes, the manifest says {expected.bytes:,}")]
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        return [Fault(path.name, None, None, f"cannot be read: {error.strerror}")]
    if digest.hexdigest() != expected.sha256:
        return [Fault(path.name, None, None, FILE_CHANGED)]
    return []


def _check_shards(
    folder: Path, manifest: ShardManifest, *, decode: bool, workers: int, progress: Progress | None
) -> list[Fault]:
    index = map_index(folder / manifest.index.name, manifest)
    whole = ShardSet(
        folder, manifest, (), index=index
    )  # not opened: that would stop at the first shard that is missing
    impossible = whole.impossible_rows(index, whole.shard_of(np.arange(len(index))))
    if len(impossible):
        return [Fault(INDEX, None, None, f"an impossible row for sample {k}: {index[k].tolist()}") for k in impossible]
    jobs = (_job(whole, k, path=folder / shard.name, decode=decode) for k, shard in enumerate(manifest.shards))
    found: dict[int, list[Fault]] = {}
    num_bytes = 0
    for number, faults in in_processes(_check_shard, jobs, workers=workers, num_jobs=len(manifest.shards)):
        found[number] = faults
        num_bytes += manifest.shards[number].bytes
        if progress:
            progress(manifest.name, len(found), len(manifest.shards), num_bytes)
    return [fault for number in sorted(found) for fault in found[number]]


def _check_shard(job: _Job) -> list[Fault]:
    faults = _check_file(job.path, job.expected)
    if not faults and not job.decode:
        return []
    samples = _check_samples(job)
    changed = next((f for f in faults if f.what == FILE_CHANGED), None)
    if not changed:  # intact, of another size, or unreadable
        return faults + samples
    if any(f.what == CHANGED for f in samples):  # that is where it changed
        return samples
    return [replace(changed, what=f"{changed.what}, outside its samples", offset=_damaged_end(job)), *samples]


def _check_samples(job: _Job) -> list[Fault]:
    """Check the CRC-32 of each sample and, if requested, decode its image. A sample missing in the file is a fault."""
    faults = []
    try:
        handle = open_fd(job.path, "shard")
    except OSError:
        return []  # reported by _check_file
    try:
        for k, (row, key) in enumerate(zip(job.rows, job.keys, strict=True)):
            start = int(row["start"])
            data = os.pread(handle, int(row["nbytes"]), start)
            if len(data) < int(row["nbytes"]):
                what = "the file ends before its end"
            elif zlib.crc32(data) != int(row["crc32"]):
                what = CHANGED
            else:
                what = _decode_fault(data, row) if job.decode else ""
            if what:
                faults.append(Fault(job.path.name, key, start, what, number=job.first + k))
    except OSError as error:
        faults.append(Fault(job.path.name, None, None, f"cannot be read: {error.strerror}"))
    finally:
        os.close(handle)
    return faults


def _decode_fault(data: bytes, row: np.ndarray) -> str:
    begin = int(row["data_offset"])
    try:
        decode(data[begin : begin + int(row["data_size"])])
    except BadImage as error:
        return str(error)
    return ""


def _damaged_end(job: _Job) -> int | None:
    """Where the zeros that end a tar are not zero; None if they are: then it is between samples."""
    end = max((int(row["start"]) + int(row["nbytes"]) for row in job.rows), default=0)
    try:
        with open_checked(job.path, "shard") as file:
            file.seek(end)
            rest = file.read(CHUNK)
    except OSError:
        return None
    return end + len(rest) - len(rest.lstrip(b"\0")) if rest.strip(b"\0") else None


def _with_quarantine(folder: Path, manifest: ShardManifest, faults: list[Fault]) -> list[Fault]:
    """`faults`, marked where quarantine.json has them; and what is wrong with that file, which no set opens with."""
    path = folder / QUARANTINE
    try:
        read_checked(path, "quarantine")
        index = map_index(folder / manifest.index.name, manifest)
        return _marked(faults, read_quarantine(ShardSet(folder, manifest, (), index=index)))
    except FileNotFoundError:
        return faults
    except OSError as error:
        return [*faults, Fault(QUARANTINE, None, None, f"cannot be read: {error.strerror}")]
    except ManifestError as error:
        return [*faults, Fault(QUARANTINE, None, None, error.message.removeprefix(f"{escaped(path)}: "))]


def _marked(faults: list[Fault], quarantine: Sequence[Quarantined]) -> list[Fault]:
    listed = {q.number for q in quarantine}
    return [replace(fault, left_out=fault.number in listed) for fault in faults]


def _write_quarantine(folder: Path, manifest: ShardManifest, faults: Sequence[Fault], *, decoded: bool) -> None:
    """Write the samples among `faults` to quarantine.json, or remove it without any. Raises DataError on other faults.

    Without `decoded`, samples already in quarantine stay: they may be there for an image that does not decode.
    """
    other = next((f for f in faults if f.number is None or f.key is None), None)
    if other:
        raise DataError(
            f"{folder}: {other}: a quarantine leaves out samples, this is more than a sample",
            remedy="copy that file again; or remove it and build the set again, which writes what is missing",
        )
    index = map_index(folder / manifest.index.name, manifest)
    listed = {} if decoded else {q.number: q for q in read_quarantine(ShardSet(folder, manifest, (), index=index))}
    for fault in faults:
        label = int(index["label"][fault.number])
        entry = {"number": fault.number, "key": fault.key, "shard": fault.shard, "class": label, "reason": fault.what}
        sample = Quarantined.model_validate(entry)
        listed[sample.number] = sample
    path = folder / QUARANTINE
    with plain_disk_errors(path):
        if listed:
            write_atomic(path, Quarantine(samples=[listed[n] for n in sorted(listed)]).to_bytes())
        else:
            path.unlink(missing_ok=True)
