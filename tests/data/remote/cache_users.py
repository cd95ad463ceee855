"""Processes that use one cache, for tests: python -m tests.data.remote.cache_users WHAT FOLDER LIMIT URL …"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from livt_scale.config.recipe import Remote
from livt_scale.data.manifest import FileInfo
from livt_scale.data.remote.cache import ShardCache, closing_fd
from livt_scale.data.remote.fetch import Fetcher, matches

REMOTE = Remote(tries=3, connect_timeout_s=5, stall_timeout_s=20, deadline_s=60)


def hold(cache: ShardCache, info: FileInfo, url: str) -> int:
    def fetch(path: Path) -> None:
        check = matches(info.bytes, info.sha256)
        Fetcher(url, REMOTE).fetch(info.name, path, most_bytes=info.bytes, check=check)

    return cache.hold(info, fetch, wait_s=60)


def main(what: str, folder: str, limit: str, url: str, seed: str, rounds: str, *infos: str) -> None:
    cache = ShardCache(Path(folder), int(limit))
    files = [FileInfo.model_validate_json(info) for info in infos]
    draw = random.Random(int(seed))
    print("ready", flush=True)
    for _ in range(int(rounds)):
        info = draw.choice(files)
        with closing_fd(hold(cache, info, url)) as handle:
            assert os.pread(handle, info.bytes, 0) == bytes([int(info.name[1:3])]) * info.bytes
            if what == "keep":
                print("holding", flush=True)
                time.sleep(600)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
