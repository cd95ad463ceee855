"""Shards at a URL fetched before a loader process needs them.

The order is a pure function, so a loader process knows which shards come next: `fetched_ahead` passes batches through
and meanwhile fetches the next `data.cache.ahead` shards into the node's cache. `shards_in_view` and
`check_evaluation_room` compute how many shards a node reads at a time, so that a cache that is too small is refused at
the start.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np

from livt_scale.data.order.class_balanced import Repeated
from livt_scale.data.order.instance import Ints, Order, SampleOrder
from livt_scale.data.remote.cache import closing_fd
from livt_scale.data.remote.fetch import Cancelled
from livt_scale.data.remote.shards import held_bytes
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import LivtError

MAX_BATCHES_AHEAD = 256  # micro-batches that a loader process looks ahead
FETCHERS = 2  # files that a loader process fetches at a time


def check_evaluation_room(
    shards: ShardSet, *, batch: int, ranks: int, workers: int, train: ShardSet | None = None
) -> None:
    """Raises DataError if the cache is too small for an evaluation of a set at a URL. Sets in a folder need no cache.

    Each of the node's `ranks` reads a contiguous run of samples, its `workers` loader processes one batch each.
    `train`: the set that stays open meanwhile. Its shards may be evicted and are fetched again for training.
    """
    if shards.remote is None:
        return
    workers = max(1, workers)
    shards.remote.check_room(
        shards.manifest,
        in_view=min(len(shards.manifest.shards), ranks * _most_shards(shards.usable_per_shard, workers * batch)),
        processes=ranks * workers,
        beside=held_bytes(train.manifest) if train is not None and train.remote else 0,
        what="an evaluation",
    )


class HasSamples(Protocol):
    @property
    def samples(self) -> Ints: ...


Batch = TypeVar("Batch", bound=HasSamples)


def fetched_ahead(batches: Iterator[Batch], shards: ShardSet) -> Generator[Batch]:
    """Yields `batches` unchanged, while the next `data.cache.ahead` shards they need are fetched.

    A failed fetch is ignored here: the reader tries again and raises the error.
    """
    if shards.remote is None:
        yield from batches
        return
    waiting: deque[tuple[Batch, list[int]]] = deque()
    in_view: Counter[int] = Counter()  # shard -> batches that wait and need it
    fetchers = _Fetchers(shards)
    try:
        while True:
            now = set(waiting[0][1]) if waiting else set()
            while len(waiting) < 2 or (
                len(waiting) < MAX_BATCHES_AHEAD and len(in_view.keys() - now) < shards.remote.data.cache.ahead
            ):
                batch = next(batches, None)
                if batch is None:
                    break
                needed = np.unique(shards.shard_of(batch.samples)).tolist()
                fetchers.want([shard for shard in needed if shard not in in_view])
                in_view.update(needed)
                waiting.append((batch, needed))
                now = now or set(needed)
            if not waiting:
                return
            batch, needed = waiting.popleft()
            yield batch
            in_view.subtract(needed)
            in_view = +in_view
            fetchers.drop([shard for shard in needed if shard not in in_view])
    finally:
        fetchers.stop()


def shards_in_view(order: SampleOrder, samples_per_shard: Ints, *, ranks: int, world_size: int) -> int:
    """Upper bound on the shards that `ranks` neighbouring ranks read at a time: a window of each of their groups."""
    base = order.base if isinstance(order, Repeated) else order
    if not isinstance(base, Order):
        return len(samples_per_shard)  # sampled by class: any shard at any time
    groups = -(-base.lane_groups * ranks // world_size)
    if base.lane_groups * ranks % world_size and world_size % (base.lane_groups * ranks):
        groups += 1  # a node begins inside a group
    in_group = base.steps_per_epoch * base.global_batch // base.lane_groups
    window = math.ceil(in_group / max(1, round(in_group / base.window)))
    run = window + base.num_samples - base.steps_per_epoch * base.global_batch  # with those that the epoch leaves out
    return min(len(samples_per_shard), groups * _most_shards(samples_per_shard, run))


def _most_shards(samples_per_shard: Ints, run: int) -> int:
    """Most shards that `run` neighbouring samples can span: full shards, and a part of one at each end."""
    return int(np.searchsorted(np.cumsum(np.sort(samples_per_shard)), run, side="right")) + 2


class _Fetchers:
    """Threads of a loader process that fetch shards into the cache; daemons, so they end with the process.

    A shard that was read before a thread came to it is not fetched: in a small cache it may be evicted by then.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._cancelled: dict[int, threading.Event] = {}  # of each shard that is wanted
        self._queue: SimpleQueue[tuple[int, threading.Event] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: list[int]) -> None:
        for shard in shards:
            self._cancelled[shard] = threading.Event()
            self._queue.put((shard, self._cancelled[shard]))

    def drop(self, shards: list[int]) -> None:
        for shard in shards:
            self._cancelled.pop(shard).set()

    def stop(self) -> None:
        self.drop(list(self._cancelled))
        for _ in self._threads:
            self._queue.put(None)

    def _work(self) -> None:
        while (wanted := self._queue.get()) is not None:
            shard, cancelled = wanted
            remote, info = self._shards.remote, self._shards.manifest.shards[shard]
            assert remote is not None
            if not cancelled.is_set() and not remote.cache.has(info):
                with contextlib.suppress(LivtError, Cancelled), closing_fd(remote.hold(info, cancelled=cancelled)):
                    pass
