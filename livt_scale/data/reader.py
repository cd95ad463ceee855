"""Shards to samples, in the order of the run: elastic, seekable, exact.

`RankOrder` says which samples one rank reads, micro-batch by micro-batch, from any (epoch, step) on; loader process w
of n takes the micro-batches w, w + n, … of them. `SampleReader` fetches samples: one `pread` each, at the offset
that the index gives, checked by its CRC-32. `SampleStream` joins the two and yields what webdataset's readers yield,
so that webdataset's stages follow as usual:

    stream = SampleStream(shards, stage_order(shards, recipe, "finetune"), epochs=10, rank=3, world_size=8)
    data = webdataset.DataPipeline(stream, wds.decode("pil"), wds.to_tuple("jpg", "cls"))

Why not `webdataset.WebDataset`: it reads tars from their beginning, so that entering an epoch in the middle costs a
replay, and it divides by shard, so that ranks get uneven shares. Its format stays ours: it opens the same tars.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from livt_scale.data.order.instance import Ints, SampleOrder
from livt_scale.data.remote.cache import closing_fd
from livt_scale.data.remote.prefetch import fetched_ahead
from livt_scale.data.seeds import view_key
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import ManifestError, SampleError, ShardError, UsageError
from livt_scale.util.urls import one_line

MAX_OPEN_SHARDS = 128  # files a process keeps open; a set may have thousands


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass of one rank, in the order of their slots."""

    epoch: int
    step: int  # within the epoch
    micro: int  # which of the rank's micro-batches in this step
    samples: Ints  # [n] sample numbers
    views: Ints | None = None  # [n] the how-manieth appearance in this epoch each is, from 0; None: all 0

    def seed_keys(self, keys: list[str]) -> list[str]:
        """What stands for the samples' `keys` where random numbers are drawn: another for each view of one sample."""
        if self.views is None:
            return keys
        return [view_key(key, view) for key, view in zip(keys, self.views.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it lies in its shard."""

    key: str
    label: int
    image_type: str  # "jpg", "png": the name of its member in the tar
    image: bytes
    shard: str  # path or URL
    offset: int  # of its first tar header in the shard, bytes

    def error(self, what: str) -> SampleError:
        """A SampleError that says where this sample lies."""
        return _sample_error(self.shard, self.offset, self.key, what)


class RankOrder:
    """The micro-batches of one rank: its contiguous run of slots of each global batch, cut in equal parts.

    `micro_batch`: None takes all the slots of the rank at once. Raises UsageError where something does not divide.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        *,
        epochs: int,
        rank: int,
        world_size: int,
        micro_batch: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}: ranks count from 0 to {world_size - 1}")
        slots, left = divmod(order.global_batch, world_size)
        if left:
            raise UsageError(
                f"a global batch of {order.global_batch} does not give {world_size} ranks equal slots",
                remedy="start a number of processes that divides it, or change global_batch",
            )
        self.micro_batch = slots if micro_batch is None else micro_batch
        if self.micro_batch < 1 or slots % self.micro_batch:
            raise UsageError(
                f"micro_batch is {self.micro_batch} and does not divide the {slots} slots of a rank "
                f"(global batch {order.global_batch} on {world_size} ranks)",
                remedy="take one that does",
            )
        self.shards = shards
        self.order = order
        self.accumulation = slots // self.micro_batch
        self.num_steps = epochs * order.steps_per_epoch
        self._first_slot = rank * slots

    def micro_batches(self, *, epoch: int, step: int, worker: int = 0, num_workers: int = 1) -> Iterator[MicroBatch]:
        """From (epoch, step) to the end of the stage, of each `num_workers` micro-batches the one for `worker`.

        `step` may exceed an epoch: (0, 1000) with 300 steps an epoch is (3, 100). Starting late costs nothing.
        """
        start = (epoch * self.order.steps_per_epoch + step) * self.accumulation
        for number in range(start + worker, self.num_steps * self.accumulation, num_workers):
            run_step, micro = divmod(number, self.accumulation)
            yield self._micro_batch(*divmod(run_step, self.order.steps_per_epoch), micro)

    def _micro_batch(self, epoch: int, step: int, micro: int) -> MicroBatch:
        first = self._first_slot + micro * self.micro_batch
        positions, views = self.order.draws(epoch, step, first_slot=first, num_slots=self.micro_batch)
        return MicroBatch(epoch, step, micro, self.shards.usable_to_sample(positions), views)


class SampleReader:
    """Reads samples by number and keeps the shards that were used last open. Not for use by two processes.

    Shards from a URL are held for one sample at a time: what nobody holds can be evicted, so that no number of
    processes can wait for each other's, however small the cache is.
    """

    def __init__(self, shards: ShardSet, *, most_open: int = MAX_OPEN_SHARDS) -> None:
        self._shards = shards
        self._most_open = most_open
        self._paths = [shards.shard_name(k) for k in range(len(shards.manifest.shards))]  # once: pathlib is slow
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the last used at the end

    def read(self, samples: Ints, keys: list[str] | None = None) -> Iterator[RawSample]:
        """The samples with these numbers, in this order. Raises ShardError, SampleError and ManifestError (a hostile or
        damaged index), naming the sample."""
        shards = self._shards
        rows = shards.index[samples]
        in_shard = shards.shard_of(samples)
        names = shards.keys(samples) if keys is None else keys
        for k in shards.impossible_rows(rows, in_shard):
            raise ManifestError(
                f"{one_line(shards.where)}: the index has an impossible row for sample {names[k]!r}: "
                f"{rows[k].tolist()}",
                remedy="copy the index again, or make it again",
            )
        for row, shard, key in zip(rows.tolist(), in_shard.tolist(), names, strict=True):
            start, nbytes, data_offset, data_size, label, crc32, image_type, _ = row
            block = self._fetch(shard, start, nbytes, key)
            whole = zlib.crc32(block) == crc32
            if not whole and shards.remote:  # it was whole when it came: the cache's disk lost it
                shards.remote.cache.drop(shards.manifest.shards[shard])
                block = self._fetch(shard, start, nbytes, key)
                whole = zlib.crc32(block) == crc32
            if not whole:
                raise _sample_error(self._paths[shard], start, key, "its bytes are not those that were written")
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

    def __del__(self) -> None:  # descriptors are plain numbers: nobody else would close them
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
                f"shard {one_line(path)} cannot be read at byte {start} (sample {key!r}): {error.strerror}",
                remedy="check the disk or the mount, then start again: the run goes on where it was saved",
            ) from error
        if len(block) < nbytes:
            raise ShardError(
                f"shard {one_line(path)} is cut: sample {key!r} lies at bytes {start} to {start + nbytes}, "
                f"the file ends at {start + len(block)}",
                remedy="copy it again, or build the set again",
            )
        return block

    def _file(self, shard: int, path: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= self._most_open:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


class SampleStream(IterableDataset[dict[str, Any]]):
    """The samples of one rank as webdataset has them, from (epoch, step) to the end of `epochs`.

    Yields {"__key__": str, "__url__": path of the shard, "__epoch__": int, "jpg" or "png": bytes, "cls": b"3"}. In a
    DataLoader each worker takes whole micro-batches, so that `batch_size=micro_batch` gives those of the run.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        *,
        epochs: int,
        epoch: int = 0,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self._start = {"epoch": epoch, "step": step}
        self._shards = shards
        self._rank_order = RankOrder(
            shards, order, epochs=epochs, rank=rank, world_size=world_size, micro_batch=micro_batch
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = this_worker()
        batches = self._rank_order.micro_batches(**self._start, worker=worker, num_workers=num_workers)
        with closing(SampleReader(self._shards)) as reader, closing(fetched_ahead(batches, self._shards)) as ahead:
            for batch in ahead:
                for raw in reader.read(batch.samples):
                    yield {
                        "__key__": raw.key,
                        "__url__": raw.shard,
                        "__epoch__": batch.epoch,
                        raw.image_type: raw.image,
                        "cls": b"%d" % raw.label,
                    }


def read_sample(shards: ShardSet, sample: int) -> tuple[bytes, int, str]:
    """(image bytes, label, key) of one sample number; opens its shard for this alone. Raises as SampleReader does."""
    with closing(SampleReader(shards)) as reader:
        raw = next(reader.read(np.array([sample], dtype=np.int64)))
    return raw.image, raw.label, raw.key


def this_worker() -> tuple[int, int]:
    """(number of this loader process, how many there are); (0, 1) in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _sample_error(shard: str, offset: int, key: str, what: str) -> SampleError:
    folder = shard.rpartition("/")[0]
    return SampleError(
        f"shard {one_line(shard)}, byte {offset}, sample {key!r}: {what}",
        remedy=f"`livt shards verify {one_line(folder)} --decode --quarantine` lists what is bad and leaves it out",
    )
