"""Shards are written by webdataset's TarWriter, always with the same bytes."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from livt_scale.data.build.sources import open_tars
from livt_scale.data.build.writer import ShardJob, make_shard
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import SourceError
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import encoded

SHIPPED = Path(__file__).parents[3] / "shards" / "fashion-mnist-lt" / "val"


def test_a_shard_that_ships_is_rewritten_with_its_bytes_and_its_rows(tmp_path):
    shards = ShardSet.open(SHIPPED)
    first = shards.manifest.shards[1]
    here = slice(*shards.first[1:3])
    source = open_tars("val", SHIPPED).part(np.arange(here.start, here.stop))
    made = make_shard(ShardJob(tmp_path / first.name, source, sha256=None))
    assert (tmp_path / first.name).read_bytes() == (SHIPPED / first.name).read_bytes()
    assert made.info == first
    assert not made.was_there
    for name in ("start", "nbytes", "data_offset", "data_size", "label", "crc32"):
        np.testing.assert_array_equal(made.rows[name], shards.index[name][here])


@pytest.mark.parametrize("locale", ["utf-8", "latin-1"])
def test_bytes_do_not_depend_on_the_locale(tmp_path, monkeypatch, locale):
    (tmp_path / "raw").mkdir()
    samples = [sample_bytes(f"é {k}", k, ("png", encoded(k))) for k in range(3)]
    (tmp_path / "raw" / "0.tar").write_bytes(b"".join(samples) + END)
    source = open_tars("raw", tmp_path / "raw")
    monkeypatch.setattr(tarfile.TarFile, "encoding", locale)
    make_shard(ShardJob(tmp_path / "out.tar", source, sha256=None))
    assert (tmp_path / "out.tar").read_bytes() == b"".join(samples) + END


def test_a_failed_write_leaves_no_file(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.tar").write_bytes(sample_bytes("a", 0, ("png", encoded(0))) + END)
    source = open_tars("raw", tmp_path / "raw")
    gone = replace(source, tars=(tmp_path / "raw" / "1.tar",))
    with pytest.raises(SourceError):
        make_shard(ShardJob(tmp_path / "out.tar", gone, sha256=None))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]
