"""Builds are the same bytes whoever writes them and however often they are killed; nobody else's folder is touched."""

import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from livt_scale.data.build.builder import BUILD, BuildOptions, build
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.verify import verify
from livt_scale.data.inspect import info
from livt_scale.data.manifest import MANIFEST, ShardManifest
from livt_scale.data.shard_set import ShardSet
from livt_scale.longtail import shuffled
from livt_scale.util.atomic import PREFIX
from livt_scale.util.errors import DataError, ManifestError, SampleError, ShardError, SourceError
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import contents, encoded, small_set, write_idx_spec, write_image_folder

SETS = """{
    lt: {source: raw, exponential: {n0: 30, imbalance: 10}, shard_samples: 16},
    twin: {source: raw, balanced: {like: lt}},
  }"""
LABELS = [0, 1, 2] * 40
SHIPPED = Path(__file__).parents[3] / "shards" / "fashion-mnist-lt"


@pytest.fixture
def spec(tmp_path):
    return load_spec(write_idx_spec(tmp_path, LABELS, sets=SETS))


def test_a_build_holds_the_images_it_promises(spec, tmp_path):
    built = build(spec, tmp_path / "out", workers=1)
    assert [(b.name, b.num_samples, b.kept) for b in built] == [("lt", 42, 0), ("twin", 42, 0)]
    source = spec.open_source("raw")
    images = {source.key(i): (source.label(i), source.image(i)[1]) for i in range(len(source))}
    for name, counts in [("lt", [30, 9, 3]), ("twin", [14, 14, 14])]:
        shards = ShardSet.open(tmp_path / "out" / name)
        assert shards.class_counts.tolist() == counts
        keys = shards.keys(np.arange(shards.num_samples))
        assert len(set(keys)) == len(keys)
        for number, key in enumerate(keys):
            row = shards.index[number]
            path = shards.shard_path(int(shards.shard_of(np.array([number]))[0]))
            data = path.read_bytes()[int(row["start"]) : int(row["start"] + row["nbytes"])]
            begin = int(row["data_offset"])
            assert (int(row["label"]), data[begin : begin + int(row["data_size"])]) == images[key]
        assert verify(tmp_path / "out" / name, decode=True, workers=1) == []


def test_samples_are_shuffled_so_that_no_shard_is_of_one_class(tmp_path):
    labels = [0] * 100 + [1] * 100
    spec = load_spec(write_idx_spec(tmp_path, labels, sets="{all: {source: raw, shard_samples: 25}}"))
    build(spec, tmp_path / "out", workers=1)
    shards = ShardSet.open(tmp_path / "out" / "all")
    for k in range(len(shards.manifest.shards)):
        classes = shards.labels(np.arange(shards.first[k], shards.first[k + 1]))
        assert 3 < classes.sum() < 22
    order = [int(key.removeprefix("raw-")) for key in shards.keys(np.arange(200))]
    assert order == shuffled(200, seed=3).tolist()


