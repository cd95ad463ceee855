"""The files of a set of shards at a URL, fetched through the node's cache.

The manifest carries its own digest; it verifies index, keys and shards. Each process fetches manifest and quarantine
for itself, everything else is fetched once per node. Index and keys stay in the cache for as long as the set is open;
a shard is fetched when it is first needed, or ahead of that (`livt_scale.data.remote.prefetch`).
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import Data
from livt_scale.data.manifest import MANIFEST, QUARANTINE, FileInfo, ShardManifest
from livt_scale.data.remote.cache import ShardCache, too_small
from livt_scale.data.remote.fetch import Fetcher, matches
from livt_scale.util.errors import ManifestError, RemoteError, UsageError
from livt_scale.util.outside import MAX_BYTES, read_checked
from livt_scale.util.urls import below, url_problem

GRACE_S = 60.0  # a process that waits for another's fetch waits longer than that one may take


class Held:
    """An open file descriptor, closed when this object is deleted: the file stays in the cache until then."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


@dataclass(frozen=True)
class RemoteShards:
    """The files of the set at `url`. Can be pickled; open files belong to one process."""

    url: str
    data: Data
    cache: ShardCache
    _kept: dict[str, Held] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.data, self.cache)

    @classmethod
    def at(cls, url: str, data: Data | None) -> RemoteShards:
        if problem := url_problem(url):
            raise UsageError(f"the URL of the shards is invalid: {problem}")
        data = data or Data(train=url)
        cache = ShardCache.of(data.cache)
        cache.tidy()
        return cls(url, data, cache)

    def hold(self, info: FileInfo, *, cancelled: threading.Event | None = None) -> int:
        """A descriptor of the file, fetched if necessary; the caller closes it. Raises RemoteError and DataError."""
        remote = self.data.remote
        fetcher = Fetcher(self.url, remote)

        def fetch(path: Path) -> None:
            check = matches(info.bytes, info.sha256)
            fetcher.fetch(info.name, path, most_bytes=info.bytes, check=check, cancelled=cancelled)

        return self.cache.hold(info, fetch, wait_s=remote.deadline_s + GRACE_S, cancelled=cancelled)

    def keep(self, info: FileInfo) -> None:
        """Hold the file for as long as this object exists."""
        self._kept[info.sha256] = Held(self.hold(info))

    def name(self, info: FileInfo) -> str:
        return below(self.url, info.name)

    def manifest(self) -> ShardManifest:
        """Raises RemoteError, and ManifestError if the file there is not a valid manifest."""
        with tempfile.TemporaryDirectory(prefix="livt-") as folder:
            path, wrong = Path(folder) / MANIFEST, list[ManifestError]()

            def check(_: Path) -> str:
                try:
                    ShardManifest.read(Path(folder))
                except ManifestError as error:
                    wrong.append(error)
                    return error.message
                return ""

            try:
                Fetcher(self.url, self.data.remote).fetch(MANIFEST, path, most_bytes=MAX_BYTES["manifest"], check=check)
            except RemoteError:
                if not wrong:
                    raise
                where = below(self.url, MANIFEST)
                raise ManifestError(wrong[-1].message.replace(str(path), where), remedy=wrong[-1].remedy) from None
            return ShardManifest.read(Path(folder))

    def quarantine(self) -> bytes | None:
        """The contents of quarantine.json; None if it does not exist. A server that does not answer 404 is an error."""
        with tempfile.TemporaryDirectory(prefix="livt-") as folder:
            path = Path(folder) / QUARANTINE
            fetcher = Fetcher(self.url, self.data.remote)
            there = fetcher.fetch(QUARANTINE, path, most_bytes=MAX_BYTES["quarantine"], may_miss=True)
            return read_checked(path, "quarantine") if there else None

    def check_room(
        self, manifest: ShardManifest, *, in_view: int, processes: int, beside: int = 0, what: str = "this order"
    ) -> None:
        """Raises DataError if the limit is below what `processes` loader processes of this node use at a time.

        `in_view`: shards among which they read; each process also fetches some ahead. Room for the full set is always
        enough. `beside`: bytes that another open set keeps in the cache.
        """
        sizes = sorted((s.bytes for s in manifest.shards), reverse=True)
        needed = beside + held_bytes(manifest) + sum(sizes[: in_view + processes * self.data.cache.ahead])
        if needed > self.cache.limit:
            raise too_small(self.cache.limit, needed, f"{what}, with {processes} loader processes on the node,")


def held_bytes(manifest: ShardManifest) -> int:
    """Bytes that a set keeps in the cache for as long as it is open."""
    return manifest.index.bytes + manifest.keys.bytes
