"""A run killed at any moment and started again ends with the weights of one that was never killed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.whole_runs import assert_same_run

STAGE_FOLDERS = ("pretrain/checkpoints", "finetune/checkpoints")


def kill_group(process, number=signal.SIGKILL) -> None:
    os.killpg(process.pid, number)
    process.communicate()


def checkpoint_being_written(run_dir) -> bool:
    return any(p.name.startswith(".") for f in STAGE_FOLDERS for p in (run_dir / f).glob(".step-*"))


def run_until_done_killing(livt, run_dir, *, kills: int, seed: int) -> int:
    """Start again and again, killing at random moments, every third time inside a checkpoint; kills done."""
    rng, done = random.Random(seed), 0
    for attempt in range(kills + 1):
        process = livt.start(*livt.train_words(run_dir))
        if attempt < kills:
            inside_checkpoint = attempt % 3 == 2
            while process.poll() is None and not (run_dir / "pretrain" / "status.json").exists():
                time.sleep(0.01)  # the first start: until training begins
            limit = time.monotonic() + (60 if inside_checkpoint else rng.uniform(0.5, 9))
            while process.poll() is None and time.monotonic() < limit:
                if inside_checkpoint and checkpoint_being_written(run_dir):
                    break
                time.sleep(0.0005 if inside_checkpoint else 0.01)
            if process.poll() is None:
                kill_group(process)
                done += 1
                continue
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    return done


def test_three_kills_change_nothing(livt, finished):
    assert run_until_done_killing(livt, livt.folder / "run", kills=3, seed=1) >= 2
    assert_same_run(livt.folder / "run", finished)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_change_nothing(livt, finished):
    assert run_until_done_killing(livt, livt.folder / "run", kills=20, seed=2) >= 15
    assert_same_run(livt.folder / "run", finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_exits_85_and_the_run_goes_on_exactly(livt, finished, number):
    run_dir = livt.folder / "run"
    process = livt.start(*livt.train_words(run_dir, checkpoint__every_steps=1000))
    while process.poll() is None and not (run_dir / "pretrain" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 85, said
    assert f"stopped by {number.name} after step" in said
    livt.train(run_dir, checkpoint__every_steps=1000)
    assert_same_run(run_dir, finished)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(livt, finished):
    run_dir = livt.folder / "run"
    process = livt.start(*livt.train_words(run_dir, checkpoint__keep_last=3))
    folder = run_dir / "pretrain" / "checkpoints"
    while process.poll() is None and len(list(folder.glob("step-*"))) < 2:
        time.sleep(0.005)
    kill_group(process)
    newest = sorted(folder.glob("step-*"))[-1]
    victim = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    said = livt.train(run_dir)
    assert f"{newest} is damaged and not used" in said
    assert victim.name in said
    assert_same_run(run_dir, finished)
