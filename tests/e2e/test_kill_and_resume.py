"""A run killed at any moment and started again ends with the weights of one that was never killed, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest

from tests.whole_runs import assert_same_run

STAGE_FOLDERS = ("pretrain/checkpoints", "finetune/checkpoints")


def kill_group(process, number=signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):  # it has ended since the last look
        os.killpg(process.pid, number)
    process.communicate()


def checkpoint_being_written(run_dir) -> bool:
    return any(p.name.startswith(".") for f in STAGE_FOLDERS for p in (run_dir / f).glob(".step-*"))


def steps_behind(run_dir) -> int:
    """Steps of both stages that the record knows of; what is behind a checkpoint is recorded again after a kill."""
    records = [run_dir / stage / "metrics.jsonl" for stage in ("pretrain", "finetune")]
    return sum(path.read_bytes().count(b"\n") for path in records if path.exists())


def run_until_done_killing(livt, run_dir, *, kills: int, steps: int, seed: int, **sets) -> int:
    """Kill `kills` times, soon after randomly drawn steps of the run, every second time inside a checkpoint."""
    rng, done = random.Random(seed), 0
    moments = sorted(rng.sample(range(1, steps - 3), kills))
    while True:
        process = livt.start(*livt.train_words(run_dir, **sets))
        moments = [m for m in moments if m > steps_behind(run_dir)]
        inside_checkpoint = done % 2 == 1
        while moments and process.poll() is None and steps_behind(run_dir) < moments[0]:
            time.sleep(0.001)
        while moments and inside_checkpoint and process.poll() is None and not checkpoint_being_written(run_dir):
            time.sleep(0.0002)
        if moments and process.poll() is None:
            time.sleep(0 if inside_checkpoint else rng.uniform(0, 0.05))
            kill_group(process)
            done += 1
            continue
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return done


def test_three_kills_change_nothing(livt, finished):
    assert run_until_done_killing(livt, livt.folder / "run", kills=3, steps=36, seed=1) >= 2
    assert_same_run(livt.folder / "run", finished)


@pytest.mark.slow
def test_twenty_kills_change_nothing(livt):
    sets = {"stages__pretrain__epochs": 16, "stages__finetune__epochs": 16}
    livt.train(livt.folder / "whole", **sets)
    assert run_until_done_killing(livt, livt.folder / "run", kills=24, steps=288, seed=2, **sets) >= 20
    assert_same_run(livt.folder / "run", livt.folder / "whole")
    for run in ("whole", "run"):
        livt.run("export", str(livt.folder / run), "--out", str(livt.folder / f"{run} exported"))
    one, other = (livt.folder / f"{run} exported" / "model.safetensors" for run in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR2, signal.SIGINT]
)
def test_a_signal_saves_exits_85_and_the_run_goes_on_exactly(livt, finished, number):
    run_dir = livt.folder / "run"
    process = livt.start(*livt.train_words(run_dir, checkpoint__every_steps=1000), "--stage=pretrain")
    while process.poll() is None and steps_behind(run_dir) < 5:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the loader's processes get it too
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 85, said
    assert f"stopped by {number.name} after step" in said
    livt.train(run_dir, checkpoint__every_steps=1000, stage="pretrain")
    assert_same_run(run_dir, finished, stages=["pretrain"])


def test_a_run_that_is_done_without_its_final_checkpoint_says_how_to_train_on(livt, finished):
    run_dir = livt.folder / "run"
    livt.train(run_dir, checkpoint__keep_last=3, stage="pretrain")
    shutil.rmtree(sorted((run_dir / "pretrain" / "checkpoints").glob("step-*"))[-1])
    status = run_dir / "pretrain" / "status.json"
    said = livt.train(run_dir, checkpoint__keep_last=3, stage="pretrain")
    assert f"its final checkpoint is gone or damaged: remove {status}" in said
    status.unlink()
    livt.train(run_dir, checkpoint__keep_last=3, stage="pretrain")
    assert_same_run(run_dir, finished, stages=["pretrain"])


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
    said = livt.train(run_dir, stage="pretrain")
    assert f"{newest} is damaged and not used" in said
    assert victim.name in said
    assert_same_run(run_dir, finished, stages=["pretrain"])
