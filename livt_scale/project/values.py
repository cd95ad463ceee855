"""The values of a recipe that follow from the data, each with its reason: a pure function of what was found.

    recipe_values(facts)["stages.finetune.epochs"]        Value(100, "100,000 images seen in all, at most 100 epochs")

Values are written where the paper's (livt:base/livt) do not fit. Up to FEW images the recipe is one that two CPU
cores train in minutes: a small model on small images, with a budget of images seen; above that it is the paper's, with
a model that suits the number of images. The limits are ours, from runs on Fashion-MNIST-LT and on photographs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from livt_scale.longtail import Counts, imbalance_factor, shot_groups
from livt_scale.project.measure import PixelFacts

FEW = 5_000  # training images up to which a recipe is for a CPU
SIZES = ((FEW, "vit_micro"), (50_000, "vit_ti"), (500_000, "vit_s"))  # up to this number of images; above: vit_b
PARAMETERS = {"vit_micro": "0.5 M", "vit_ti": "5.5 M", "vit_s": "22 M", "vit_b": "86 M"}
DECODERS = {  # where the paper's (512 wide, 8 blocks) would be larger than the encoder
    "vit_micro": {"width": 64, "depth": 2, "heads": 4},
    "vit_ti": {"width": 128, "depth": 4, "heads": 4},
}
MAX_SMALL_PX = 96  # side of the images with FEW images
PAPER_PX, PAPER_PATCH_PX = 224, 16
PATCHES_A_SIDE, SMALL_PATCHES_A_SIDE = 8, 4  # at least; of a small set few, so that more epochs fit into the time
SEEN = {"pretrain": 100_000, "finetune": 50_000}  # images that a stage sees, with FEW images
EPOCHS = {"pretrain": (60, 200), "finetune": (30, 100)}  # limits of that
PAPER_EPOCHS = {"pretrain": 800, "finetune": 100}
PAPER_BATCH = {"pretrain": 4096, "finetune": 1024}
SMALL_BATCH, SMALL_BASE_LR = 64, 8e-3  # those of recipes/fashion_mnist_lt/quickstart.yaml
STEPS_AN_EPOCH = 10  # about, where a set is too small for the usual batch
MANY_OVER, FEW_UNDER = 100, 20  # of the literature (OLTR)


class Value(NamedTuple):
    """A value of the recipe and why it has it."""

    value: Any
    why: str


@dataclass(frozen=True)
class Start:
    """Weights to start from, and the part `model` of the recipe that they fit."""

    weights: str  # absolute path
    model: dict[str, Any]
    mean: tuple[float, ...] | None = None  # what they were trained with; None: not known
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data when the recipe is written."""

    train: str  # as the recipe has it
    val: str
    counts: Counts  # [C] training images
    pixels: PixelFacts
    start: Start | None = None  # None: from scratch

    @property
    def num_images(self) -> int:
        return int(self.counts.sum())

    @property
    def is_small(self) -> bool:
        """Few images and no weights: the recipe is for a CPU."""
        return self.start is None and self.num_images <= FEW


def held_out_fraction(num_images: int) -> Value:
    """What part of each class is for evaluation: more of a small set, whose accuracy would have a wide interval."""
    for below, fraction in ((20_000, 0.2), (100_000, 0.1)):
        if num_images < below:
            return Value(fraction, f"there are no evaluation images, and {num_images:,} images in all: fewer than "
                         f"{below:,}, so a larger part is held out")  # fmt: skip
    return Value(0.05, f"there are no evaluation images; 5 % of {num_images:,} are enough for a narrow interval")


def recipe_values(facts: DataFacts) -> dict[str, Value]:
    """The values by dotted name, in the order in which a recipe has them."""
    values = _data(facts) | _model(facts)
    if facts.start is None:
        values |= _pretrain(facts)
    else:
        values["stages.pretrain"] = Value(None, "the weights that are given take its place")
    values |= _finetune(facts)
    if facts.is_small:
        values["parallel.threads"] = Value(1, "as fast as two for so small a model, and a core is left for the loader")
        values["checkpoint.every_steps"] = Value(200, "an epoch has few steps: a save after each would take longer")
    return values


