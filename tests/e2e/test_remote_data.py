"""A run whose shards lie behind a bad server, killed in mid-download, ends as the one that read local files."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from livt_scale.data.shard_set import ShardSet
from tests.data.remote.flaky_server import FAULTS, FlakyServer
from tests.whole_runs import assert_same_run, small_sets


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in os.environ:
        if "proxy" in name.lower():
            monkeypatch.delenv(name)


def sets_for(server: FlakyServer, cache: Path):
    quick = {"tries": 12, "connect_timeout_s": 5, "stall_timeout_s": 5, "deadline_s": 120}
    where = {"data__train": f"{server.url}/train-lt", "data__val": f"{server.url}/val"}
    return where | {"data__cache__dir": cache, "data__remote": quick}


def fault(name: str, before: int) -> str:
    """Each file but the small ones fails when it is first asked for."""
    return FAULTS[len(name) % len(FAULTS)] if before == 0 and not name.endswith(".json") else ""


def kill_all(process) -> None:
    """The launcher, the ranks and their loader processes, none of which gets to tidy up."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "stages"),
    [(1, ("pretrain",)), (2, ("pretrain", "finetune"))],
)
def test_a_rank_killed_in_mid_download_leaves_a_cache_that_the_next_start_uses(livt, finished, processes, stages):
    cache, asked = livt.folder / "a cache", threading.Event()
    own = ShardSet.open(small_sets() / "train-lt").manifest
    stalled = own.shards[-1]

    def plan(name: str, before: int) -> str:
        if name.endswith(stalled.name) and not before:
            asked.set()
            return "stall"
        return fault(name, before)

    def lying(suffix: str) -> set[str]:
        return {p.name for p in (cache / "v1").iterdir() if p.name.endswith(suffix)}

    with FlakyServer(small_sets(), plan) as server:
        sets, run_dir = sets_for(server, cache), livt.folder / "run"
        words = [*livt.train_words(run_dir, **sets), *(["--stage", *stages] if len(stages) == 1 else [])]
        process = livt.start(*words, processes=processes)
        assert asked.wait(120)
        give_up = time.monotonic() + 4  # below the time after which the stalled one is tried again
        while not (whole := lying("") & {s.sha256 for s in own.shards}) and time.monotonic() < give_up:
            time.sleep(0.01)
        kill_all(process)
        assert [name for name in lying(".part") if name.startswith(stalled.sha256)]  # killed in the midst of this one
        assert whole
        before = dict(server.requests)

        livt.run(*words, processes=processes)
        kept = [f"train-lt/{s.name}" for s in own.shards if s.sha256 in whole]
        assert [name for name in kept if server.requests[name] > before.get(name, 0)] == []  # nothing fetched twice
        assert not lying(".part")
    if processes > 1:  # sums over ranks round in another order
        finished = livt.folder / "from files"
        livt.train(finished, processes=processes)
    assert_same_run(run_dir, finished, stages=stages)


def test_a_run_is_evaluated_on_a_set_at_a_url_as_on_its_files(livt, finished, monkeypatch):
    """By two ranks that share a cache, through a fault a file: the report is that of the run itself."""
    monkeypatch.setenv("LIVT_CACHE_DIR", str(livt.folder / "a cache"))
    with FlakyServer(small_sets(), fault) as server:
        url = f"{server.url}/val"
        report = json.loads(livt.run("eval", str(finished), "--data", url, "--json", processes=2).stdout)
        val = ShardSet.open(small_sets() / "val").manifest
        assert {name for name in server.requests if name.endswith(".tar")} == {f"val/{s.name}" for s in val.shards}
        assert max(n for name, n in server.requests.items() if not name.endswith(".json")) <= 3
    own = json.loads((finished / "finetune" / "eval.json").read_text())
    assert report["data"] == own["data"] | {"folder": url}
    for field in ("top1", "top5", "per_class", "confusion", "num_samples"):
        assert report[field] == own[field]
    assert report["calibration"]["ece"] == pytest.approx(own["calibration"]["ece"], abs=1e-6)
