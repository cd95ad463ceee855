"""Checks every image of a source before anything is written: its format, whether it decodes, what it will become.

    scanned = scan(source, decode=True, workers=8)
    scanned.usable, scanned.kinds, scanned.digests       # [k], [n], [n]; n images of the source, k that can be used
    table(scanned.unusable)                              # all that cannot be used, by reason

Each image is read once here and once when it is written. The digest of its bytes finds equal images in several sets,
and images that change after a build (record.py). Memory is 40 bytes an image beside the source itself.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from livt_scale.data.build.sources import FileSource, LeftOut, Source, Stamps
from livt_scale.data.build.stored import KEPT, KINDS, check, stored_type
from livt_scale.data.image.decode import Workspace
from livt_scale.extensions import load_extensions
from livt_scale.util.errors import SourceError
from livt_scale.util.process_pool import in_processes
from livt_scale.util.text import escaped

CHUNK = 256  # images of a job
DIGEST = np.dtype("V16")
SHOWN = 3  # names in a row of a table
MAX_RECORDED = 1000  # names of one reason in a manifest
UNKNOWN = np.uint8(255)  # the kind of an image that cannot be used, or that we made ourselves

Digests = NDArray[np.void]
Progress = Callable[[str, int, int, int], None]  # what, images done, images in all, bytes done


@dataclass(frozen=True)
class Scan:
    """What was found in a source of n images."""

    source: Source
    usable: NDArray[np.int64]  # [k] images of the source
    kinds: NDArray[np.uint8]  # [n] which of KINDS
    digests: Digests  # [n] blake2b of the image's bytes; zeros where they cannot be read
    stamps: Stamps  # [n, 2] see Source.stamps; −1 where unknown
    unusable: tuple[LeftOut, ...]  # in the order of the source
    ignored: tuple[LeftOut, ...]

    def converted(self, images: NDArray[np.int64]) -> dict[str, int]:
        """How many of `images` are converted, by from what and to what: {"tiff to png": 3}."""
        counts = np.bincount(self.kinds[images], minlength=len(KINDS))
        return {
            f"{kind} to {stored_type(kind)}": int(counts[number])
            for number, kind in enumerate(KINDS)
            if counts[number] and kind not in KEPT
        }


@dataclass(frozen=True)
class _ScanJob:
    source: Source
    decode: bool


@dataclass(frozen=True)
class _Seen:
    kinds: NDArray[np.uint8]
    digests: Digests
    stamps: Stamps
    reasons: dict[int, str]
    num_bytes: int


def scan(source: Source, *, decode: bool, workers: int, progress: Progress | None = None) -> Scan:
    """Look at every image of `source`. decode: down to the last pixel, else the headers alone."""
    n = len(source)
    kinds = np.full(n, UNKNOWN)
    digests, stamps = np.zeros(n, DIGEST), np.full((n, 2), -1, dtype=np.int64)
    unusable: dict[int, str] = {}
    starts = range(0, n, CHUNK)
    jobs = (_ScanJob(source.part(np.arange(k, min(k + CHUNK, n))), decode) for k in starts)
    done = num_bytes = 0
    for number, seen in in_processes(_look, jobs, workers=workers, num_jobs=len(starts), prepare=load_extensions):
        first = number * CHUNK
        here = slice(first, first + len(seen.kinds))
        kinds[here], digests[here], stamps[here] = seen.kinds, seen.digests, seen.stamps
        unusable |= {first + i: reason for i, reason in seen.reasons.items()}
        done, num_bytes = done + len(seen.kinds), num_bytes + seen.num_bytes
        if progress:
            progress(f"scan of {source.name}", done, n, num_bytes)
    usable = np.ones(n, dtype=np.bool_)
    usable[list(unusable)] = False
    beside = source.unusable if isinstance(source, FileSource) else ()
    ignored = source.ignored if isinstance(source, FileSource) else ()
    left_out = tuple((source.place(i), unusable[i]) for i in sorted(unusable))
    return Scan(source, np.flatnonzero(usable), kinds, digests, stamps, left_out + beside, ignored)


def _look(job: _ScanJob) -> _Seen:
    source, n = job.source, len(job.source)
    kinds, digests = np.full(n, UNKNOWN), np.zeros(n, DIGEST)
    reasons: dict[int, str] = {}
    stamps = source.stamps()  # before the reading: what changes meanwhile has another one afterwards
    workspace = Workspace()
    num_bytes = 0
    for i in range(n):
        try:
            data = source.raw(i)
            digests[i] = np.void(digest(data))
            num_bytes += len(data)
            if not source.made_from_arrays:
                kinds[i] = KINDS.index(check(data, decode=job.decode, workspace=workspace))
        except SourceError as error:
            reasons[i] = getattr(error, "reason", error.message)
    return _Seen(kinds, digests, np.full((n, 2), -1) if stamps is None else stamps, reasons, num_bytes)


def digest(data: bytes) -> bytes:
    """16 bytes that stand for `data`."""
    return hashlib.blake2b(data, digest_size=DIGEST.itemsize).digest()


def by_reason(left_out: Sequence[LeftOut]) -> dict[str, list[str]]:
    """Names by reason, the reason with the most names first."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out:
        names[reason].append(escaped(name))
    return dict(sorted(names.items(), key=lambda item: (-len(item[1]), item[0])))


def table(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """A line for each reason: how many, why, and the first names."""
    rows = by_reason(left_out)
    width = max((len(reason) for reason in rows), default=0)
    for reason, names in rows.items():
        yield f"{len(names):>8,}  {reason:<{width}}  {first_names(names)}"


def first_names(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def recorded(left_out: Sequence[LeftOut]) -> dict[str, dict[str, object]]:
    """For the manifest: by reason the number of files, and their names."""
    return {
        reason: {"count": len(names), "names": names[:MAX_RECORDED]} for reason, names in by_reason(left_out).items()
    }
