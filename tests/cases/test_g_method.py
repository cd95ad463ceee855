"""The method beside the public code of MAE and LiVT: recipes, crops, losses, and what is documented. Cases G1 to G7."""

from __future__ import annotations

import csv
import io
import math
import random
import re
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Finetune, Recipe
from livt_scale.data.image import transforms
from livt_scale.data.image.augment import erase, erasing_noise
from livt_scale.data.image.transforms import CROP_TRIES, Box, TrainTransform, draw_crop
from livt_scale.data.mixup import draw_mix
from livt_scale.data.settings import TrainSettings
from livt_scale.losses import make_loss

ROOT = Path(__file__).parents[2]
DEVIATIONS = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")

# --- G1: each `_code` recipe, field by field ---

# exp/*/args.txt of github.com/XuZhengzhuo/LiVT, as far as a recipe has a field for it.
PRETRAIN = {
    "mask_ratio": 0.75,
    "norm_pix": True,
    "weight_decay": 0.05,
    "base_lr": 1.5e-4,
    "min_lr": 0,
    "warmup_epochs": 40,
}
FINETUNE = {
    "epochs": 100, "weight_decay": 0.05, "betas": (0.9, 0.999), "min_lr": 1e-6, "warmup_epochs": 5, "clip_grad": None,
    "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip
ARGS: dict[tuple[str, str], dict[str, Any]] = {
    ("imagenet_lt/vit_b16_code", "pretrain"): {**PRETRAIN, "epochs": 400, "global_batch": 64 * 16 * 4, "px": 224},
    ("imagenet_lt/vit_b16_code", "finetune"): {
        **FINETUNE, "global_batch": 64 * 8 * 4, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.1,
        "smoothing": 0.1, "px": 224,
    },
    ("imagenet_lt/vit_b16_384_code", "finetune"): {
        **FINETUNE, "global_batch": 32 * 16 * 2, "base_lr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1,
        "smoothing": 0.1, "px": 384,
    },
    ("inat18/vit_b16_code", "pretrain"): {**PRETRAIN, "epochs": 800, "global_batch": 256 * 4 * 3, "px": 128},
    ("inat18/vit_b16_code", "finetune"): {
        **FINETUNE, "global_batch": 64 * 8 * 4, "base_lr": 1e-3, "layer_decay": 0.65, "drop_path": 0.1, "smoothing": 0,
        "px": 224,
    },
    ("inat18/vit_b16_384_code", "finetune"): {
        **FINETUNE, "global_batch": 32 * 16 * 2, "base_lr": 1e-3, "layer_decay": 0.65, "drop_path": 0.2, "smoothing": 0,
        "px": 384,
    },
}  # fmt: skip
# Where the log of a run, from which the published numbers are, disagrees with the args.txt beside it: the log's.
LOGS: dict[tuple[str, str], dict[str, Any]] = {
    ("imagenet_lt/vit_b16_code", "pretrain"): {"epochs": 800, "global_batch": 1024},
    ("imagenet_lt/vit_b16_code", "finetune"): {"global_batch": 512, "base_lr": 5e-4},
}
CURVES = {
    ("imagenet_lt/vit_b16_code", "pretrain"): "imagenet_lt-mgp-vit_b16-224",
    ("imagenet_lt/vit_b16_code", "finetune"): "imagenet_lt-bft-vit_b16-224",
    ("imagenet_lt/vit_b16_384_code", "finetune"): "imagenet_lt-bft-vit_b16-384",
    ("inat18/vit_b16_code", "pretrain"): "inat18-mgp-vit_b16-128",
    ("inat18/vit_b16_code", "finetune"): "inat18-bft-vit_b16-224",
    ("inat18/vit_b16_384_code", "finetune"): "inat18-bft-vit_b16-384",
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize(("name", "stage"), ARGS)
def test_g1_a_code_recipe_has_the_values_of_the_public_args_and_log(name, stage):
    recipe = recipe_of(name)
    part = recipe.stage(stage)
    expected = ARGS[name, stage] | LOGS.get((name, stage), {})
    assert recipe.at(stage).model.image_px == expected.pop("px")
    assert {field: getattr(part, field) for field in expected} == expected
    if isinstance(part, Finetune):
        assert part.loss.model_dump() == {"name": "bal_bce", "tau": 1.0}
        assert part.trained_by.name == "adamw"
    else:
        assert part.betas == (0.9, 0.95)


@pytest.mark.parametrize(("name", "stage"), CURVES)
def test_g1_the_log_has_that_many_epochs_and_that_peak(name, stage):
    with (ROOT / "tests" / "public_logs" / f"{CURVES[name, stage]}.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    part = recipe_of(name).stage(stage)
    assert len(rates) == part.epochs
    assert max(rates) == pytest.approx(part.peak_lr, rel=1e-3)


def test_g1_every_code_recipe_is_compared():
    names = {str(p.relative_to(ROOT / "recipes").with_suffix("")) for p in (ROOT / "recipes").rglob("*_code.yaml")}
    assert names == {name for name, _ in ARGS}


# --- G2: MAE's own crop ---


def maes_crop(height: int, width: int, *, scale: tuple[float, float], uniforms: list[float]) -> Box:
    """util/crop.py of github.com/facebookresearch/mae, from given uniform numbers in place of torch's."""
    target_area = height * width * (scale[0] + uniforms[0] * (scale[1] - scale[0]))
    low, high = np.log((3 / 4, 4 / 3))
    aspect = np.exp(low + uniforms[1] * (high - low))
    w = min(round(np.sqrt(target_area * aspect)), width)
    h = min(round(np.sqrt(target_area / aspect)), height)
    return Box(math.floor(uniforms[-2] * (height - h + 1)), math.floor(uniforms[-1] * (width - w + 1)), h, w)


NUMBER_UNIFORMS = 2 * CROP_TRIES + 2
UNIFORMS = st.lists(st.floats(0, 1, exclude_max=True), min_size=NUMBER_UNIFORMS, max_size=NUMBER_UNIFORMS)
SIDES = st.integers(8, 700)


@given(SIDES, SIDES, UNIFORMS)
def test_g2_the_crop_is_that_of_maes_code(height, width, uniforms):
    scale = (0.08, 1.0)
    ours = draw_crop(height, width, scale=scale, uniforms=uniforms, rule="mae")
    assert ours == maes_crop(height, width, scale=scale, uniforms=uniforms)


@given(st.integers(1, 3), st.integers(1, 700), UNIFORMS)
def test_g2_a_crop_of_a_thin_image_is_within_it(height, width, uniforms):
    box = draw_crop(height, width, scale=(0.08, 1.0), uniforms=uniforms, rule="mae")
    assert 0 <= box.top < box.top + box.height <= height
    assert 0 <= box.left < box.left + box.width <= width


def test_g2_the_crops_are_larger_than_torchvisions():
    rng, areas = random.Random(0), {}
    for rule in ("torchvision", "mae"):
        draws = ([rng.random() for _ in range(NUMBER_UNIFORMS)] for _ in range(3000))
        boxes = [draw_crop(375, 500, scale=(0.08, 1.0), uniforms=u, rule=rule) for u in draws]
        areas[rule] = mean(box.height * box.width / (375 * 500) for box in boxes)
    assert areas == pytest.approx({"torchvision": 0.43, "mae": 0.52}, abs=0.015)
    assert "43 %" in DEVIATIONS
    assert "52 %" in DEVIATIONS


PROBES = sorted((ROOT / "recipes").rglob("*linear_probe.yaml"))


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_g2_the_probe_recipes_crop_as_maes_code_does(path, monkeypatch):
    recipe = load_recipe(path)
    assert recipe.stages.finetune is not None
    assert recipe.stages.finetune.crop_rule == "mae"
    rules = []
    monkeypatch.setattr(transforms, "draw_crop", lambda h, w, **given: rules.append(given["rule"]) or Box(0, 0, h, w))
    picture = io.BytesIO()
    Image.new("RGB", (40, 30)).save(picture, "png")
    TrainTransform(TrainSettings.of_stage(recipe, "finetune"))(
        picture.getvalue(), torch.empty(3, 224, 224, dtype=torch.uint8), epoch=0, key="a"
    )
    assert rules == ["mae"]


def test_g2_other_recipes_crop_as_before():
    assert {part.crop_rule for part in (Finetune(), recipe_of("imagenet_lt/vit_b16").stages.pretrain)} == {
        "torchvision"
    }


# --- G3: class-balanced BCE under mixup ---


@pytest.mark.parametrize("counts", [(500, 120, 60, 9, 1), (7, 7, 7), (10**6, 1)])
def test_g3_cb_bce_is_the_public_codes_under_mixup(counts):
    """util/loss.py, BCE_loss of type CB: C · the mean over images and classes, each class with its weight."""
    rng = np.random.default_rng(0)
    z, num_classes = 3 * rng.standard_normal((8, len(counts))), len(counts)
    t = torch.full((8, num_classes), 0.1 / num_classes, dtype=torch.float64)
    labels = torch.from_numpy(rng.integers(num_classes, size=8))
    t = t.scatter_(1, labels[:, None], 0.9 + 0.1 / num_classes)
    t = 0.3 * t + 0.7 * t.flip(0)  # mixup

    effective = 1.0 - np.power(0.9999, counts)
    weights = (1 - 0.9999) / effective
    weights = weights / weights.sum() * num_classes
    sigmoid = 1 / (1 + np.exp(-z))
    terms = -(t.numpy() * np.log(sigmoid) + (1 - t.numpy()) * np.log(1 - sigmoid)) * weights
    expected = num_classes * terms.mean()

    logits = torch.from_numpy(z).requires_grad_()
    value = make_loss("cb_bce", counts)(logits, t)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(logits.grad, (sigmoid - t.numpy()) * weights / 8, rtol=1e-10, atol=1e-14)


def test_g3_a_recipe_takes_it_with_mixup():
    part = Finetune.model_validate({"loss": {"name": "cb_bce"}})
    assert part.mixes
    assert part.loss.link == "sigmoid"


# --- G4, G5: deviations, as docs/deviations.md has them ---


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DEVIATIONS, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def test_g4_each_pair_draws_its_own_mix_and_the_page_says_so():
    lam, _ = draw_mix(Finetune(), [f"k{k}" for k in range(64)], seed=0, epoch=0, image_px=32)
    assert len(set(lam.tolist())) > 50
    assert "each pair of neighbouring slots" in section("Mixup and cutmix").replace("\n", " ")


def test_g5_tau_multiplies_the_margin_of_bal_bce_and_the_page_says_so():
    one, more = (make_loss("bal_bce", (90, 10), tau=tau).by_class for tau in (1.0, 1.05))
    torch.testing.assert_close(more, 1.05 * one)
    assert "`tau` multiplies" in section("Bal-BCE and τ")


def test_g5_lade_has_balanced_softmax_and_the_page_says_so():
    z, t = torch.randn(6, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(2, 1)
    assert make_loss("lade", (9, 3, 1), dv_weight=0)(z, t) == make_loss("bal_ce", (9, 3, 1))(z, t)
    assert "balanced softmax plus" in section("LADE")


def test_g5_the_noise_of_erasing_is_cut_off_and_the_page_says_so():
    noise = erasing_noise((0.48, 0.46, 0.41), (0.28, 0.27, 0.29))
    assert (noise.min(), noise.max()) == (0, 255)
    slot = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    erase(slot, np.random.default_rng(0), share=1.0, noise=noise)
    erased = slot[slot != 128]
    assert ((erased == 0) | (erased == 255)).double().mean() > 0.05  # 2 · Φ(-1.7) = 9 %
    assert "1.7 deviations" in section("Random erasing")


def test_g5_large_crops_are_decoded_smaller_and_the_page_says_so():
    picture = io.BytesIO()
    Image.effect_noise((400, 400), 60).convert("RGB").save(picture, "jpeg")
    image = transforms.open_image(picture.getvalue(), channels=3)
    pixels, box = transforms.cut(image, Box(0, 0, 400, 400), target_px=100)
    assert (pixels.shape[:2], box) == ((100, 100), Box(0, 0, 100, 100))
    assert "1/2, 1/4 or 1/8 of its size" in section("Large crops")


# --- G6, G7: what recipes say about the logs ---


def head(name: str) -> str:
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(k for k, s in enumerate(lines) if s[:1] != "#")])


@pytest.mark.parametrize(("name", "stage"), LOGS)
def test_g6_a_recipes_head_says_where_the_public_log_and_args_disagree(name, stage):
    said = head(name)
    for field, value in LOGS[name, stage].items():
        if field != "base_lr":
            assert f"{value}" in said
            assert f"{ARGS[name, stage][field]}" in said
    peaks = [{**ARGS[name, stage], **source} for source in ({}, LOGS[name, stage])]
    for peak in (values["base_lr"] * values["global_batch"] / 256 for values in peaks):
        assert f"{peak:g}" in {f"{float(number):g}" for number in re.findall(r"[\d.]+e-\d", said)}


def test_g7_the_steps_and_the_discarded_micro_batches_are_counted():
    on_a_gpu = math.ceil(437_513 / 4) // 64  # DistributedSampler pads, the loader drops what fills no batch
    steps, discarded = divmod(on_a_gpu, 8)
    text = (ROOT / "recipes" / "inat18" / "vit_b16_code.yaml").read_text(encoding="utf-8")
    assert (steps, discarded) == (213, 5)
    assert f"{steps} steps an epoch and five discarded micro-batches" in text
    assert 437_513 // recipe_of("inat18/vit_b16_code").stage("finetune").global_batch == steps
    assert "214" not in text
