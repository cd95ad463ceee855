"""A ResNet from scratch, from recipe to export: on the real images that ship, very small ones."""

from __future__ import annotations

import json

import pytest

from tests.whole_runs import final_weights, metrics

RESNET = {
    "model__size": "resnet18",
    "model__image_px": 8,
    "model__patch_px": None,
    "model__width": None,
    "model__depth": None,
    "stages__pretrain": None,
    "stages__finetune__init": "scratch",
    "stages__finetune__layer_decay": 1.0,
    "stages__finetune__epochs": 1,
    "stages__finetune__warmup_epochs": 0,
    "stages__finetune__global_batch": 240,  # 3 steps
    "stages__finetune__micro_batch": 120,
    "stages__finetune__mixup": 0,
    "checkpoint__every_steps": 1,
    "checkpoint__keep_last": 9,
}


@pytest.mark.slow
def test_it_trains_goes_on_bit_for_bit_and_is_evaluated_and_exported(livt):
    whole, resumed = livt.folder / "whole", livt.folder / "resumed"
    livt.train(whole, **RESNET)
    assert len(metrics(whole, "finetune")) == 3

    checkpoints = resumed / "finetune" / "checkpoints"
    livt.train(resumed, **RESNET)
    for step in (2, 3):  # as if it had been killed after the first
        for file in sorted((checkpoints / f"step-{step:08d}").rglob("*"), reverse=True):
            file.unlink()
        (checkpoints / f"step-{step:08d}").rmdir()
    for name in ("status.json", "eval.json", "metrics.jsonl"):
        (resumed / "finetune" / name).unlink()
    assert "resumed from step-00000001" in livt.train(resumed, **RESNET)
    ours, theirs = final_weights(resumed), final_weights(whole)
    assert any("running_var" in name for name in ours)
    assert [name for name in ours if (ours[name] != theirs[name]).any()] == []

    livt.run("export", str(resumed), "--out", "exported")
    livt.run("eval", "exported", "--data", json_of(whole)["data"]["folder"], "--out", "again.json")
    again = json.loads((livt.folder / "again.json").read_text())
    assert again["top1"] == json_of(whole)["top1"]


def json_of(run_dir):
    return json.loads((run_dir / "finetune" / "eval.json").read_text())


@pytest.mark.slow
def test_on_two_ranks_it_says_what_that_changes(livt):
    assert "the result depends on the number of ranks" in livt.train(livt.folder / "two", processes=2, **RESNET)
