"""The `code` recipes against LiVT's public training logs: the learning rate of every epoch, to 1 %.

tests/public_logs/*.csv: the column `train_lr` of six logs, which is the mean over an epoch's steps of the largest rate
of any group. The images and the batch give the steps of an epoch, and nothing else is fitted.
"""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Model
from livt_scale.models.classifier import build_classifier
from livt_scale.optim import lr_at, param_groups

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {"imagenet_lt": 115_846, "inat18": 437_513}
LOGS = [
    ("imagenet_lt-mgp-vit_b16-224", "imagenet_lt/vit_b16_code", "pretrain", 224),
    ("imagenet_lt-bft-vit_b16-224", "imagenet_lt/vit_b16_code", "finetune", 224),
    ("imagenet_lt-bft-vit_b16-384", "imagenet_lt/vit_b16_384_code", "finetune", 384),
    ("inat18-mgp-vit_b16-128", "inat18/vit_b16_code", "pretrain", 128),
    ("inat18-bft-vit_b16-224", "inat18/vit_b16_code", "finetune", 224),
    ("inat18-bft-vit_b16-384", "inat18/vit_b16_384_code", "finetune", 384),
]


def logged(log):
    with (ROOT / "tests" / "public_logs" / f"{log}.csv").open() as file:
        return np.array([float(row["lr"]) for row in csv.DictReader(file)])


def by_epoch(part, images):
    steps = images // part.global_batch  # both codes drop what fills no batch
    where = {"steps_per_epoch": steps, "epochs": part.epochs, "warmup_epochs": part.warmup_epochs}
    rates = [lr_at(k, **where, peak_lr=part.peak_lr, min_lr=part.min_lr) for k in range(steps * part.epochs)]
    return np.array(rates).reshape(part.epochs, steps).mean(axis=1)


@pytest.mark.parametrize(("log", "recipe", "stage", "px"), LOGS, ids=[log for log, *_ in LOGS])
def test_the_rate_of_every_epoch_is_the_public_logs_to_1_percent(log, recipe, stage, px):
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    assert loaded.at(stage).model.image_px == px
    ours, theirs = by_epoch(loaded.stage(stage), IMAGES[recipe.split("/")[0]]), logged(log)
    assert len(ours) == len(theirs)
    worst = np.max(np.abs(ours / theirs - 1))
    print(f"{log}: {worst:.2%} at most")
    assert worst < 0.01


def test_the_comparison_would_find_another_warm_up():
    part = load_recipe(ROOT / "recipes/imagenet_lt/vit_b16.yaml").stages.finetune  # the paper's table: 10 epochs
    ours, theirs = by_epoch(part, IMAGES["imagenet_lt"]), logged("imagenet_lt-bft-vit_b16-224")
    assert np.max(np.abs(ours / theirs - 1)) > 0.5


@pytest.mark.parametrize(("size", "depth"), [("vit_b", 12), ("vit_l", 24)])
def test_layer_scales_and_groups_are_those_of_the_formula(size, depth):
    """decay^(depth + 1 - i): patches, tokens, positions 0; block k is k + 1; head and last norm depth + 1."""
    import torch

    with torch.device("meta"):
        model = build_classifier(Model(size=size), num_classes=10, drop_path=0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75):
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            words = name.split(".")
            layer = int(words[1]) + 1 if words[0] == "blocks" else 0
            layer = depth + 1 if words[0] in ("fc_norm", "head") else layer
            assert math.isclose(group["lr_scale"], 0.75 ** (depth + 1 - layer)), name
            plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0.0 if plain else 0.05), name
    assert seen == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
