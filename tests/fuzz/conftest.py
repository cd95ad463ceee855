"""What the fuzzers start from, made once: a set of shards, its tars alone, weights, a run with a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_sets import small_set
from tests.tiny_run import CLASS_NAMES, tiny_recipe, tiny_run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def shards(base: Path) -> Path:
    """BASE/set: 6 images of 3 classes in 2 shards."""
    return Path(shutil.copytree(small_set(base / "made", labels=[0, 0, 0, 1, 1, 2], shard_samples=4), base / "set"))


@pytest.fixture(scope="session")
def run(base: Path) -> Path:
    """BASE/run: one checkpoint of the smallest classifier."""
    tiny_run(base / "run", tiny_recipe(width=16, depth=1, heads=1), steps=(40,), class_names=CLASS_NAMES)
    return base / "run"