def test_several_processes_write_the_same_bytes_as_one(spec, tmp_path):
    build(spec, tmp_path / "one", workers=1)
    build(spec, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert not any(str(tmp_path).encode() in data for data in contents(tmp_path / "one").values())


def test_building_again_does_nothing_and_another_spec_is_refused(spec, tmp_path):
    out = tmp_path / "out"
    build(spec, out, workers=1)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert [(b.made, b.kept) for b in build(spec, out, workers=1)] == [(0, 3), (0, 1)]
    images = tmp_path / "raw" / "images.gz"
    images.rename(tmp_path / "raw" / "elsewhere.gz")
    with pytest.raises(SourceError, match=r"images\.gz: No such file") as error:
        build(spec, out, workers=1)
    assert "can be used as it is" in error.value.remedy
    (tmp_path / "raw" / "elsewhere.gz").rename(images)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    other = load_spec(write_idx_spec(tmp_path, LABELS, sets=SETS.replace("n0: 30", "n0: 20")))
    with pytest.raises(DataError, match="built from another spec"):
        build(other, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_folder_with_somebody_elses_files_is_left_alone(spec, tmp_path):
    (tmp_path / "out" / "lt").mkdir(parents=True)
    (tmp_path / "out" / "lt" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"no build put there: thesis\.tex"):
        build(spec, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["lt/thesis.tex"]


def test_an_unfinished_build_goes_on_and_ends_with_the_same_bytes(spec, tmp_path):
    build(spec, tmp_path / "whole", workers=1)
    build(spec, tmp_path / "out", workers=1)
    lt = tmp_path / "out" / "lt"
    (lt / BUILD).write_bytes(_mark(spec, tmp_path))  # as before the end: no manifest, a shard half-written, one missing
    for name in (MANIFEST, "index.npy", "keys.bin", "lt-000002.tar"):
        (lt / name).unlink()
    (lt / f"{PREFIX}99-abc").write_bytes(b"half")
    kept = (lt / "lt-000000.tar").stat().st_ino
    assert [(b.made, b.kept) for b in build(spec, tmp_path / "out", workers=1)] == [(1, 2), (0, 1)]
    assert (lt / "lt-000000.tar").stat().st_ino == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _mark(spec, tmp_path: Path) -> bytes:
    """The build.json of a build of `lt` in tmp_path/failed that was stopped after a shard."""
    marks = []

    def fail(what, *_):
        if what == "scan of raw":
            return
        marks.append((tmp_path / "failed" / "lt" / BUILD).read_bytes())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "failed", workers=1, progress=fail)
    assert not (tmp_path / "failed" / "lt" / MANIFEST).exists()
    return marks[0]


def test_an_unfinished_build_of_other_images_starts_again_and_one_of_another_spec_is_refused(spec, tmp_path):
    _mark(spec, tmp_path)
    write_idx_spec(tmp_path, LABELS[::-1], sets=SETS)
    lines: list[str] = []
    build(spec, tmp_path / "failed", options=BuildOptions(report=lines.append), workers=1)
    assert any(line.startswith("lt: the images or options are not those of the unfinished build") for line in lines)
    build(spec, tmp_path / "fresh", workers=1)
    assert contents(tmp_path / "failed") == contents(tmp_path / "fresh")
    (tmp_path / "failed" / "lt" / MANIFEST).unlink()
    (tmp_path / "failed" / "lt" / BUILD).write_text('{"format": "livt-build", "name": "lt", "source": {}}')
    with pytest.raises(DataError, match="unfinished build from another spec"):
        build(spec, tmp_path / "failed", workers=1)


def test_a_finished_set_that_lost_a_shard_is_made_whole_again(spec, tmp_path):
    build(spec, tmp_path / "out", workers=1)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "lt" / "lt-000001.tar").unlink()
    damaged = bytearray(before["lt/lt-000000.tar"])
    damaged[700] ^= 1  # inside an image: key and label are as they were
    (tmp_path / "out" / "lt" / "lt-000000.tar").write_bytes(damaged)
    assert [(b.made, b.kept) for b in build(spec, tmp_path / "out", workers=1)] == [(2, 1), (0, 1)]
    assert contents(tmp_path / "out") == before


def test_an_index_that_is_damaged_is_made_again_as_its_error_says(spec, tmp_path):
    build(spec, tmp_path / "out", workers=1)
    before = contents(tmp_path / "out")
    index = tmp_path / "out" / "lt" / "index.npy"
    index.write_bytes(b"x" * index.stat().st_size)
    with pytest.raises(ManifestError, match="not an index") as error:
        ShardSet.open(index.parent)
    assert "remove it and build the set again" in str(error.value)
    index.unlink()
    build(spec, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == before


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path):
    labels = [c for c in range(4) for _ in range(500)]
    path = write_idx_spec(tmp_path, labels, sets="{all: {source: raw, shard_samples: 25}}")
    build(load_spec(path), tmp_path / "whole", workers=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "livt_scale", "shards", "build", str(path), "--out", str(out), "--workers", "2"]
    kept = 0
    for wanted in (1, 30):  # shards on the disk when the kill comes
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while len(list(out.glob("all/*.tar"))) < wanted and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not (out / "all" / MANIFEST).exists()
        there = len(list(out.glob("all/*.tar")))
        assert kept <= there < 80
        kept = there
    (built,) = build(load_spec(path), out, workers=2)
    assert built.kept >= kept
    assert built.kept + built.made == 80
    assert contents(out) == contents(tmp_path / "whole")


def test_two_builds_of_one_folder_do_not_meet(spec, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".build.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process builds"):
            build(spec, tmp_path / "out")
    build(spec, tmp_path / "out", workers=1)  # a lock that nobody holds is no obstacle
    assert not (tmp_path / "out" / ".build.lock").exists()


def test_an_unreadable_image_stops_the_build_before_anything_is_written(tmp_path):
    root = write_image_folder(tmp_path / "raw", {"a": 20, "b": 20})
    (root / "b" / "0007.png").write_bytes(b"<html>404</html>")
    path = tmp_path / "spec.yaml"
    path.write_text("name: x\nsources: {raw: {folder: {root: raw}}}\nsets: {all: {source: raw, shard_samples: 10}}\n")
    with pytest.raises(SourceError, match=r"1 of 40 images cannot be used \(not an image: b/0007\.png\)"):
        build(load_spec(path), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    (root / "b" / "0007.png").write_bytes(encoded(27))
    assert build(load_spec(path), tmp_path / "out", workers=1)[0].num_samples == 40


def test_a_class_too_small_for_the_profile_is_named(tmp_path):
    spec = load_spec(write_idx_spec(tmp_path, [0, 0, 1], sets="{x: {source: raw, balanced: {per_class: 2}}}"))
    with pytest.raises(SourceError, match="set x, source raw: class 1 has 1 images, the profile asks for 2"):
        build(spec, tmp_path / "out")


def test_sets_of_one_spec_have_the_same_classes(tmp_path):
    write_image_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_image_folder(tmp_path / "val", {"a": 2, "c": 2})
    path = tmp_path / "spec.yaml"
    path.write_text(
        "name: x\nsources: {train: {folder: {root: train}}, val: {folder: {root: val}}}\n"
        "sets: {train: {source: train}, val: {source: val}}\n"
    )
    with pytest.raises(SourceError, match="train and val have different classes"):
        build(load_spec(path), tmp_path / "out")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(spec, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # as a disk that is full after 8 KB a file
    try:
        with pytest.raises(DataError, match=r"lt-000000\.tar: not enough space") as error:
            build(spec, tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "finished files are kept" in str(error.value)
    assert list(contents(tmp_path / "out")) == ["lt/build.json", "twin/build.json"]
    build(spec, tmp_path / "out", workers=1)


def test_a_folder_that_cannot_be_written_is_one_clear_error(spec, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        build(spec, tmp_path / "file" / "out")


def test_existing_tars_are_a_source_for_a_build(tmp_path):
    small_set(tmp_path / "first")
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"name: x\nsources: {{old: {{tars: {{root: {tmp_path / 'first' / 'out' / 'all'}}}}}}}\n"
        "sets: {even: {source: old, balanced: {per_class: 2}}}\n"
    )
    build(load_spec(path), tmp_path / "out", workers=1)
    shards = ShardSet.open(tmp_path / "out" / "even")
    assert shards.class_counts.tolist() == [2, 2, 2]
    assert all(key.startswith("raw-") for key in shards.keys(np.arange(6)))


def test_strangers_tars_get_an_index_and_stay_as_they_are(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for k in range(4):
                image = encoded(4 * number + k, kind="jpeg")
                writer.write({"__key__": f"{number}/{k}", "jpg": image, "cls": b"%d" % (k % 2), "json": b"{}"})
    before = contents(folder)
    shards = index_tars(folder, workers=2)
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    assert shards.keys(np.arange(12)) == [f"{n}/{k}" for n in range(3) for k in range(4)]
    assert shards.class_counts.tolist() == [6, 6]
    assert shards.manifest.class_names == ["0", "1"]
    assert verify(folder, decode=True, workers=1) == []
    first = contents(folder)
    index_tars(folder, class_names=None, workers=1)
    assert contents(folder) == first


@pytest.mark.parametrize(
    ("second", "error", "said"),
    [
        (
            sample_bytes("a", 0, ("png", b"x")) + END,
            SampleError,
            r"1\.tar, offset 0, key 'a'.*0\.tar",
        ),
        (sample_bytes("b", 5, ("png", b"x")) + END, SampleError, r"1\.tar.*label 5 is outside the 2 classes"),
        (sample_bytes("b", 0, ("png", b"x")), ShardError, r"1\.tar.*cut"),
        (b"", ShardError, r"1\.tar.*not a tar"),
    ],
)
def test_tars_that_cannot_be_a_set_are_refused_and_nothing_is_written(tmp_path, second, error, said):
    (tmp_path / "0.tar").write_bytes(sample_bytes("a", 1, ("png", b"x")) + END)
    (tmp_path / "1.tar").write_bytes(second)
    with pytest.raises(error, match=said):
        index_tars(tmp_path, class_names=["x", "y"], workers=1)
    assert sorted(contents(tmp_path)) == ["0.tar", "1.tar"]


def test_a_folder_without_tars_or_with_a_manifest_of_ours_is_not_indexed(tmp_path):
    with pytest.raises(ManifestError, match=r"holds no \.tar"):
        index_tars(tmp_path)
    with pytest.raises(DataError, match="built from a spec"):
        index_tars(small_set(tmp_path))


def test_info_counts_what_is_there(tmp_path):
    facts = info(small_set(tmp_path))
    assert (facts["samples"], facts["class_counts"], facts["imbalance_factor"]) == (20, [12, 6, 2], 6)
    assert facts["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out" / "all").glob("*.tar"))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("train-lt", [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]),
        ("train-balanced", [248] * 8 + [247] * 2),
        ("val", [100] * 10),
    ],
)
def test_the_shards_that_ship_are_whole_and_of_the_promised_counts(name, counts):
    shards = ShardSet.open(SHIPPED / name)
    assert shards.class_counts.tolist() == counts
    assert len(shards.manifest.shards) >= 4
    assert verify(SHIPPED / name, decode=True, workers=1) == []


def test_the_shards_that_ship_are_small_licensed_and_of_the_spec_that_ships():
    assert sum(len(data) for data in contents(SHIPPED).values()) < 15e6
    assert "Zalando" in (SHIPPED / "LICENSE").read_text()
    spec = load_spec(SHIPPED.parent / "fashion-mnist-lt.yaml")
    assert [b.made for b in build(spec, SHIPPED)] == [0, 0, 0]
    training = [ShardManifest.read(SHIPPED / name) for name in ("train-lt", "train-balanced")]
    assert training[0].num_samples == training[1].num_samples == 2478


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist")
@pytest.mark.slow
def test_the_full_set_builds_from_the_package(tmp_path):
    built = build(load_spec(SHIPPED.parent / "fashion-mnist-lt-full.yaml"), tmp_path)
    assert [b.num_samples for b in built] == [14886, 14886, 10000]
    counts = ShardManifest.read(tmp_path / "train-lt").class_counts
    assert counts == [int(6000 * 100 ** (-c / 9)) for c in range(10)]


def test_our_shards_open_in_tar_and_show_the_images(tmp_path):
    folder = small_set(tmp_path)
    names = subprocess.run(["tar", "tf", folder / "all-000000.tar"], capture_output=True, text=True, check=True).stdout
    assert Counter(name.rpartition(".")[2] for name in names.split()) == {"png": 6, "cls": 6}
    subprocess.run(["tar", "xf", folder / "all-000000.tar", "-C", tmp_path], check=True)
    first = tmp_path / names.split()[0]
    with Image.open(first) as image:
        assert image.size == (4, 4)
    assert first.stat().st_mtime == 0
