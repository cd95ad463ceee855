"""Sampling by class and repeated views follow from the step alone: a killed run draws what it would have drawn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from livt_scale.config.load import load_recipe
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.inspect import rank_samples
from livt_scale.data.shard_set import ShardSet
from tests.e2e.test_kill_and_resume import run_until_done_killing
from tests.whole_runs import REPO, assert_same_run

SHIPPED = REPO / "shards" / "fashion-mnist-lt" / "train-lt"
DRAWN = {
    "stages__pretrain__sampling__policy": "class_balanced",
    "stages__finetune__sampling": {"policy": "progressive", "from": "instance", "to": "class_balanced"},
    "stages__*__repeats": 2,
    "stages__*__global_batch": 64,  # 7 steps an epoch
    "stages__*__micro_batch": 64,
    "checkpoint__every_steps": 2,
}


@pytest.fixture
def two_shards(tmp_path: Path) -> ShardSet:
    """A fifth of the shipped set: 495 images of ten classes, from 210 to 1 of each."""
    whole, folder = ShardSet.open(SHIPPED), tmp_path / "two shards"
    folder.mkdir()
    for shard in (0, 1):
        shutil.copy(whole.shard_path(shard), folder)
    return index_tars(folder, class_names=whole.manifest.class_names, workers=1)


@pytest.mark.slow
def test_a_killed_run_that_draws_by_class_ends_as_an_unbroken_one(livt, two_shards):
    sets = {**DRAWN, "data__train": two_shards.folder, "data__val": None}
    whole, killed = livt.folder / "whole", livt.folder / "killed"
    livt.train(whole, **sets)
    assert run_until_done_killing(livt, killed, kills=2, steps=28, seed=199, **sets) == 2  # in the second epochs
    assert_same_run(killed, whole)
    for stage in ("pretrain", "finetune"):  # and classes were drawn, each image twice in its batch
        told = rank_samples(load_recipe(killed / "recipe.yaml"), stage, rank=0, world_size=1, epoch=1)
        assert all(n % 2 == 0 for step in told["steps"] for n in Counter(step["keys"]).values())
        assert len({key for step in told["steps"] for key in step["keys"]}) < 0.45 * 7 * 64
