"""A set opens in no time whatever its size, and says what is wrong with it."""

import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.data.manifest import (
    INDEX,
    INDEX_DTYPE,
    KEYS,
    MANIFEST,
    QUARANTINE,
    FileInfo,
    Quarantine,
    ShardInfo,
    ShardManifest,
    canonical_json,
)
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import ManifestError, ShardError
from tests.small_sets import small_set

SHA = "0" * 64


def quarantine(folder: Path, numbers: list[int], **changed) -> None:
    (folder / QUARANTINE).unlink(missing_ok=True)
    shards = ShardSet.open(folder)
    told = [
        {
            "number": n,
            "key": shards.keys(np.array([n]))[0],
            "shard": shards.shard_path(int(shards.shard_of(np.array([n]))[0])).name,
            "class": int(shards.labels(np.array([n]))[0]),
            "reason": "test",
            **changed,
        }
        for n in numbers
    ]
    (folder / QUARANTINE).write_bytes(Quarantine.model_validate({"samples": told}).to_bytes())


def test_an_opened_set_knows_its_samples(tmp_path):
    shards = ShardSet.open(small_set(tmp_path))
    everyone = np.arange(20)
    assert (shards.num_samples, shards.num_classes) == (20, 3)
    assert shards.first.tolist() == [0, 6, 13, 20]
    assert shards.usable_per_shard.tolist() == [6, 7, 7]
    assert shards.class_counts.tolist() == [12, 6, 2]
    assert np.bincount(shards.labels(everyone)).tolist() == [12, 6, 2]
    assert sorted(shards.keys(everyone)) == [f"raw-{k:06d}" for k in range(20)]
    assert shards.shard_of(np.array([0, 5, 6, 19])).tolist() == [0, 0, 1, 2]
    assert shards.usable_to_sample(everyone).tolist() == everyone.tolist()


@given(num_samples=st.integers(1, 40), data=st.data())
def test_positions_skip_the_quarantined_samples_and_no_others(num_samples, data):
    lost = sorted(data.draw(st.sets(st.integers(0, num_samples - 1))))
    shards = ShardSet(Path(), None, (), index=None)
    shards.__dict__["quarantined"] = np.array(lost, dtype=np.int64)
    usable = [n for n in range(num_samples) if n not in lost]
    assert shards.usable_to_sample(np.arange(len(usable))).tolist() == usable


def test_a_quarantine_is_counted_by_shard_and_class(tmp_path):
    folder = small_set(tmp_path)
    before = ShardSet.open(folder)
    tail = int(np.flatnonzero(before.labels(np.arange(20)) == 2)[0])
    quarantine(folder, sorted({0, 5, 19, tail}))
    shards = ShardSet.open(folder)
    lost = shards.quarantined
    assert shards.num_samples == 20 - len(lost)
    assert shards.usable_per_shard.sum() == shards.class_counts.sum() == shards.num_samples
    assert shards.class_counts[2] == 2 - np.count_nonzero(before.labels(lost) == 2)
    assert shards.digest != before.digest


def test_a_quarantine_of_other_shards_is_refused(tmp_path):
    folder = small_set(tmp_path)
    quarantine(folder, [3], key="raw-999999")
    with pytest.raises(ManifestError, match="made for other shards"):
        ShardSet.open(folder)
    quarantine(folder, [3], number=20)
    with pytest.raises(ManifestError, match="made for other shards"):
        ShardSet.open(folder)
    (folder / QUARANTINE).write_text("{")
    with pytest.raises(ManifestError, match="quarantine"):
        ShardSet.open(folder)


def test_a_pickled_set_carries_no_index_and_is_not_checked_again(tmp_path):
    """A loader process gets it: hundreds of them would ask a file server for each shard's size."""
    shards = ShardSet.open(small_set(tmp_path))
    data = pickle.dumps(shards)
    assert len(data) < 1000 + len(shards.manifest.to_bytes())
    assert shards.index.tobytes() not in data
    for path in (MANIFEST, shards.manifest.shards[0].name):
        (shards.folder / path).unlink()
    again = pickle.loads(data)
    assert again.keys(np.arange(20)) == shards.keys(np.arange(20))
    assert again.digest == shards.digest


