"""What breaks under a run: a full disk, a damaged shard, a dead rank. One line says so, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time

import pytest

from livt_scale.data.shard_set import ShardSet
from livt_scale.train.run_files import read_status
from tests.whole_runs import assert_same_run, small_sets

MIB = 2**20


def test_a_disk_that_fills_at_a_save_stops_with_the_cause_and_the_run_goes_on_later(livt, finished):
    """The limit on a file's size stands for the full disk: the write fails in the middle, as with ENOSPC."""
    run_dir = livt.folder / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 4, before[1]))  # inherited; a checkpoint here is 0.9 MiB
    try:
        said = livt.train(run_dir, data__workers=0, stage="pretrain", expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint" in said
    assert "Traceback" not in said
    assert read_status(run_dir, "pretrain")["state"] == "failed"
    assert [p.name for p in (run_dir / "pretrain" / "checkpoints").iterdir()] == []
    livt.train(run_dir, stage="pretrain")
    assert_same_run(run_dir, finished, stages=["pretrain"])


def test_a_damaged_sample_is_named_with_shard_offset_and_key(livt):
    copy = livt.folder / "a copy's folder"
    shutil.copytree(small_sets() / "train-lt", copy)
    shards = ShardSet.open(copy)
    row = shards.index[700]
    key = shards.keys([700])[0]
    path = shards.shard_path(int(shards.shard_of([700])[0]))
    with path.open("r+b") as file:
        file.seek(int(row["start"]) + int(row["data_offset"]) + 40)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    said = livt.train(livt.folder / "run", data__train=str(copy), expect=1)
    for part in (path.name, str(row["start"]), key, "livt: error"):
        assert part in said
    assert "Traceback" not in said
    assert "livt shards verify" in said


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_within_its_bound_and_it_goes_on_exactly(livt):
    """torchrun ends the other rank; what counts is that nothing hangs and that the next start continues."""
    whole, broken = livt.folder / "whole", livt.folder / "broken"
    livt.train(whole, processes=2)
    process = livt.start(*livt.train_words(broken, parallel__timeout_s=30), processes=2)
    while process.poll() is None and not list((broken / "pretrain" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    livt.train(broken, processes=2)
    assert_same_run(broken, whole)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123  no file on a disk
        return [int(word) for word in file.read().split()]
