"""A rank that dies, hangs or fails alone ends the run within a stated bound, and the others say which rank and why."""

from __future__ import annotations

import json
import signal

import pytest

from livt_scale.train import heartbeat
from livt_scale.train.run_files import read_status
from livt_scale.train.watchdog import DUMP_S, LINGER_S, LOCKED_S
from tests.chaos.ranks import Ranks, assert_same_pretraining

GONE_S = 15.0  # on top of a bound: what ending takes where many others compute; alone it is 1 s
HANG_S = 3.0


def first_steps_done(run_dir, steps: int = 3) -> bool:
    path = run_dir / "pretrain" / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= steps


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other_at_once_and_the_run_goes_on_exactly(livt, unbroken, victim):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "slow:0.05") as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 5))
        ranks.kill(victim)
        codes, took_s = ranks.ended(1 - victim, within_s=30)
    assert codes == [1]
    assert took_s < GONE_S  # parallel.timeout_s is 600
    said = ranks.said(1 - victim)
    assert f"livt: error on rank {1 - victim}: rank {victim} is gone: last seen at step" in said
    assert f"process {ranks.processes[victim].pid} on " in said
    assert "Traceback" not in said
    status = read_status(run_dir, "pretrain")
    assert status["state"] == "failed"
    assert f"rank {victim} is gone" in status["why"]
    with Ranks(livt, run_dir) as ranks:
        assert ranks.ended(within_s=120)[0] == [0, 0], ranks.said(0)
    assert_same_pretraining(run_dir, unbroken)


def test_an_error_of_one_rank_alone_ends_the_others_at_once_with_its_words(livt):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "error:5:1") as ranks:
        codes, _ = ranks.ended(within_s=60)
        assert codes == [1, 1]
    assert "livt: error on rank 1: shard x.tar, offset 512, key a-key: not an image" in ranks.said(1)
    assert "livt: error on rank 0: rank 1 stopped: shard x.tar, offset 512, key a-key: not an image" in ranks.said(0)
    assert "Traceback" not in ranks.said(0) + ranks.said(1)
    assert "rank 1 stopped: shard x.tar" in read_status(run_dir, "pretrain")["why"]
    beats = heartbeat.read(run_dir / "pretrain", world_size=2)
    assert [beat.state for beat in beats] == ["peer_lost", "failed"]
    assert beats[1].step == 4


def test_a_rank_that_waits_in_a_collective_for_ever_ends_with_the_reason_of_the_one_that_failed(livt):
    """As under NCCL, where neither a collective nor destroying a group ends when a rank is gone."""
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "nccl", "error:5:1") as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 4))
        codes, took_s = ranks.ended(within_s=60)
    assert codes == [1, 1]
    assert took_s < 3 + LINGER_S + GONE_S  # faults.stall_timeout_s is 540
    assert "livt: error on rank 1: shard x.tar, offset 512, key a-key: not an image" in ranks.said(1)
    assert "livt: error on rank 0: rank 1 stopped: shard x.tar, offset 512, key a-key: not an image" in ranks.said(0)
    assert "rank 1 stopped: shard x.tar" in read_status(run_dir, "pretrain")["why"]
    stacks = run_dir / "pretrain" / "stacks"
    assert "in patient" in (stacks / "rank-0.txt").read_text() or "wrapped" in (stacks / "rank-0.txt").read_text()
    recorded = json.loads((stacks / "collectives-0.json").read_text())["gloo"]["entries"]
    assert "gloo:all_reduce" in {entry["profiling_name"] for entry in recorded}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_where_collectives_wait_for_ever(livt, victim):
    run_dir = livt.folder / "run"
    others = [rank for rank in range(4) if rank != victim]
    with Ranks(livt, run_dir, "nccl", "slow:0.05", world=4) as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 5))
        ranks.kill(victim)
        codes, took_s = ranks.ended(*others, within_s=60)
    assert codes == [1, 1, 1]
    assert took_s < GONE_S
    for rank in others:
        assert f"rank {victim} is gone: last seen at step" in ranks.said(rank)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_within_the_bound_and_each_leaves_its_stacks(livt):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "hang:5:1", faults__stall_timeout_s=HANG_S) as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 4))
        codes, took_s = ranks.ended(within_s=60)
    assert codes == [1, 1]
    assert HANG_S / 2 < took_s < HANG_S + LINGER_S + GONE_S
    stacks = [(run_dir / "pretrain" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "sabotage.py" in stacks[1]
    assert "all_reduce" in stacks[0] or "backward" in stacks[0]
    assert all("came no further for" in text for text in stacks)
    why = read_status(run_dir, "pretrain")["why"]
    assert why.startswith("rank 0 came no further")
    assert "rank 1 came no further for 3 s in phase 'step' after step 4, at sabotage.py" in why
    for rank in (0, 1):
        assert f"livt: error on rank {rank}: rank {rank} came no further" in ranks.said(rank)


@pytest.mark.slow
def test_a_rank_whose_interpreter_is_locked_ends_too_and_leaves_its_stack(livt):
    run_dir = livt.folder / "run"
    # slow: the watchdog has seen the phase that is locked; until then the longer bound of a checkpoint holds
    with Ranks(livt, run_dir, "slow:0.7", "lock:4:0", world=1, faults__stall_timeout_s=HANG_S) as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 3))
        codes, took_s = ranks.ended(within_s=60)
    assert codes == [-signal.SIGKILL]
    assert took_s < HANG_S + LOCKED_S + DUMP_S + GONE_S
    assert "sabotage.py" in (run_dir / "pretrain" / "stacks" / "rank-0.txt").read_text()


def test_a_stopped_rank_is_named_as_the_one_behind_and_ends_when_it_wakes(livt):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "slow:0.05", faults__stall_timeout_s=HANG_S) as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir, 5))
        ranks.kill(1, signal.SIGSTOP)
        codes, took_s = ranks.ended(0, within_s=60)
        assert codes == [1]
        assert took_s < HANG_S + LINGER_S + GONE_S
        ranks.kill(1, signal.SIGCONT)
        codes, took_s = ranks.ended(1, within_s=60)
        assert codes == [1]
        assert took_s < HANG_S + LINGER_S + GONE_S
    assert (run_dir / "pretrain" / "stacks" / "rank-0.txt").stat().st_size > 0
    assert read_status(run_dir, "pretrain")["state"] == "failed"


@pytest.mark.slow
def test_a_flipped_bit_of_one_rank_ends_the_run_and_names_rank_and_tensor(livt):
    """Of two ranks nobody knows which one is right: both are named."""
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "flip:5:1", faults__digest_every_steps=2) as ranks:
        codes, _ = ranks.ended(within_s=60)
    assert codes == [1, 1]
    for rank in (0, 1):
        assert "after step 6 ranks 0, 1 hold another" in ranks.said(rank)
    saved = [p.name for p in (run_dir / "pretrain" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000003"]  # not the one of step 6


def test_status_tells_how_far_the_ranks_are(livt, unbroken):
    beats = heartbeat.read(unbroken / "pretrain", world_size=2)
    assert [(beat.rank, beat.state, beat.step) for beat in beats] == [(0, "done", 18), (1, "done", 18)]
    assert json.dumps(heartbeat.summary(beats))
