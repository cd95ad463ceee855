"""Both stages on real images, from recipe to results; and what stops a run says so in one line."""

from __future__ import annotations

import json
import math
import time

import pytest

from livt_scale.train.run_files import read_status
from tests.whole_runs import assert_same_run, metrics


def test_both_stages_leave_what_the_design_promises(finished):
    for name in ("recipe.yaml", "finetune/eval.json", "finetune/samples/confusion.png"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "pretrain" / "samples").glob("*.png"))
    for stage in ("pretrain", "finetune"):
        assert read_status(finished, stage)["state"] == "done"
        recorded = metrics(finished, stage)
        assert [m["step"] for m in recorded] == list(range(1, 19))
        assert all({"epoch", "loss", "lr", "images_per_s", "data_wait_s", "step_s"} <= m.keys() for m in recorded)
        assert recorded[-1]["loss"] < recorded[0]["loss"]
    top1 = json.loads((finished / "finetune" / "eval.json").read_text())["top1"]
    assert {"all", "many", "medium", "few"} <= top1.keys()
    assert all(0 <= value <= 1 for value in top1.values())


def test_the_loss_of_the_first_steps_is_that_of_knowing_nothing(finished):
    """MAE: the variance of a normalised target, 1, and that of the guess on top. Bal-BCE: near C ln 2, less margins."""
    assert metrics(finished, "pretrain")[0]["loss"] > 1 - 0.05
    assert 0 < metrics(finished, "finetune")[0]["loss"] < 10 * math.log(2) * 2


def test_a_finished_run_is_not_run_again(livt, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    said = livt.train(finished)
    assert "pretrain is done already" in said
    assert "finetune is done already" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_how_it_is_saved_loaded_and_computed_changes_nothing(livt, finished):
    other = {"checkpoint__mode": "sync", "checkpoint__every_steps": 7, "data__workers": 0}
    livt.train(livt.folder / "run", parallel__deterministic=True, **other)
    assert_same_run(livt.folder / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_more_processes_follow_the_same_loss_curve(livt, finished, processes):
    livt.train(livt.folder / "run", processes=processes, **{"stages__*__micro_batch": 20})
    for stage in ("pretrain", "finetune"):
        for ours, alone in zip(metrics(livt.folder / "run", stage), metrics(finished, stage), strict=True):
            assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4), f"{stage} step {alone['step']}"
    ours, alone = (json.loads((r / "finetune" / "eval.json").read_text()) for r in (livt.folder / "run", finished))
    assert ours["num_samples"] == alone["num_samples"]


def test_two_processes_on_one_run_directory_the_second_refuses(livt):
    first = livt.start(*livt.train_words(livt.folder / "run", stages__pretrain__epochs=200))
    try:
        wait_for(lambda: (livt.folder / "run" / ".lock").exists() and (livt.folder / "run" / ".lock").stat().st_size)
        said = livt.train(livt.folder / "run", expect=1)
        assert f"livt: error: process {first.pid} on " in said
        assert "Traceback" not in said
    finally:
        first.kill()
        first.communicate()


def test_a_changed_recipe_is_refused_field_by_field(livt, finished):
    words = {"stages__pretrain__mask_ratio": 0.5, "seed": 3, "stages__pretrain__epochs": 3}
    status = finished / "pretrain" / "status.json"
    kept = status.read_bytes()
    try:
        status.write_text(kept.decode().replace('"done"', '"failed"'))
        said = livt.train(finished, expect=1, **words)
    finally:
        status.write_bytes(kept)
    for expected in ("stages.pretrain.mask_ratio: 0.75 in the checkpoint, 0.5 here", "seed: 0 in the checkpoint"):
        assert expected in said
    assert "Traceback" not in said


def test_a_non_finite_loss_stops_the_run_names_the_samples_and_keeps_the_checkpoint(livt):
    said = livt.train(livt.folder / "run", expect=1, stages__pretrain__base_lr=1e30, checkpoint__every_steps=1)
    assert "the loss is" in said or "gradient norm is" in said
    assert "train-" in said  # keys of the shipped set
    assert "Traceback" not in said
    status = read_status(livt.folder / "run", "pretrain")
    assert status["state"] == "failed"
    assert "Samples of the batch" in status["why"]
    assert list((livt.folder / "run" / "pretrain" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("sets", "code", "expected"),
    [
        ({"stages__pretrain__epoch": 3}, 2, "did you mean 'epochs'?"),
        ({"stages__pretrain__micro_batch": 30}, 2, "micro_batch is 30 and does not divide the 80 slots"),
        ({"data__train": "/nowhere/at all"}, 2, "data.train: there is no folder /nowhere/at all"),
        ({"stages__pretrain__global_batch": 4000}, 2, "fewer than one global batch of 4000"),
        ({"stages__finetune__loss__name": "bal_bcee"}, 2, "did you mean 'bal_bce'?"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_written(livt, sets, code, expected):
    said = livt.train(livt.folder / "run", expect=code, **sets)
    assert expected in said
    assert "Traceback" not in said
    assert [p.name for p in livt.folder.rglob("*") if p.is_file()] == []


def test_a_missing_pretraining_is_named(livt):
    words = [*livt.train_words(livt.folder / "run"), "--stage", "finetune"]
    said = livt.run(*words, expect=1).stderr
    assert "fine-tuning starts from pretraining, which is not started" in said


def wait_for(condition, *, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
