"""How many loader processes a rank starts, and how much memory they may fill.

    data.workers: 6        6, and data.prefetch micro-batches ready in each
    data.workers: auto     the first samples are decoded for two seconds at most; then as many as the step asks for, if
                           an earlier part of the run has measured that, else as many as this rank has cores to spare

    rank with 8 cores, a GPU, one process decodes 900 images/s, the step took 3000 images/s before
    -> 1.25 · 3000 / 900 -> 5 processes

The samples, their crops and their order never depend on it. What is ready and not yet taken is bounded: workers x
prefetch x bytes of a micro-batch; `auto` lowers prefetch until that fits `MAX_READY_BYTES` and half of /dev/shm.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from livt_scale.config.recipe import Data
from livt_scale.data.image.transforms import TOGETHER
from livt_scale.data.order.for_rank import MicroBatch
from livt_scale.data.settings import ImageSettings, TrainSettings
from livt_scale.util.process_pool import usable_cores
from livt_scale.util.text import counted

MEASURE_S = 2.0
CHUNK = TOGETHER  # samples decoded between two looks at the clock, as the loader has them; even, for pairs
SPARE = 1.25  # what is loaded over what the step takes: shards differ, and a full queue hides a slow disk
MAX_WORKERS = 16  # for one rank; beyond it, its own pipe and memory are the limit
MAX_READY_BYTES = 4 << 30  # of one node: shared by its ranks
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to


@dataclass(frozen=True)
class Loading:
    """How a rank loads: the choice and its reason."""

    workers: int
    prefetch: int
    batch_bytes: int  # of one micro-batch
    why: str

    @property
    def max_bytes(self) -> int:
        """Of micro-batches that are ready; with no processes there is one, the one in use."""
        return max(self.workers * self.prefetch, 1) * self.batch_bytes

    def __str__(self) -> str:
        if not self.workers:
            return f"loader: images are decoded in the training process ({self.why})"
        each = counted(self.prefetch, "micro-batch", "micro-batches")
        ready = f"{counted(self.workers, 'process', 'processes')} × {each}"
        most = f"{self.batch_bytes / 1e6:.1f} MB, at most {self.max_bytes / 1e6:.1f} MB ready"
        return f"loader: {ready} of {most} ({self.why})"


def batch_bytes(settings: ImageSettings, micro_batch: int) -> int:
    """Bytes of one micro-batch as it crosses from a loader process: images, masking noise or stochastic depth."""
    numbers = max(settings.num_patches, settings.num_branches) if isinstance(settings, TrainSettings) else 0
    return micro_batch * (settings.image_px**2 * settings.channels + 4 * numbers + 64)


def fixed_workers(data: Data, *, micro_batch_bytes: int) -> Loading:
    """The recipe's numbers."""
    assert data.workers != "auto"
    return Loading(data.workers, data.prefetch, micro_batch_bytes, "data.workers and data.prefetch")


def choose_workers(
    data: Data,
    *,
    rate: float,
    demand: float | None,
    cores: int,
    has_gpu: bool,
    micro_batch_bytes: int,
    most_ready_bytes: int = MAX_READY_BYTES,
) -> Loading:
    """For one rank: `rate` images/s of one process, `demand` images/s of the step if known, `cores` of this rank.

    Without a demand: on a GPU all cores but one; where the CPU trains, it needs them itself, so two processes at most.
    """
    most = max(1, min(cores - 1 if has_gpu else 2, cores, MAX_WORKERS))
    reason = f"one process decodes {rate:,.0f} images/s, {cores} cores for this rank"
    if demand is None:
        workers, reason = most, f"{reason}, what the step takes is not known yet"
    else:
        wanted = max(1, math.ceil(SPARE * demand / rate))
        workers, reason = min(wanted, most), f"{reason}, the step took {demand:,.0f} images/s"
        if wanted > most:
            reason += f": {wanted} processes would be needed, the step will wait for data"
    prefetch = max(1, min(data.prefetch, most_ready_bytes // (workers * micro_batch_bytes)))
    if prefetch < data.prefetch:
        reason += f"; prefetch lowered from {data.prefetch} to fit {most_ready_bytes / 1e6:,.0f} MB"
    return Loading(workers, prefetch, micro_batch_bytes, reason)


def ready_bytes(local_ranks: int) -> int:
    """What the loader of one rank may fill: its share of MAX_READY_BYTES, and of half of what /dev/shm has left."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else MAX_READY_BYTES
    return min(MAX_READY_BYTES, free // 2) // local_ranks


def this_worker() -> tuple[int, int]:
    """(number of this loader process, number of loader processes); (0, 1) in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@contextmanager
def cores_are(cores: int) -> Iterator[None]:
    """Within the block this process counts on `cores` for itself: the share on which the ranks have agreed."""
    global _own_cores
    before, _own_cores = _own_cores, cores
    try:
        yield
    finally:
        _own_cores = before


_own_cores: int | None = None  # of this process, as torch's number of threads is


def cores_for_rank(local_ranks: int) -> int:
    """This rank's share of its node's cores: what `cores_are` set; else of those that it may run on, an equal part."""
    return max(1, usable_cores() // local_ranks) if _own_cores is None else _own_cores


def max_workers(data: Data, *, local_ranks: int) -> int:
    """Loader processes of this rank, at most."""
    return min(cores_for_rank(local_ranks), MAX_WORKERS) if data.workers == "auto" else data.workers


def decode_rate(
    load: Callable[[MicroBatch], object], batch: MicroBatch, *, seconds: float = MEASURE_S
) -> tuple[float, int]:
    """(images/s, images) of one process on one thread: `load` over parts of `batch`, for `seconds` at most.

    The first part is not counted: it imports, opens shards and fills caches.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load(_part(batch, 0))
        images, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            part = _part(batch, CHUNK + images)
            load(part)
            images += len(part.samples)
        return images / passed, images
    finally:
        torch.set_num_threads(threads)


def _part(batch: MicroBatch, first: int) -> MicroBatch:
    """CHUNK samples from `first` on, round and round."""
    chosen = slice(first % len(batch.samples), first % len(batch.samples) + CHUNK)
    views = None if batch.views is None else batch.views[chosen]
    return dataclasses.replace(batch, samples=batch.samples[chosen], views=views)
