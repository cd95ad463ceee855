"""Every flipped byte is found and named; a quarantine leaves out what is bad, counted by class, and nothing else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.verify import verify
from livt_scale.data.inspect import info
from livt_scale.data.manifest import INDEX, KEYS, MANIFEST, QUARANTINE
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, ManifestError
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import encoded, small_set

ONE = {"workers": 1}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set of two shards; whoever damages it puts it right again."""
    return small_set(tmp_path_factory.mktemp("set"), labels=[0] * 4 + [1] * 3, shard_samples=4)


def test_a_whole_set_has_no_faults(built):
    assert verify(built, decode=True, workers=1) == []
    assert verify(built, decode=True, workers=2) == []


@settings(max_examples=250)
@given(data=st.data())
def test_any_one_flipped_byte_is_found_and_named(built, data):
    shards = ShardSet.open(built)
    path = built / data.draw(st.sampled_from([MANIFEST, INDEX, KEYS, *(s.name for s in shards.manifest.shards)]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    try:
        faults = verify(built, **ONE)
    finally:
        path.write_bytes(whole)
    assert [fault.shard for fault in faults] == [path.name]
    if path.suffix == ".tar":
        number = next(k for k, s in enumerate(shards.manifest.shards) if s.name == path.name)
        rows = shards.index[shards.first[number] : shards.first[number + 1]]
        inside = np.flatnonzero((rows["start"] <= at) & (at < rows["start"] + rows["nbytes"]))
        sample = shards.first[number] + inside
        assert [fault.key for fault in faults] == (shards.keys(sample) if len(inside) else [None])
        assert faults[0].offset == (int(rows["start"][inside[0]]) if len(inside) else at)


def test_missing_and_cut_shards_are_named_with_the_samples_they_lack(tmp_path):
    folder = small_set(tmp_path, labels=[0] * 4 + [1] * 3, shard_samples=4)
    first, second = sorted(folder.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:2000])
    faults = verify(folder, **ONE)
    assert (faults[0].shard, faults[0].what) == (first.name, "cannot be read: No such file or directory")
    assert faults[1].shard == second.name
    assert {f.key for f in faults[2:]} <= set(
        ShardSet(folder, *_parts(folder), index=np.load(folder / INDEX)).keys(np.arange(3, 7))
    )
    with pytest.raises(DataError, match="more than a sample"):
        verify(folder, quarantine=True, **ONE)
    assert not (folder / QUARANTINE).exists()


def _parts(folder):
    from livt_scale.data.manifest import ShardManifest

    return ShardManifest.read(folder), ()


def test_with_a_damaged_index_the_shards_are_checked_all_the_same(tmp_path):
    folder = small_set(tmp_path)
    for name in (INDEX, "all-000001.tar"):
        data = bytearray((folder / name).read_bytes())
        data[700] ^= 1
        (folder / name).write_bytes(data)
    assert [fault.shard for fault in verify(folder, **ONE)] == [INDEX, "all-000001.tar"]


def test_no_set_at_all_is_an_error_not_a_fault(tmp_path):
    with pytest.raises(ManifestError, match="livt shards build"):
        verify(tmp_path)


@pytest.fixture
def with_bad_images(tmp_path):
    """A stranger's set of three classes: sample b-1 is cut, c-0 is no image; the tars themselves are whole."""
    folder = tmp_path / "a set, 'quoted'"
    folder.mkdir()
    images = {
        f"{name}-{k}": encoded(label * 10 + k, kind="jpeg", px=16) for label, name in enumerate("abc") for k in (0, 1)
    }
    images["b-1"], images["c-0"] = images["b-1"][:-40], b"\xff\xd8\xffnot a photograph"
    parts = [sample_bytes(key, "abc".index(key[0]), ("jpg", data)) for key, data in images.items()]
    (folder / "0.tar").write_bytes(b"".join(parts[:3]) + END)
    (folder / "1.tar").write_bytes(b"".join(parts[3:]) + END)
    index_tars(folder, workers=1)
    return folder


def test_an_image_that_does_not_decode_is_named(with_bad_images):
    assert verify(with_bad_images, **ONE) == []
    faults = verify(with_bad_images, decode=True, **ONE)
    assert [(f.shard, f.key) for f in faults] == [("1.tar", "b-1"), ("1.tar", "c-0")]


def test_a_quarantine_leaves_the_bad_out_and_counts_them_by_class(with_bad_images):
    verify(with_bad_images, decode=True, quarantine=True, **ONE)
    listed = json.loads((with_bad_images / QUARANTINE).read_text())["samples"]
    assert [(q["number"], q["key"], q["shard"], q["class"]) for q in listed] == [
        (3, "b-1", "1.tar", 1),
        (4, "c-0", "1.tar", 2),
    ]
    assert all(q["reason"] for q in listed)
    shards = ShardSet.open(with_bad_images)
    assert shards.keys(shards.usable_to_sample(np.arange(shards.num_samples))) == ["a-0", "a-1", "b-0", "c-1"]
    assert info(with_bad_images)["quarantined_by_class"] == [0, 1, 1]


def test_what_is_in_quarantine_is_marked_in_a_folder_and_at_a_url(with_bad_images, tmp_path):
    verify(with_bad_images, decode=True, quarantine=True, **ONE)
    plain = with_bad_images.rename(tmp_path / "plain")
    for place in (plain, plain.as_uri()):
        assert [(f.key, f.left_out) for f in verify(place, decode=True, **ONE)] == [("b-1", True), ("c-0", True)]


def test_only_a_check_that_decodes_lets_a_sample_out_of_quarantine(with_bad_images):
    verify(with_bad_images, decode=True, quarantine=True, **ONE)
    verify(with_bad_images, decode=False, quarantine=True, **ONE)  # finds nothing: the bytes are as written
    assert ShardSet.open(with_bad_images).quarantined.tolist() == [3, 4]


def test_a_quarantine_goes_when_nothing_is_bad(tmp_path):
    folder = small_set(tmp_path)
    bad = verify_with_flip(folder, sample=7)
    assert ShardSet.open(folder).quarantined.tolist() == [7]
    assert bad == ShardSet.open(folder).keys(np.array([7]))
    verify_with_flip(folder, sample=7)  # the same bit again: whole
    assert not (folder / QUARANTINE).exists()


def verify_with_flip(folder, *, sample: int) -> list[str | None]:
    shards = ShardSet.open(folder)
    path = shards.shard_path(int(shards.shard_of(np.array([sample]))[0]))
    data = bytearray(path.read_bytes())
    data[int(shards.index["start"][sample]) + 600] ^= 1
    path.write_bytes(data)
    return [fault.key for fault in verify(folder, decode=True, quarantine=True, **ONE)]
