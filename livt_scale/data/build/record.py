"""What a set was built from, image by image, so that a later build notices what has changed since.

    out/train/sources.tsv.gz     a line of JSON (the classes), then for each image of the source, used or not:
                                 1 if used, class, size, mtime (ns), digest, place

The record is no part of the set: no loader reads it and a set without it is complete. It is the one file of a build
that another copy of the same images does not reproduce (mtime). Comparing asks for size and mtime; an image is read
only where these differ, and has changed only if its digest does.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from livt_scale.data.build.scan import DIGEST, Digests, Scan, digest, first_names
from livt_scale.data.build.sources import Source, Stamps
from livt_scale.util.atomic import plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, SourceError
from livt_scale.util.outside import open_checked
from livt_scale.util.text import escaped

RECORD = "sources.tsv.gz"
FORMAT = "livt-sources"
MAX_RECORD_BYTES = 1 << 33  # unpacked; ImageNet-21k's 14 million images take 1.5 GB


@dataclass(frozen=True)
class SourceRecord:
    """The images of a source when a set was built from it, [n] each."""

    class_names: tuple[str, ...]
    places: tuple[str, ...]
    labels: NDArray[np.int64]
    stamps: Stamps
    digests: Digests
    used: NDArray[np.bool_]  # in the set

    @classmethod
    def of(cls, scanned: Scan, used: NDArray[np.int64]) -> Self:
        """used: the images that are in the set."""
        source = scanned.source
        in_set = np.zeros(len(source), dtype=np.bool_)
        in_set[used] = True
        places = tuple(source.place(i) for i in range(len(source)))
        return cls(source.class_names, places, source.labels, scanned.stamps, scanned.digests, in_set)

    def write(self, folder: Path) -> None:
        """Raises DataError where it cannot be written."""
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0, filename="") as file:
            file.write(json.dumps({"format": FORMAT, "class_names": self.class_names}).encode() + b"\n")
            for line in self._lines():
                file.write(line)
        with plain_disk_errors(folder / RECORD, needed=packed.tell()):
            write_atomic(folder / RECORD, packed.getvalue())

    def _lines(self) -> Iterator[bytes]:
        rows = zip(self.places, self.labels, self.stamps, self.digests, self.used, strict=True)
        for place, label, (size, mtime), mark, used in rows:
            quoted = quote_from_bytes(os.fsencode(place), safe="/ ,'")
            yield f"{int(used)}\t{label}\t{size}\t{mtime}\t{mark.tobytes().hex()}\t{quoted}\n".encode()

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in `folder`, or None without one. Raises DataError for a damaged one."""
        path = folder / RECORD
        if not path.exists():
            return None
        try:
            with open_checked(path, "record", max_bytes=MAX_RECORD_BYTES) as packed, gzip.open(packed) as file:
                head = json.loads(file.readline(1 << 28))
                rows = [line.rstrip(b"\n").split(b"\t") for line in _bounded(file)]
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']!r}")
            numbers = np.array([[int(field) for field in row[:4]] for row in rows], dtype=np.int64).reshape(-1, 4)
            if len(rows) and not 0 <= numbers[:, 1].min() <= numbers[:, 1].max() < len(head["class_names"]):
                raise ValueError("a class that it does not name")
            marks = b"".join(bytes.fromhex(row[4].decode()) for row in rows)
            return cls(
                class_names=tuple(map(str, head["class_names"])),
                places=tuple(os.fsdecode(unquote_to_bytes(row[5])) for row in rows),
                labels=numbers[:, 1],
                stamps=numbers[:, 2:],
                digests=np.frombuffer(marks, DIGEST, count=len(rows)),
                used=numbers[:, 0] == 1,
            )
        except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged: {error}", remedy="remove it; the set is then no longer compared with its images"
            ) from error


def _bounded(file: gzip.GzipFile) -> Iterator[bytes]:
    num_bytes = 0
    while line := file.readline(1 << 16):
        num_bytes += len(line)
        if num_bytes > MAX_RECORD_BYTES:
            raise ValueError(f"more than {MAX_RECORD_BYTES:,} bytes")
        yield line


@dataclass(frozen=True)
class Changes:
    """What is different in a source, by the images' places and the classes' names. False: nothing."""

    added: Sequence[str] = ()
    removed: Sequence[str] = ()
    replaced: Sequence[str] = ()
    moved_to_another_class: Sequence[str] = ()
    classes_added: Sequence[str] = ()
    classes_removed: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        names = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}
        parts = (f"{len(found):,} {what} ({first_names(found)})" for what, found in names.items() if found)
        return ", ".join(parts)


def changes(then: SourceRecord, now: Source) -> Changes:
    """What is different in the source `now` from the record `then`. Reads the images whose size or mtime differ."""
    row_of = {place: row for row, place in enumerate(then.places)}
    stamps = now.stamps()
    added: list[str] = []
    replaced: list[str] = []
    moved: list[str] = []
    for i in range(len(now)):
        place = now.place(i)
        row = row_of.pop(place, None)
        if row is None:
            added.append(escaped(place))
        elif then.class_names[then.labels[row]] != now.class_names[now.label(i)]:
            moved.append(escaped(place))
        elif (stamps is None or not np.array_equal(stamps[i], then.stamps[row])) and _is_other(now, i, then, row):
            replaced.append(escaped(place))
    before, after = set(then.class_names), set(now.class_names)
    return Changes(
        added=added,
        removed=[escaped(place) for place in row_of],
        replaced=replaced,
        moved_to_another_class=moved,
        classes_added=[escaped(name) for name in now.class_names if name not in before],
        classes_removed=[escaped(name) for name in then.class_names if name not in after],
    )


def _is_other(now: Source, i: int, then: SourceRecord, row: int) -> bool:
    before = then.digests[row].tobytes()
    try:
        return digest(now.raw(i)) != before
    except SourceError:
        return any(before)  # it could be read then
