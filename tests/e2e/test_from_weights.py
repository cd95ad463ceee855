"""Whole runs that begin with somebody's weights: a linear probe of a run's pretraining, and MAE's published layout."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import timm
import torch

from tests.weights.small_mae import official_state
from tests.whole_runs import REPO, Livt, final_weights, metrics

PROBE = REPO / "recipes" / "fashion_mnist_lt" / "linear_probe.yaml"
ALL_IMAGES = {  # a third of them teaches a probe too little
    "data__train": REPO / "shards" / "fashion-mnist-lt" / "train-lt",
    "data__val": REPO / "shards" / "fashion-mnist-lt" / "val",
    "stages__*__global_batch": 256,
    "stages__*__micro_batch": 64,
}


def report_of(run_dir: Path) -> dict[str, dict[str, float]]:
    return json.loads((run_dir / "finetune" / "eval.json").read_text())


@pytest.mark.slow
def test_a_linear_probe_tells_more_than_chance_and_leaves_the_backbone_alone(livt: Livt) -> None:
    pretrained, run = livt.folder / "pretrained", livt.folder / "probe"
    livt.train(pretrained, stage="pretrain", **ALL_IMAGES)
    livt.recipe = PROBE
    probe = {"weights": pretrained, "epochs": 8, "base_lr": 25.6}
    livt.train(run, **ALL_IMAGES, **{f"stages__finetune__{name}": value for name, value in probe.items()})
    assert all(math.isfinite(line["loss"]) for line in metrics(run, "finetune"))
    assert report_of(run)["top1"]["all"] > 0.2  # ten classes, 1000 images: chance is 0.1, its deviation 0.01
    before, after = final_weights(pretrained, "pretrain"), final_weights(run)
    kept = [name for name in after if name in before and name.startswith("model.")]
    assert "model.blocks.1.mlp.fc2.weight" in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_file_in_maes_layout_is_imported_fine_tuned_evaluated_and_exported(livt: Livt) -> None:
    """As facebookresearch/mae saves it: 3 channels, patches of 4 px on a grid of 4, an argparse.Namespace beside it."""
    file, run, out = (livt.folder / name for name in ("mae_pretrain.pth", "run", "export"))
    beside = {"args": argparse.Namespace(model="mae_vit_micro"), "epoch": 1599, "optimizer": {"state": {}}}
    torch.save({"model": official_state(), **beside}, file)
    words = ("--heads", "4", "--decoder-heads", "2", "--json")
    told = json.loads(livt.run("import", str(file), "--out", str(livt.folder / "mae"), *words).stdout)
    assert told["source"]["layout"] == "mae"
    shape = {"model__width": 32, "model__heads": 4, "stages__pretrain": None}
    livt.train(run, stages__finetune__init="weights", stages__finetune__weights=livt.folder / "mae", **shape)
    assert all(math.isfinite(line["loss"]) for line in metrics(run, "finetune"))
    report = report_of(run)
    assert report["num_samples"] == 250
    livt.run("export", str(run), "--out", str(out))
    lineage = json.loads((out / "config.json").read_text())["livt"]["lineage"]
    assert lineage["init"]["recipe_digest"] == told["sha256"]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert theirs(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
