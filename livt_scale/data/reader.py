"""Samples read from shards by number: one `pread` each, at the offset in the index, verified by CRC-32.

with closing(SampleReader(shards)) as reader:
    for sample in reader.read(np.array([7, 3, 5])):
        sample.key, sample.label, sample.image
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from livt_scale.data.order.instance import Ints
from livt_scale.data.remote.cache import closing_fd
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import ManifestError, SampleError, ShardError
from livt_scale.util.outside import open_fd

MAX_OPEN_SHARDS = 128  # files a process keeps open; a set may have thousands


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as stored in its shard."""

    key: str
    label: int
    image_type: str  # "jpg", "png": the name of its member in the tar
    image: bytes
    shard: str  # path or URL
    offset: int  # of its first tar header in the shard, bytes

    def error(self, what: str) -> SampleError:
        """A SampleError that names the location of this sample."""
        return _sample_error(self.shard, self.offset, self.key, what)


class SampleReader:
    """Reads samples by number and keeps the most recently used shards open. Not to be shared by processes.

    Shards from a URL are held for one sample at a time. A shard that nobody holds can be evicted, so processes never
    wait for each other's shards, however small the cache is.
    """

    def __init__(self, shards: ShardSet, *, max_open: int = MAX_OPEN_SHARDS) -> None:
        self._shards = shards
        self._max_open = max_open
        self._paths = [shards.shard_name(k) for k in range(len(shards.manifest.shards))]  # pathlib is slow
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the last used at the end

    def read(self, samples: Ints, keys: list[str] | None = None) -> Iterator[RawSample]:
        """The samples with these numbers, in this order.

        Raises ShardError, SampleError and, for a corrupt index, ManifestError. Each names the sample.
        """
        shards = self._shards
        rows = shards.index[samples]
        in_shard = shards.shard_of(samples)
        names = shards.keys(samples) if keys is None else keys
        for k in shards.impossible_rows(rows, in_shard):
            raise ManifestError(
                f"{shards.where}: the index has an impossible row for sample {names[k]!r}: {rows[k].tolist()}",
                remedy="copy the index again, or recreate it",
            )
        for row, shard, key in zip(rows.tolist(), in_shard.tolist(), names, strict=True):
            start, nbytes, data_offset, data_size, label, crc32, image_type, _ = row
            block = self._fetch(shard, start, nbytes, key)
            intact = zlib.crc32(block) == crc32
            if not intact and shards.remote:  # it was verified when fetched: the cache's disk corrupted it
                shards.remote.cache.drop(shards.manifest.shards[shard])
                block = self._fetch(shard, start, nbytes, key)
                intact = zlib.crc32(block) == crc32
            if not intact:
                raise _sample_error(self._paths[shard], start, key, "the bytes are corrupt (CRC-32)")
            yield RawSample(
                key=key,
                label=label,
                image_type=shards.manifest.image_types[image_type],
                image=block[data_offset : data_offset + data_size],
                shard=self._paths[shard],
                offset=start,
            )

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:  # descriptors are plain integers, which nothing closes automatically
        self.close()

    def _fetch(self, shard: int, start: int, nbytes: int, key: str) -> bytes:
        path = self._paths[shard]
        try:
            if self._shards.remote:
                with closing_fd(self._shards.remote.hold(self._shards.manifest.shards[shard])) as handle:
                    block = os.pread(handle, nbytes, start)
            else:
                block = os.pread(self._file(shard, path), nbytes, start)
        except OSError as error:
            raise ShardError(
                f"shard {path} cannot be read at byte {start} (sample {key!r}): {error.strerror}",
                remedy="check the disk or the mount, then run the same command: it resumes from the last checkpoint",
            ) from error
        if len(block) < nbytes:
            raise ShardError(
                f"shard {path} is truncated: sample {key!r} is at bytes {start} to {start + nbytes}, "
                f"the file ends at {start + len(block)}",
                remedy="copy it again, or rebuild the set",
            )
        return block

    def _file(self, shard: int, path: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= self._max_open:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = open_fd(path, "shard")
        return self._files[shard]


def read_sample(shards: ShardSet, sample: int) -> tuple[bytes, int, str]:
    """(image bytes, label, key) of one sample; opens and closes its shard. Raises the errors of SampleReader."""
    with closing(SampleReader(shards)) as reader:
        raw = next(reader.read(np.array([sample], dtype=np.int64)))
    return raw.image, raw.label, raw.key


def _sample_error(shard: str, offset: int, key: str, what: str) -> SampleError:
    folder = shard.rpartition("/")[0]
    return SampleError(
        f"shard {shard}, byte {offset}, sample {key!r}: {what}",
        remedy=f"`livt shards verify {folder} --decode --quarantine` finds and excludes corrupt samples, "
        "and --allow data.quarantine resumes the run",
    )
