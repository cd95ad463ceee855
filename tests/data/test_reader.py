"""A sample is read as it was written; damage is named by shard, offset and key; webdataset reads the same."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from livt_scale.data.reader import SampleReader, read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import LivtError, SampleError, ShardError
from tests.data.tiny_sets import HOSTILE, tiny_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("reader") / HOSTILE, num_samples=43)


@pytest.fixture
def own_shards(tmp_path) -> ShardSet:
    """A set that the test may damage."""
    return tiny_set(tmp_path / "set", num_samples=8, per_shard=4)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_itself_reads_the_same_samples(shards, monkeypatch):
    monkeypatch.chdir(shards.folder)  # webdataset takes names as URLs: the folder's is hostile, the tars' are not
    names = [shard.name for shard in shards.manifest.shards]
    theirs = {s["__key__"]: s for s in wds.WebDataset(names, shardshuffle=False)}
    gc.collect()  # webdataset leaves its files to the collector: let the warning come here
    with_ours = {raw.key: raw for raw in SampleReader(shards).read(np.arange(shards.num_samples))}
    assert theirs.keys() == with_ours.keys()
    for key, raw in with_ours.items():
        assert theirs[key][raw.image_type] == raw.image
        assert theirs[key]["cls"] == b"%d" % raw.label


def test_read_sample_gives_image_label_and_key(shards):
    image, label, key = read_sample(shards, 7)
    assert (label, key) == (1, "s007")
    assert image[:4] == b"\x89PNG"


def test_open_files_stay_under_the_limit_and_are_closed(shards):
    def open_tars() -> int:
        files = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
        return sum(file.endswith(".tar") for file in files)

    before = open_tars()
    reader, most = SampleReader(shards, max_open=3), 0
    for _ in reader.read(np.random.default_rng(0).permutation(shards.num_samples)):
        most = max(most, open_tars())
    assert most == before + 3
    reader.close()
    assert open_tars() == before


def all_of(shards: ShardSet) -> None:
    list(SampleReader(shards).read(np.arange(shards.num_samples)))


def test_a_changed_byte_is_named_with_shard_offset_and_key(own_shards):
    path, offset = own_shards.shard_path(1), int(own_shards.index["start"][5])
    contents = bytearray(path.read_bytes())
    contents[offset + 700] ^= 1
    path.write_bytes(contents)
    with pytest.raises(SampleError, match=f"part-001.tar, byte {offset}, sample 's005'") as caught:
        all_of(own_shards)
    assert "quarantine" in caught.value.remedy


def test_a_shard_that_is_cut_is_named_with_the_sample(own_shards):
    path, offset = own_shards.shard_path(1), int(own_shards.index["start"][6])
    os.truncate(path, offset + 100)
    with pytest.raises(ShardError, match=r"part-001.tar is truncated: sample 's006'"):
        all_of(own_shards)


def test_a_shard_that_vanishes_is_named(own_shards):
    own_shards.shard_path(0).unlink()
    with pytest.raises(ShardError, match=r"part-000.tar cannot be read .*'s000'.*No such file"):
        all_of(own_shards)


def test_an_error_about_a_hostile_folder_is_one_line(tmp_path):
    shards = tiny_set(tmp_path / HOSTILE, num_samples=4)
    shards.shard_path(0).write_bytes(b"\0" * shards.shard_path(0).stat().st_size)
    with pytest.raises(LivtError) as caught:
        all_of(shards)
    assert "\n" not in str(caught.value)
