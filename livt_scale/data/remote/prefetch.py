"""A set of shards at a URL, read through the node's cache.

`open_set(url, data)` fetches the manifest, which carries its own digest, then index and keys, checked by it; shards
come whole, each when it is first needed or, in training, some ahead of that (`fetched_ahead`): the order is a pure
function, so a loader process knows which come next. A set's index and keys are held in the cache for as long as the
set is open. Each process asks for the manifest and the quarantine; everything else is fetched once a node.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from livt_scale.config.recipe import Data
from livt_scale.data.manifest import MANIFEST, QUARANTINE, FileInfo, Manifest
from livt_scale.data.order.class_balanced import Repeated
from livt_scale.data.order.instance import Ints, Order, SampleOrder
from livt_scale.data.remote.cache import Cache, closing_fd, too_small
from livt_scale.data.remote.fetch import Cancelled, Fetcher, is_as_told
from livt_scale.util.errors import LivtError, ManifestError, RemoteError, UsageError
from livt_scale.util.urls import below, url_problem

if TYPE_CHECKING:
    from livt_scale.data.manifest import ShardSet

MAX_MANIFEST_BYTES = 2**30
GRACE_S = 60.0  # a process that waits for another's fetch waits longer than that one may take
MAX_BATCHES_AHEAD = 256  # micro-batches a loader process looks ahead
FETCHERS = 2  # files that a loader process fetches at a time


class Held:
    """An open descriptor, closed when this is dropped: the file stays in the cache until then."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


@dataclass(frozen=True)
class RemoteFiles:
    """The files of the set at `url`. May be pickled: what is kept open is this process's own."""

    url: str
    data: Data
    cache: Cache
    _kept: dict[str, Held] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.data, self.cache)

    @classmethod
    def at(cls, url: str, data: Data | None) -> RemoteFiles:
        if problem := url_problem(url):
            raise UsageError(f"this URL of shards cannot be: {problem}")
        data = data or Data(train=url)
        cache = Cache.of(data.cache)
        cache.tidy()
        return cls(url, data, cache)

    def hold(self, info: FileInfo, *, cancelled: threading.Event | None = None) -> int:
        """A descriptor of the file, fetched if need be; the caller closes it. Raises RemoteError and DataError."""
        remote = self.data.remote
        fetcher = Fetcher(self.url, remote)

        def fetch(path: Path) -> None:
            check = is_as_told(info.bytes, info.sha256)
            fetcher.fetch(info.name, path, most_bytes=info.bytes, check=check, cancelled=cancelled)

        return self.cache.hold(info, fetch, wait_s=remote.deadline_s + GRACE_S, cancelled=cancelled)

    def keep(self, info: FileInfo) -> None:
        """Hold the file until this is dropped, and with it the set."""
        self._kept[info.sha256] = Held(self.hold(info))

    def name(self, info: FileInfo) -> str:
        return below(self.url, info.name)

    def manifest(self) -> Manifest:
        """Raises RemoteError; ManifestError where what lies there is whole and yet no manifest of ours."""
        with tempfile.TemporaryDirectory(prefix="livt-") as folder:
            path, wrong = Path(folder) / MANIFEST, list[ManifestError]()

            def check(_: Path) -> str:
                try:
                    Manifest.read(Path(folder))
                except ManifestError as error:
                    wrong.append(error)
                    return error.message
                return ""

            try:
                Fetcher(self.url, self.data.remote).fetch(MANIFEST, path, most_bytes=MAX_MANIFEST_BYTES, check=check)
            except RemoteError:
                if not wrong:
                    raise
                where = below(self.url, MANIFEST)
                raise ManifestError(wrong[-1].message.replace(str(path), where), remedy=wrong[-1].remedy) from None
            return Manifest.read(Path(folder))

    def quarantine(self) -> bytes | None:
        """What quarantine.json holds; None if there is none. A server that hides that it is not there is an error."""
        with tempfile.TemporaryDirectory(prefix="livt-") as folder:
            path = Path(folder) / QUARANTINE
            fetcher = Fetcher(self.url, self.data.remote)
            there = fetcher.fetch(QUARANTINE, path, most_bytes=MAX_MANIFEST_BYTES, may_miss=True)
            return path.read_bytes() if there else None

    def check_room(
        self, manifest: Manifest, *, in_view: int, processes: int, beside: int = 0, what: str = "this order"
    ) -> None:
        """Raises DataError where the limit is below what `processes` loader processes of this node use at a time.

        `in_view`: shards among which they read. Each also fetches some ahead; the whole set always suffices. `beside`:
        bytes that another set holds in the cache for good.
        """
        sizes = sorted((s.bytes for s in manifest.shards), reverse=True)
        needed = beside + held_bytes(manifest) + sum(sizes[: in_view + processes * self.data.cache.ahead])
        if needed > self.cache.limit:
            raise too_small(self.cache.limit, needed, f"{what}, with {processes} loader processes on the node,")


def held_bytes(manifest: Manifest) -> int:
    """What a set keeps in the cache for as long as it is open."""
    return manifest.index.bytes + manifest.keys.bytes


def check_evaluation_room(
    shards: ShardSet, *, batch: int, ranks: int, workers: int, train: ShardSet | None = None
) -> None:
    """Raises DataError where the limit is below what an evaluation uses of a set at a URL; nothing for one in a folder.

    Each of the node's `ranks` reads a run of samples, its `workers` loader processes a batch each of it, side by side.
    `train`: the set that stays open meanwhile. Its shards may go: they are fetched again when training goes on.
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
    """The same batches; meanwhile the shards that the next ones need are fetched, `data.cache.ahead` of them.

    A fetch that fails is left to the reader, who meets the same and tells of it.
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
    finally:
        fetchers.stop()


def shards_in_view(order: SampleOrder, samples_per_shard: Ints, *, ranks: int, world_size: int) -> int:
    """Shards among which `ranks` neighbouring ranks shuffle at a time, at most: a window of each of their groups."""
    base = order.base if isinstance(order, Repeated) else order
    if not isinstance(base, Order):
        return len(samples_per_shard)  # drawn by class: all shards at any time
    groups = -(-base.lane_groups * ranks // world_size)
    if base.lane_groups * ranks % world_size and world_size % (base.lane_groups * ranks):
        groups += 1  # a node begins inside a group
    in_group = base.steps_per_epoch * base.global_batch // base.lane_groups
    window = math.ceil(in_group / max(1, round(in_group / base.window)))
    run = window + base.num_samples - base.steps_per_epoch * base.global_batch  # with those that the epoch leaves out
    return min(len(samples_per_shard), groups * _most_shards(samples_per_shard, run))


def _most_shards(samples_per_shard: Ints, run: int) -> int:
    """That `run` neighbouring samples can lie in: whole shards, and a part of one at each end."""
    return int(np.searchsorted(np.cumsum(np.sort(samples_per_shard)), run, side="right")) + 2


class _Fetchers:
    """Threads of a loader process that bring shards into the cache; they end with the process, whatever they do."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._stopped = shards, threading.Event()
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: list[int]) -> None:
        for shard in shards:
            self._wanted.put(shard)

    def stop(self) -> None:
        self._stopped.set()
        for _ in self._threads:
            self._wanted.put(None)

    def _work(self) -> None:
        while (shard := self._wanted.get()) is not None and not self._stopped.is_set():
            remote, info = self._shards.remote, self._shards.manifest.shards[shard]
            assert remote is not None
            if not remote.cache.has(info):
                with contextlib.suppress(LivtError, Cancelled), closing_fd(remote.hold(info, cancelled=self._stopped)):
                    pass
