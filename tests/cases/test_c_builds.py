"""Cases C1 to C8: no image is lost in silence, and a folder of real photographs builds at the first try."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.data.build.builder import BUILD, BuildOptions, build
from livt_scale.data.build.indexing import class_names_in
from livt_scale.data.build.record import RECORD
from livt_scale.data.build.sources import open_list
from livt_scale.data.build.spec import load_spec
from livt_scale.data.image.decode import decode
from livt_scale.data.manifest import MANIFEST, ShardManifest
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, SourceError, UsageError
from tests.photographs import CLASSES, WRITERS, add_bad_files, add_other_files, photograph_folder, photographs
from tests.small_sets import contents, encoded, write_image_folder

ONE = "name: x\nsources: {raw: {folder: {root: raw}}}\nsets: {train: {source: raw, shard_samples: 8}}\n"


@pytest.fixture
def spec(tmp_path):
    """A spec of one set of the folder raw/: 12 images of a, 6 of b."""
    write_image_folder(tmp_path / "raw", {"a": 12, "b": 6})
    return write_spec(tmp_path)


def write_spec(folder: Path, text: str = ONE) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def make(spec: Path, *, out: str = "out", **options: bool) -> list[str]:
    """Build; the lines of the report."""
    lines: list[str] = []
    build(load_spec(spec), spec.parent / out, options=BuildOptions(report=lines.append, **options), workers=1)
    return lines


def keys(folder: Path) -> list[str]:
    shards = ShardSet.open(folder)
    return sorted(shards.keys(np.arange(shards.num_samples)))


def livt(*args: object) -> tuple[int, str]:
    """Exit code and stdout of `livt shards …`; a LivtError is raised as it is."""
    result = CliRunner().invoke(app, ["shards", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


# --- C1 ---


def test_c1_images_behind_links_and_of_any_ending_are_used_and_what_is_not_is_listed(spec, tmp_path):
    cat = tmp_path / "raw" / "a"
    elsewhere = write_image_folder(tmp_path / "elsewhere", {"more": 3})
    (cat / "linked").symlink_to(elsewhere / "more")
    (cat / "file.png").symlink_to(elsewhere / "more" / "0000.png")
    (cat / "x.jfif").write_bytes(encoded(50, kind="jpeg"))
    (cat / "y.PNG").write_bytes(encoded(51))
    (cat / "without an ending").write_bytes(encoded(52))
    (cat / "deep" / "er").mkdir(parents=True)
    (cat / "deep" / "er" / "z.JPEG").write_bytes(encoded(53, kind="jpeg"))
    (cat / "notes.txt").write_text("BM and P5 begin no image")
    (tmp_path / "raw" / "lost.png").write_bytes(encoded(54))
    with pytest.raises(SourceError, match=r"an image outside the classes' folders: lost\.png"):
        make(spec)
    lines = make(spec, skip_bad=True)
    assert ShardSet.open(tmp_path / "out" / "train").class_counts.tolist() == [12 + 3 + 5, 6]
    assert {"a/linked/0002", "a/file", "a/x", "a/without%20an%20ending", "a/deep/er/z"} < set(
        keys(tmp_path / "out" / "train")
    )
    assert lines[0] == "source raw: 28 found: 26 images, 1 that cannot be used, 1 passed over"
    assert lines[-1].split() == ["1", "not", "an", "image", "by", "name", "and", "contents", "a/notes.txt"]


def test_c1_links_that_lead_round_or_up_end_and_bring_in_no_other_class(spec, tmp_path):
    cat = tmp_path / "raw" / "a"
    (cat / "sub").mkdir()
    (cat / "sub" / "own.png").write_bytes(encoded(60))
    (cat / "again").symlink_to("sub")
    (cat / "sub" / "round").symlink_to(cat)
    (cat / "up").symlink_to("..")
    (cat / "itself").symlink_to("itself")
    lines = make(spec)
    assert ShardSet.open(tmp_path / "out" / "train").class_counts.tolist() == [13, 6]
    assert "a/sub/own" in keys(tmp_path / "out" / "train"), "under the name that it has without links"
    table = "\n".join(lines[lines.index("passed over:") :])
    for name in ("a/again/", "a/sub/round/", "a/up/", "a/itself"):
        assert name in table


# --- C2 ---


@pytest.mark.parametrize("ending", WRITERS)
def test_c2_every_kind_of_file_is_in_a_shard_with_its_pixels(ending, tmp_path):
    photo = photographs()[4][:50, :70]
    path = tmp_path / "raw" / "a" / ("x" + ending.partition(" ")[0])
    path.parent.mkdir(parents=True)
    WRITERS[ending](Image.fromarray(photo), path)
    make(write_spec(tmp_path))
    data, _, _ = read_sample(ShardSet.open(tmp_path / "out" / "train"), 0)
    raw = path.read_bytes()
    if raw[:2] == b"\xff\xd8" or raw[1:4] == b"PNG":
        assert data == raw
        return
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
        if expected.mode.startswith("I"):
            expected = Image.fromarray((np.asarray(expected) >> 8).astype(np.uint8))
        pixels = np.asarray(expected.convert("RGB")).astype(int)
    is_lossy = data[:2] == b"\xff\xd8"
    assert is_lossy == (ending in (".webp", ".tiff with a JPEG"))
    difference = np.abs(decode(data).astype(int) - pixels)
    assert difference.mean() < 2.5 if is_lossy else difference.max() == 0


def test_c2_a_converted_set_says_so_and_has_the_same_bytes_again(spec, tmp_path):
    for k, kind in enumerate(("webp", "bmp", "gif")):
        Image.open(io.BytesIO(encoded(70 + k))).save(tmp_path / "raw" / "b" / f"new.{kind}", kind)
    make(spec)
    make(spec, out="again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    source = ShardManifest.read(tmp_path / "out" / "train").source
    assert source["converted"] == {"webp to jpg": 1, "bmp to png": 1, "gif to png": 1}
    assert "left_out" not in source
    assert {"b/new%2Ewebp", "b/new%2Ebmp", "b/new%2Egif"} < set(keys(tmp_path / "out" / "train"))
    assert "converted         1 webp to jpg, 1 bmp to png, 1 gif to png" in livt("info", tmp_path / "out" / "train")[1]


def test_c2_one_table_names_all_that_is_bad_and_skip_bad_leaves_it_out(tmp_path, golden):
    counts = photograph_folder(tmp_path / "photos", images=600)
    bad, others = add_bad_files(tmp_path / "photos"), add_other_files(tmp_path / "photos")
    assert (sum(counts.values()), bad, others) == (600, 20, 5)
    spec = write_spec(
        tmp_path,
        "name: photos\nsources: {photos: {folder: {root: photos}, split: {fraction: 0.1}}}\n"
        "sets: {train: {source: photos, role: training}, val: {source: photos, role: evaluation}}\n",
    )
    result = CliRunner().invoke(app, ["shards", "build", str(spec), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert isinstance(result.exception, SourceError)
    assert "20 of 620 images cannot be used" in result.exception.message
    assert "--skip-bad" in result.exception.remedy
    assert not (tmp_path / "out").exists()
    golden("cli/shards-build-bad.txt", result.stdout)

    code, out = livt("build", spec, "--out", tmp_path / "out", "--workers", 1, "--skip-bad")
    assert code == 0
    assert out.startswith(result.stdout)
    sets = [ShardSet.open(tmp_path / "out" / name) for name in ("train", "val")]
    assert sum(one.num_samples for one in sets) == 600
    for one, name in zip(sets, ("train", "val"), strict=True):
        source = one.manifest.source
        assert sum(row["count"] for row in source["left_out"].values()) == 20
        assert sum(len(row["names"]) for row in source["left_out"].values()) == 20
        kept = [one.manifest.image_types[k] for k in one.index["image_type"]]
        assert Counter(kept).total() == one.num_samples, name
    total = sum((one.class_counts for one in sets), np.zeros(len(CLASSES), dtype=np.int64))
    assert dict(zip(sets[0].manifest.class_names, total.tolist(), strict=True)) == counts
    converted = [sum(one.manifest.source["converted"].values()) for one in sets]
    per_writer = Counter(list(WRITERS)[k % len(WRITERS)] for k in range(600))
    assert sum(converted) == sum(per_writer[name] for name in WRITERS if not is_kept(name))
    assert livt("verify", tmp_path / "out" / "train", "--decode", "--workers", 1)[0] == 0


def is_kept(writer: str) -> bool:
    return writer.partition(" ")[0].lower() in (".jpg", ".jpeg", ".jfif", ".png")


# --- C3 ---


def test_c3_after_a_file_is_removed_an_unfinished_build_starts_again_by_itself(spec, tmp_path):
    def stop(what: str, *_: int) -> None:
        if what == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(load_spec(spec), tmp_path / "out", workers=1, progress=stop)
    assert (tmp_path / "out" / "train" / BUILD).exists()
    (tmp_path / "raw" / "a" / "0003.png").unlink()
    lines = make(spec)
    assert any("it starts again" in line for line in lines)
    make(spec, out="fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_c3_a_replaced_image_is_not_taken_from_an_unfinished_build(spec, tmp_path):
    def stop(what: str, done: int, *_: int) -> None:
        if what == "train" and done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(load_spec(spec), tmp_path / "out", workers=1, progress=stop)
    for k in range(12):
        (tmp_path / "raw" / "a" / f"{k:04}.png").write_bytes(encoded(100 + k))
    make(spec)
    make(spec, out="fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# --- C4 ---


def test_c4_a_cut_jpeg_is_found_before_the_build_and_verify_names_the_quarantine(spec, tmp_path):
    path = tmp_path / "raw" / "a" / "cut.jpg"
    path.write_bytes(encoded(1, kind="jpeg", px=40)[:-300])
    with pytest.raises(SourceError, match=r"does not decode.*a/cut\.jpg") as error:
        make(spec)
    assert "--skip-bad" in error.value.remedy
    make(spec, decode=False)
    code, out = livt("verify", tmp_path / "out" / "train", "--decode", "--workers", 1)
    assert code == 1
    assert f"livt shards verify {tmp_path / 'out' / 'train'} --decode --quarantine" in out
    assert livt("verify", tmp_path / "out" / "train", "--decode", "--quarantine", "--workers", 1)[0] == 0


# --- C5 ---


def replace_image(raw: Path) -> None:
    path = raw / "a" / "0003.png"
    before = path.stat()
    path.write_bytes(encoded(99))
    assert path.stat().st_size == before.st_size, "noise is as long as noise"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


CHANGES = {
    r"1 replaced \(a/0003\.png\)": replace_image,
    r"1 added \(b/new\.png\)": lambda raw: (raw / "b" / "new.png").write_bytes(encoded(99)),
    r"1 removed \(b/0001\.png\)": lambda raw: (raw / "b" / "0001.png").unlink(),
    r"1 added \(b/0000m\.png\), 1 removed \(a/0000\.png\)": lambda raw: (raw / "a" / "0000.png").rename(
        raw / "b" / "0000m.png"
    ),
    r"2 added \(aa/0000\.png, aa/0001\.png\), 1 classes added \(aa\)": lambda raw: write_image_folder(raw, {"aa": 2}),
    r"6 removed \(b/0000\.png, .* and 3 more\), 1 classes removed \(b\)": lambda raw: shutil.rmtree(raw / "b"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_c5_a_change_of_the_images_after_a_build_is_named_and_built_again(said, spec, tmp_path):
    make(spec)
    before = contents(tmp_path / "out")
    CHANGES[said](tmp_path / "raw")
    with pytest.raises(DataError) as error:
        make(spec)
    assert re.fullmatch(f".* images of its source raw have changed since: {said}", error.value.message)
    assert error.value.remedy.startswith("--again builds the set from the images that are there now")
    assert contents(tmp_path / "out") == before
    make(spec, again=True)
    make(spec, out="fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_c5_images_that_were_only_touched_have_not_changed(spec, tmp_path):
    make(spec)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for path in (tmp_path / "raw").rglob("*.png"):
        os.utime(path)
    assert make(spec) == make(spec, again=True) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_c5_another_class_in_a_list_a_folder_that_is_gone_and_a_lost_record_are_noticed(tmp_path):
    write_image_folder(tmp_path / "raw", {"a": 3})
    (tmp_path / "raw" / "list.txt").write_text("a/0000.png 0\na/0001.png 1\na/0002.png 1\n")
    spec = write_spec(tmp_path, ONE.replace("folder: {root: raw}", "list: {root: raw, list: list.txt}"))
    make(spec)
    (tmp_path / "raw" / "list.txt").write_text("a/0000.png 0\na/0001.png 0\na/0002.png 1\n")
    with pytest.raises(DataError, match=r"1 moved to another class \(a/0001\.png\)"):
        make(spec)
    (tmp_path / "raw").rename(tmp_path / "gone")
    with pytest.raises(SourceError, match="cannot be compared with it") as error:
        make(spec)
    assert "the set itself can be used as it is" in error.value.remedy
    (tmp_path / "out" / "train" / RECORD).unlink()
    assert make(spec) == [f"{tmp_path / 'out' / 'train'} has no {RECORD}: it is not compared with its images"]
    (tmp_path / "out" / "train" / RECORD).write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(DataError, match="is damaged"):
        make(spec)


# --- C6 ---

TWO = (
    "name: x\nclass_names: [a, b, c]\nsources: {train: {folder: {root: train}}, val: {folder: {root: val}}}\n"
    "sets: {train: {source: train}, val: {source: val}}\n"
)


def test_c6_an_evaluation_set_may_lack_a_class_and_a_training_set_may_not(tmp_path):
    write_image_folder(tmp_path / "train", {"a": 3, "b": 2, "c": 1})
    write_image_folder(tmp_path / "val", {"a": 1, "b": 1})
    make(write_spec(tmp_path, TWO))
    assert ShardSet.open(tmp_path / "out" / "val").class_counts.tolist() == [1, 1, 0]
    shutil.rmtree(tmp_path / "train" / "c")
    with pytest.raises(SourceError, match=r"set train, source train: class 2 \('c'\) has no image") as error:
        make(write_spec(tmp_path, TWO), out="new")
    assert "role evaluation" in error.value.remedy
    assert not (tmp_path / "new").exists()
    make(write_spec(tmp_path, TWO.replace("{source: train}", "{source: train, role: evaluation}")), out="new")
    write_image_folder(tmp_path / "train", {"c": 1})
    with pytest.raises(SourceError, match="have different classes") as error:
        make(write_spec(tmp_path, TWO.replace("class_names: [a, b, c]\n", "")), out="third")
    assert "an evaluation set may lack images of some" in error.value.remedy


# --- C7 ---


@pytest.mark.parametrize("out", ["raw/out", "raw", "raw/a", "link/out"])
def test_c7_shards_are_not_written_into_a_source(out, spec, tmp_path):
    (tmp_path / "link").symlink_to("raw")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="inside the source raw"):
        livt("build", spec, "--out", tmp_path / out)
    assert contents(tmp_path) == before


def test_c7_nor_by_default(spec, tmp_path):
    moved = spec.rename(tmp_path / "raw" / "spec.yaml")
    moved.write_text(ONE.replace("root: raw", "root: ."))
    with pytest.raises(UsageError, match="inside the source raw"):
        livt("build", moved)


# --- C8 ---


def test_c8_names_of_classes_are_read_without_marks_blanks_and_carriage_returns(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat \r\n\tdog\r\nél an\r\n\r\n".encode())
    assert class_names_in(path) == ["cat", "dog", "él an"]
    path.write_bytes(b"cat\n \t\ndog\n")
    with pytest.raises(UsageError, match=r"names\.txt, line 2 is blank"):
        class_names_in(path)
    path.write_bytes(b"cat\ndog\ncat \n")
    with pytest.raises(UsageError, match=r"line 3: 'cat' is on line 1 already"):
        class_names_in(path)
    path.write_bytes("cat\n".encode("utf-16"))
    with pytest.raises(UsageError, match="not text in UTF-8"):
        class_names_in(path)


def test_c8_a_list_is_read_without_marks_blanks_and_carriage_returns(tmp_path):
    root = write_image_folder(tmp_path / "raw", {"a": 2})
    (tmp_path / "list.txt").write_bytes("\ufeffa/0000.png\t0\r\n\r\na/0001.png 1 \t\r\n".encode())
    source = open_list("raw", root, list_file=tmp_path / "list.txt")
    assert (source.paths, source.labels.tolist()) == (("a/0000.png", "a/0001.png"), [0, 1])


@pytest.mark.parametrize(
    ("names", "said"), [("[a, '  ']", "the name of class 1 is blank"), ("[a, b, a]", "the classes 0 and 2 have")]
)
def test_c8_a_spec_refuses_blank_and_equal_names(names, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        load_spec(write_spec(tmp_path, f"class_names: {names}\n{ONE}"))


# --- one folder without an evaluation set ---

SPLIT = (
    "name: x\nsources: {raw: {folder: {root: raw}, split: {fraction: 0.25, seed: 1}}}\n"
    "sets: {train: {source: raw, role: training}, lt: {source: raw, role: training, exponential: {imbalance: 2}},"
    " val: {source: raw, role: evaluation}}\n"
)


def test_a_split_source_is_two_sets_that_share_no_image(tmp_path):
    write_image_folder(tmp_path / "raw", {"a": 12, "b": 6, "c": 2, "d": 1})
    spec = write_spec(tmp_path, SPLIT.replace("exponential: {imbalance: 2}", "balanced: {per_class: 1}"))
    make(spec)
    found = {name: ShardSet.open(tmp_path / "out" / name) for name in ("train", "lt", "val")}
    assert found["train"].class_counts.tolist() == [9, 4, 1, 1], "one image of each class at least"
    assert found["val"].class_counts.tolist() == [3, 2, 1, 0]
    train, lt, val = (set(keys(tmp_path / "out" / name)) for name in found)
    assert not train & val
    assert lt < train
    (tmp_path / "raw" / "a" / "0012.png").write_bytes(encoded(400))
    make(spec, out="more")
    assert len(val - set(keys(tmp_path / "more" / "val"))) <= 1, "an image more moves at most one other"
    make(write_spec(tmp_path, spec.read_text().replace("seed: 1", "seed: 2")), out="other")
    assert val != set(keys(tmp_path / "other" / "val"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("role: evaluation", "shard_samples: 9", r"sources\.raw is split, so sets\.val needs a role"),
        ("role: evaluation", "role: training", "no set of it with the role evaluation"),
        ("fraction: 0.25", "fraction: 1", r"split\.fraction is 1"),
        ("role: evaluation", "role: test", r"sets\.val\.role is 'test'"),
    ],
)
def test_a_split_that_loses_images_or_roles_is_refused(old, new, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        load_spec(write_spec(tmp_path, SPLIT.replace(old, new)))


def test_equal_images_of_training_and_evaluation_and_of_two_classes_are_named(tmp_path):
    for root in ("train", "val"):
        write_image_folder(tmp_path / root, {"a": 4, "b": 3})
    for path in sorted((tmp_path / "val").rglob("*.png"))[1:]:
        path.write_bytes(encoded(int(path.stem) + (300 if path.parent.name == "a" else 400)))
    shutil.copy(tmp_path / "train" / "a" / "0002.png", tmp_path / "train" / "b" / "twin.png")
    lines = make(write_spec(tmp_path, TWO.replace("class_names: [a, b, c]\n", "")))
    assert lines[-2:] == [
        "train: 1 equal images between classes: a/0002.png = b/twin.png",
        "val: 1 equal images with train: a/0000.png = a/0000.png",
    ]
    source = ShardManifest.read(tmp_path / "out" / "val").source
    assert source["equal_images"] == {"with train": {"count": 1, "pairs": [["a/0000.png", "a/0000.png"]]}}
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "val")  # the training set is finished: its record knows its images
    assert make(write_spec(tmp_path, TWO.replace("class_names: [a, b, c]\n", "")))[-1] == lines[-1]
    assert contents(tmp_path / "out") == before
    assert MANIFEST in {path.name for path in (tmp_path / "out" / "val").iterdir()}
