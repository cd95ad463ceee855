"""A run whose shards lie behind a bad server, killed in mid-download, ends as the one that read local files."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil

from livt_scale.data.manifest import ShardSet
from tests.data.flaky_server import FAULTS, FlakyServer
from tests.whole_runs import REPO, assert_same_run

SETS = REPO / "shards" / "fashion-mnist-lt"


def sets_for(server: FlakyServer, cache: Path, **more):
    quick = {"tries": 12, "connect_timeout_s": 5, "stall_timeout_s": 5, "deadline_s": 120}
    where = {"data__train": f"{server.url}/train-lt", "data__val": f"{server.url}/val"}
    return where | {"data__cache__dir": cache, "data__remote": quick, **more}


def test_a_rank_killed_in_mid_download_leaves_a_cache_that_the_next_start_uses(livt, finished, monkeypatch):
    for name in os.environ:
        if "proxy" in name.lower():
            monkeypatch.delenv(name)
    cache = livt.folder / "a cache"
    own = ShardSet.open(SETS / "train-lt").manifest
    stalled, asked = own.shards[-1].name, threading.Event()

    def plan(name: str, before: int) -> str:
        if name.endswith(stalled) and not before:
            asked.set()
            return "stall"
        return FAULTS[(len(name) + before) % len(FAULTS)] if before == 0 and not name.endswith(".json") else ""

    with FlakyServer(SETS, plan) as server:
        sets = sets_for(server, cache)
        run_dir = livt.folder / "run"
        process = livt.start(*livt.train_words(run_dir, **sets), processes=2)
        assert asked.wait(120)
        for part in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.communicate(timeout=120)
        parts = [p for p in (cache / "v1").iterdir() if p.name.endswith(".part")]
        assert [p for p in parts if p.name.startswith(own.shards[-1].sha256)]  # killed in the midst of this one
        whole = {p.name for p in (cache / "v1").iterdir() if len(p.name) == 64}
        before = dict(server.requests)

        livt.train(run_dir, processes=2, **sets)
        kept = [s for s in own.shards if s.sha256 in whole]
        assert kept
        again = [s.name for s in kept if server.requests[f"train-lt/{s.name}"] > before.get(f"train-lt/{s.name}", 0)]
        assert again == []  # what had come whole is not fetched twice
        assert not [p for p in (cache / "v1").iterdir() if p.name.endswith(".part")]
        livt.train(livt.folder / "one", **sets)
    assert_same_run(livt.folder / "one", finished)