def _data(facts: DataFacts) -> dict[str, Value]:
    pixels, start = facts.pixels, facts.start
    mean = std = None
    if start is not None:
        mean, std = start.mean, start.std
    why = "what the weights were trained with"
    if mean is None or std is None:
        colours = "grey" if pixels.channels == 1 else "red, green, blue"
        mean, std = pixels.mean, pixels.std
        why = f"of the pixels in [0, 1] of {pixels.sample:,} training images ({colours})"
    many, few = shot_thresholds(facts.counts)
    return {
        "data.train": Value(facts.train, "beside this file"),
        "data.val": Value(facts.val, "not trained on"),
        "data.mean": Value(list(mean), why),
        "data.std": Value(list(std), why.replace("of the pixels", "deviation of the pixels")),
        "data.many_over": many,
        "data.few_under": few,
        "data.workers": Value(1, "small images: one process decodes enough")
        if facts.is_small
        else Value("auto", "measured when training starts"),
    }


def shot_thresholds(counts: Counts) -> tuple[Value, Value]:
    """(many_over, few_under): the usual ones where each group then has a class, else thirds of the classes."""
    usual = shot_groups(counts, many_over=MANY_OVER, few_under=FEW_UNDER)
    sizes = ", ".join(f"{len(classes)} {name}" for name, classes in usual.items())
    if all(len(classes) for classes in usual.values()):
        return Value(MANY_OVER, f"usual thresholds: {sizes} classes"), Value(FEW_UNDER, "the same")
    if counts.min() == counts.max():
        why = f"the usual threshold; every class has {int(counts[0]):,} images, so there is one group"
        return Value(MANY_OVER, why), Value(FEW_UNDER, "the same")
    many, few = _thirds(counts)
    groups = shot_groups(counts, many_over=many, few_under=few)
    sizes = ", ".join(f"{len(classes)} {name}" for name, classes in groups.items())
    what = "these make thirds of the classes, or nearly" if len(set(counts.tolist())) > 2 else "there are two groups"
    why = f"the usual 100 and 20 leave a group empty; {what}: {sizes}"
    return Value(many, why), Value(few, "the same")


def _thirds(counts: Counts) -> tuple[int, int]:
    """(many_over, few_under) for groups of about a third of the classes each, none empty; of two counts two groups.

    41, 16, 6 and 1 images: 1 many, 2 medium, 1 few.
    """
    sizes, classes = np.unique(counts, return_counts=True)  # of classes that have as many images; of two sizes or more
    if len(sizes) == 2:
        return max(int(sizes[0]), 1), int(sizes[0]) + 1
    third, up_to = len(counts) / 3, np.cumsum(classes)  # classes of sizes[k] images or fewer
    few = int(np.abs(up_to[:-2] - third).argmin())  # the largest that is few-shot: a medium and a many remain
    above = len(counts) - up_to[few + 1 : -1]
    medium = few + 1 + int(np.abs(above - third).argmin())
    return int(sizes[medium]), int(sizes[few + 1])


