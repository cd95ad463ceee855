"""Sets are read in the copies that a batch job has made, under the names of the shared folders."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import SetFacts, ShardSet
from livt_scale.data.staged import STAGED, place_of, staged_variable
from livt_scale.util.errors import ManifestError, UsageError
from tests.data.tiny_sets import HOSTILE, tiny_set


def stage(monkeypatch, shared: Path, copy: Path) -> None:
    name, _, value = staged_variable({str(shared): str(copy)}).partition("=")
    monkeypatch.setenv(name, value)


def test_a_copy_is_read_and_the_shared_folder_is_named(tmp_path, monkeypatch):
    shared, copy = tmp_path / HOSTILE, tmp_path / "node" / "train"
    original = tiny_set(shared)
    image, keys = read_sample(original, 3), original.keys(np.arange(original.num_samples))
    copy.parent.mkdir()
    shared.rename(copy)
    stage(monkeypatch, shared, copy)
    for shards in (ShardSet.open(str(shared)), pickle.loads(pickle.dumps(ShardSet.open(shared)))):
        assert (shards.where, shards.digest) == (str(shared), original.digest)
        assert read_sample(shards, 3) == image
        assert shards.keys(np.arange(shards.num_samples)) == keys
        assert shards.shard_path(0).parent == copy
    assert SetFacts.read(str(shared)).where == str(shared)
    shutil.rmtree(copy)
    with pytest.raises(ManifestError, match="node/train"):
        ShardSet.open(shared)


def test_other_folders_are_read_where_they_are(monkeypatch):
    assert place_of(Path("/shared/val"), {}) == Path("/shared/val")
    stage(monkeypatch, Path("/shared/train"), Path("/node/train"))
    assert place_of(Path("/shared/val")) == Path("/shared/val")
    assert place_of(Path("/shared/train/")) == Path("/node/train")


@pytest.mark.parametrize("given", ["/scratch", "[1]", '{"/a": 3}', "{"])
def test_another_kind_of_value_is_refused(given):
    with pytest.raises(UsageError, match=f"{STAGED} is "):
        place_of(Path("/a"), {STAGED: given})
