"""A tiny set of colour photographs, its shards, a recipe, and finished runs of it: what the tests of cases share.

Everything here is made once per session and is read only: a test that changes a file copies the folder first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe
from livt_scale.study.runs import as_words

CLASSES = {"cat": (200, 40, 40), "dog": (40, 200, 40), "eel": (40, 40, 200), "fox": (200, 200, 40)}
COUNTS = {"train": (40, 20, 10, 5), "val": (6, 6, 6, 6)}

SPEC = """\
name: tiny
seed: 0
sources:
  train: {folder: {root: img/train}}
  val: {folder: {root: img/val}}
sets:
  train: {source: train, shard_samples: 16}
  val: {source: val, shard_samples: 16}
"""

# 4 steps an epoch, 8 in each stage
RECIPE = """\
extends: livt:base/livt
name: tiny
data: {train: sh/train, val: sh/val, many_over: 20, few_under: 10, workers: 0}
model:
  {size: vit_micro, image_px: 16, patch_px: 4, width: 32, depth: 1, heads: 2, decoder: {width: 32, depth: 1, heads: 2}}
stages:
  pretrain:
    {epochs: 2, global_batch: 16, micro_batch: 16, base_lr: 8e-3, warmup_epochs: 1, crop_scale: [0.6, 1.0], flip: false}
  finetune:
    {epochs: 2, global_batch: 16, micro_batch: 16, base_lr: 8e-3, warmup_epochs: 1, crop_scale: [0.6, 1.0], flip: false,
    rand_augment: null, random_erasing: 0, cutmix: 0}
parallel: {threads: 1}
checkpoint: {mode: sync}
log: {every_steps: 1, tensorboard: false, num_reconstructions: 0}
"""


def write_images(root: Path, counts: Mapping[str, tuple[int, ...]] = COUNTS) -> Path:
    """ROOT/{train,val}/{cat,dog,eel,fox}/NUMBER.jpg: noisy colours of 20 px, another for each class."""
    rng = np.random.default_rng(0)
    for split, numbers in counts.items():
        for (name, colour), number in zip(CLASSES.items(), numbers, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(number):
                pixels = np.array(colour) + rng.normal(0, 30, (20, 20, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(folder / f"{k:03}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with train/ (40, 20, 10 and 5 images of a class) and val/ (6 of each)."""
    return write_images(tmp_path_factory.mktemp("tiny") / "img")


@pytest.fixture(scope="session")
def tiny_spec(tiny_images: Path) -> Path:
    """The shard spec beside `tiny_images`, which it builds from."""
    path = tiny_images.parent / "tiny-shards.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="session")
def tiny_shards(tiny_spec: Path) -> Path:
    """The folder with the built sets train/ and val/."""
    from livt_scale.data.build.builder import build
    from livt_scale.data.build.spec import load_spec

    folder = tiny_spec.parent / "sh"
    build(load_spec(tiny_spec), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_shards: Path) -> Path:
    """The recipe file beside the shards. Its run would be in runs/tiny of the working directory: give a run_dir."""
    path = tiny_shards.parent / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def train_tiny(tiny_recipe: Path) -> Callable[..., Recipe]:
    """`train_tiny(run_dir, {"seed": 1}, hooks=[…])` trains the tiny recipe in this process; its recipe."""

    def train(run_dir: Path, sets: dict[str, Any] | None = None, **options: Any) -> Recipe:
        from livt_scale.train.run import train as run

        recipe = load_recipe(tiny_recipe, sets=as_words({**(sets or {}), "run_dir": run_dir}))
        run(recipe, **options)
        return recipe

    return train


@pytest.fixture(scope="session")
def finished_run(train_tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages to the end. Read only: see `copy_of`."""
    run_dir = tmp_path_factory.mktemp("finished") / "runs" / "a"
    train_tiny(run_dir)
    return run_dir


@pytest.fixture(scope="session")
def interrupted_run(train_tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated after 4 of the 8 steps of fine-tuning, and stopped and saved after 5. Read only."""
    from livt_scale.train.loop import Hook, Loop, Step
    from livt_scale.util.errors import Preempted

    class Stop(Hook):
        def after_backward(self, loop: Loop, step: Step) -> None:
            step.wants_stop |= step.number == 5

    run_dir = tmp_path_factory.mktemp("interrupted") / "runs" / "a"
    train_tiny(run_dir, stage="pretrain")
    with pytest.raises(Preempted):
        train_tiny(run_dir, hooks=[Stop()])
    return run_dir


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(run)`: a copy of a folder in tmp_path, which the test may change."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name, symlinks=True))

    return copy