def _model(facts: DataFacts) -> dict[str, Value]:
    pixels, n = facts.pixels, facts.num_images
    if facts.start is not None:
        why = "of the weights"
        return {f"model.{name}": Value(value, why) for name, value in facts.start.model.items()}
    size = next((size for most, size in SIZES if n <= most), "vit_b")
    limit = MAX_SMALL_PX if facts.is_small else PAPER_PX
    image_px = min(max(16 * round(pixels.shorter_px / 16), 16), limit)
    patch_px = min(image_px // (SMALL_PATCHES_A_SIDE if facts.is_small else PATCHES_A_SIDE), PAPER_PATCH_PX)
    side = f"the shorter side of the images is {pixels.shorter_px} px (median)"
    small = f"; at most {limit}, so that a CPU trains it" if facts.is_small and pixels.shorter_px > limit else ""
    values = {
        "model.size": Value(size, f"{PARAMETERS[size]} parameters: suits {n:,} images from scratch"),
        "model.image_px": Value(image_px, side + small),
        "model.patch_px": Value(patch_px, f"{image_px // patch_px} x {image_px // patch_px} patches"),
        "model.channels": Value(pixels.channels, "grey" if pixels.channels == 1 else "colour"),
    }
    if size in DECODERS:
        values["model.decoder"] = Value(DECODERS[size], "smaller than the encoder; not kept after pretraining")
    return values


def _batch(n: int, *, most: int) -> int:
    """A power of two with STEPS_AN_EPOCH steps an epoch or about that, and no more images than there are."""
    wanted = 2 ** round(math.log2(max(n / STEPS_AN_EPOCH, 1)))
    batch = min(max(wanted, 8), most)
    return batch if batch <= n else n - n % 2


def _schedule(facts: DataFacts, stage: str) -> dict[str, Value]:
    """Batch, epochs and, with few images, the rate."""
    n = facts.num_images
    batch = _batch(n, most=SMALL_BATCH if facts.is_small else PAPER_BATCH[stage])
    steps = f"{n // batch:,} steps an epoch"
    values = {}
    if facts.is_small:
        fewest, most = EPOCHS[stage]
        epochs = min(max(round(SEEN[stage] / n), fewest), most)
        seen = f"{epochs * n:,} images seen, which takes minutes on a CPU; more epochs, higher accuracy"
        values["epochs"] = Value(epochs, seen)
        values["warmup_epochs"] = Value(max(1, epochs // 20), "a twentieth of the epochs")
    else:
        values["epochs"] = Value(PAPER_EPOCHS[stage], f"the paper's: {PAPER_EPOCHS[stage] * n:,} images seen")
    values["global_batch"] = Value(batch, f"{steps}; the paper's is {PAPER_BATCH[stage]:,}")
    if batch < 64:
        values["micro_batch"] = Value(batch, "no more than global_batch")
    if facts.is_small:
        peak = SMALL_BASE_LR * batch / 256
        why = f"a small model learns at a higher rate; the peak is {SMALL_BASE_LR} * {batch} / 256 = {peak:.2g}"
        values["base_lr"] = Value(SMALL_BASE_LR, why)
    return values


def _crops(facts: DataFacts) -> dict[str, Value]:
    values = {}
    if facts.is_small:
        values["crop_scale"] = Value([0.4, 1.0], "share of the area in a crop: less of a small image shows too little")
    if facts.pixels.channels == 1:
        values["flip"] = Value(False, "grey images are often characters or X-rays, and their mirror image is another")
    return values


def _pretrain(facts: DataFacts) -> dict[str, Value]:
    values = _schedule(facts, "pretrain") | _crops(facts)
    return {f"stages.pretrain.{name}": value for name, value in values.items()}


def _finetune(facts: DataFacts) -> dict[str, Value]:
    values = _schedule(facts, "finetune")
    if facts.start is not None:
        values = {
            "init": Value("weights", "a start from weights needs fewer images and epochs than one from scratch"),
            "weights": Value(facts.start.weights, "as given"),
        } | values
    values |= _crops(facts)
    if facts.is_small:
        why = "made for larger images and longer training"
        values["rand_augment"] = Value(None, why)
        values["random_erasing"] = Value(0, why)
        values["cutmix"] = Value(0, why)
    factor = imbalance_factor(facts.counts)
    values["loss"] = Value({"name": "bal_bce"}, f"the paper's, corrects for the imbalance factor of {factor:,.4g}")
    epochs = values["epochs"].value
    values["eval_every_epochs"] = Value(max(1, epochs // 10), "ten evaluations, for a curve; the best one is kept")
    return {f"stages.finetune.{name}": value for name, value in values.items()}
