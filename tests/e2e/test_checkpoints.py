"""Saves that fail, saves on the node's own disk, and a recipe that changed under way: in whole runs."""

from __future__ import annotations

import shutil
import signal
import time

import pytest

from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.train.run_files import read_status
from tests.whole_runs import assert_same_run, final_weights, metrics

LONG = {"stages__pretrain__epochs": 200, "checkpoint__retries": 0, "checkpoint__max_failed_saves": 999}


@pytest.fixture
def full_disk(livt, monkeypatch):
    """full_disk("step > 6"): these checkpoints meet a full disk, in every process that `livt` starts from now on."""
    livt.module = "tests.e2e.full_disk"

    def full(when: str) -> None:
        monkeypatch.setenv("TEST_DISK_IS_FULL", when)

    return full


def steps(run_dir, stage: str = "pretrain") -> list[int]:
    return [info.position.step for info in list_checkpoints(run_dir / stage / "checkpoints")]


def test_saves_that_fail_are_told_and_the_run_ends_as_if_nothing_had_been(livt, finished, full_disk):
    run_dir = livt.folder / "run"
    full_disk("step in (6, 12)")
    said = livt.train(run_dir, checkpoint__retries=0)
    for step in (6, 12):
        assert f"step-{step:08d} was not saved: the disk is full" in said
    assert "training continues" in said
    status = read_status(run_dir, "pretrain")
    assert (status["state"], status["failed_saves"], status["failed_saves_in_a_row"]) == ("done", 2, 0)
    assert "step-00000012" in status["last_failed_save"]
    assert_same_run(run_dir, finished)


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_and_it_goes_on_later(livt, finished, full_disk):
    run_dir = livt.folder / "run"
    full_disk("6 <= step")
    said = livt.train(run_dir, checkpoint__retries=0, expect=1, stage="pretrain")
    assert "the last 3 saves have failed (checkpoint.max_failed_saves)" in said
    assert "Traceback" not in said
    assert steps(run_dir) == [3]
    full_disk("False")
    assert "resumed from step-00000003" in livt.train(run_dir, stage="pretrain")
    assert_same_run(run_dir, finished, stages=["pretrain"])


@pytest.mark.slow
def test_the_last_save_of_a_stage_must_succeed(livt, finished, full_disk):
    run_dir = livt.folder / "run"
    full_disk("step == 18")
    said = livt.train(run_dir, checkpoint__max_failed_saves=9, expect=1, stage="pretrain")
    assert "step-00000018 was not saved" in said
    assert "; retrying" in said
    assert read_status(run_dir, "pretrain")["state"] == "failed"
    full_disk("False")
    livt.train(run_dir, stage="pretrain")
    assert_same_run(run_dir, finished, stages=["pretrain"])


@pytest.mark.parametrize(
    ("when", "code", "expected"),
    [
        ("step > 6", 85, "could not be saved: it will resume from step 6"),  # it made progress: worth another start
        ("True", 1, "nor anything since the start"),  # another start would end here again
    ],
)
def test_a_run_stopped_while_the_disk_is_full_is_requeued_if_it_has_got_on(livt, full_disk, when, code, expected):
    run_dir = livt.folder / "run"
    full_disk(when)
    process = livt.start(*livt.train_words(run_dir, **LONG))
    wait_until(lambda: len(metrics(run_dir, "pretrain")) > 8, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert expected in said.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_quick_save_on_its_node(livt, finished):
    """Shared saves at the end of each epoch, step 9; quick ones every second step."""
    run_dir, disk = livt.folder / "run", livt.folder / "node disk"
    quick = {"checkpoint__every_steps": None, "checkpoint__local_dir": disk, "checkpoint__local_every_steps": 2}
    process = livt.start(*livt.train_words(run_dir, **quick))
    wait_until(lambda: list(disk.glob("livt-*/*/*/step-00000006")), process)
    process.kill()
    process.communicate()
    assert steps(run_dir) in ([], [9])
    said = livt.train(run_dir, **quick)
    assert "on the nodes" in said
    assert str(disk) in said
    assert_same_run(run_dir, finished)
    assert list(disk.iterdir()) == []  # both stages are done


def wait_until(condition, process, *, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while True:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass  # not there yet, or half a line
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.fixture
def half_done(livt, finished):
    """A run whose pretraining has three of its 18 steps before it."""
    run_dir = livt.folder / "half done"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "finetune")
    shutil.rmtree(run_dir / "pretrain" / "checkpoints" / "step-00000018")
    status = run_dir / "pretrain" / "status.json"
    status.write_text(status.read_text().replace('"done"', '"failed"'))
    return run_dir


def test_a_change_is_refused_until_it_is_allowed_and_then_kept_on_record(livt, half_done):
    changed = {"stages__pretrain__weight_decay": 0.1, "stages__pretrain__epochs": 3}
    words = [*livt.train_words(half_done, **changed), "--stage=pretrain"]
    said = livt.run(*words, expect=1).stderr
    assert "stages.pretrain.weight_decay: 0.05 in the checkpoint, 0.1 here" in said
    assert "--allow stages.pretrain.epochs --allow stages.pretrain.weight_decay" in said
    said = livt.run(*words, "--allow=stages.pretrain.weight_decay", expect=1).stderr
    assert "weight_decay:" not in said
    assert "stages.pretrain.epochs: 2 in the checkpoint, 3 here" in said
    allowed = ["--allow=stages.pretrain.weight_decay", "--allow=stages.pretrain.epochs"]
    assert "changed as allowed" in livt.run(*words, *allowed).stderr
    last = list_checkpoints(half_done / "pretrain" / "checkpoints")[-1]
    assert last.position.step == 27
    assert [(c["after_step"], c["change"].split(":")[0]) for c in last.manifest.facts["allowed"]] == [
        (15, "stages.pretrain.epochs"),
        (15, "stages.pretrain.weight_decay"),
    ]


def test_a_stage_made_shorter_than_it_is_long_already_is_refused(livt, half_done):
    words = livt.train_words(half_done, stages__pretrain__epochs=1, stages__pretrain__warmup_epochs=0)
    allowed = ["--allow=stages.pretrain.epochs", "--allow=stages.pretrain.warmup_epochs"]
    assert "the stage would end at step 9" in livt.run(*words, *allowed, expect=1).stderr


def test_a_run_goes_on_from_a_converted_checkpoint_as_from_the_one_that_it_was(livt, finished):
    """Through one safetensors file into a run directory that has nothing else: the same weights at the end."""
    run_dir, file = livt.folder / "run", livt.folder / "one.safetensors"
    target = run_dir / "pretrain" / "checkpoints" / "step-00000015"
    target.parent.mkdir(parents=True)
    livt.run("ckpt", "convert", str(finished / "pretrain" / "checkpoints" / target.name), "--to", str(file))
    livt.run("ckpt", "convert", str(file), "--to", str(target))
    assert "resumed from step-00000015" in livt.train(run_dir, stage="pretrain")
    ours, theirs = final_weights(run_dir, "pretrain"), final_weights(finished, "pretrain")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert metrics(run_dir, "pretrain")[-1]["loss"] == metrics(finished, "pretrain")[-1]["loss"]