def test_opening_does_not_read_the_index_of_a_billion_samples(tmp_path):
    num_samples = 10**9
    with (tmp_path / INDEX).open("wb") as file:  # a sparse file of 37 GB: reading it would take minutes and all memory
        header = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + num_samples * INDEX_DTYPE.itemsize)
    (tmp_path / KEYS).write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    manifest = ShardManifest(
        name="large",
        seed=0,
        num_samples=num_samples,
        image_types=["jpg"],
        class_names=["a"],
        class_counts=[num_samples],
        shards=[ShardInfo(name="a.tar", bytes=0, sha256=SHA, samples=num_samples)],
        index=FileInfo(name=INDEX, bytes=(tmp_path / INDEX).stat().st_size, sha256=SHA),
        keys=FileInfo(name=KEYS, bytes=0, sha256=SHA),
        source={},
    )
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes())
    tracemalloc.start()
    shards = ShardSet.open(tmp_path)
    assert shards.labels(np.array([0, num_samples - 1])).tolist() == [0, 0]
    assert shards.usable_to_sample(np.array([num_samples - 1])).tolist() == [num_samples - 1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e6


def test_what_is_not_a_set_is_said_with_what_to_do(tmp_path):
    with pytest.raises(ManifestError, match="there is no folder"):
        ShardSet.open(tmp_path / "nothing")
    with pytest.raises(ManifestError, match="livt shards build"):
        ShardSet.open(tmp_path)
    folder = small_set(tmp_path)
    with pytest.raises(ManifestError, match="ive one of its sets: all"):
        ShardSet.open(folder.parent)
    (folder / MANIFEST).unlink()
    with pytest.raises(ManifestError, match="livt shards index"):
        ShardSet.open(folder)


def test_a_shard_that_is_gone_or_cut_is_named(tmp_path):
    folder = small_set(tmp_path)
    shard = folder / "all-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ShardError, match=r"all-000001\.tar has .* bytes, but the manifest says"):
        ShardSet.open(folder)
    shard.unlink()
    with pytest.raises(ShardError, match=r"all-000001\.tar is missing"):
        ShardSet.open(folder)


def test_an_index_that_is_cut_or_another_array_is_named(tmp_path):
    folder = small_set(tmp_path)
    data = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(data[:-1])
    with pytest.raises(ManifestError, match="index"):
        ShardSet.open(folder)
    (folder / INDEX).write_bytes(data.replace(b"'<u8'", b"'<i8'", 1))  # of the same size, another type
    with pytest.raises(ManifestError, match="index"):
        ShardSet.open(folder)


def test_an_index_with_objects_in_it_is_not_unpickled(tmp_path):
    folder = small_set(tmp_path)
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    evil = (tmp_path / "evil.npy").read_bytes()
    manifest = ShardManifest.read(folder)
    index = FileInfo(name=INDEX, bytes=len(evil), sha256=hashlib.sha256(evil).hexdigest())
    (folder / INDEX).write_bytes(evil)
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"index": index}).to_bytes())
    with pytest.raises(ManifestError, match="not an index"):
        ShardSet.open(folder)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = small_set(tmp_path)
    body = ShardManifest.read(folder).model_dump(mode="json")
    body["shards"][0]["name"] = name
    body["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
    (folder / MANIFEST).write_bytes(canonical_json(body))
    with pytest.raises(ManifestError, match=r"shards\.0"):
        ShardSet.open(folder)


def test_another_version_is_told_from_damage(tmp_path):
    folder = small_set(tmp_path)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ManifestError, match="version 2, this livt_scale reads"):
        ShardSet.open(folder)
    (folder / MANIFEST).write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ManifestError, match="the file was changed"):
        ShardSet.open(folder)
    for junk in ("", "[]", "{}", "\x00", '{"format": "livt-shards", "version": 1}', "[" * 100_000):
        (folder / MANIFEST).write_text(junk)
        with pytest.raises(ManifestError):
            ShardSet.open(folder)
