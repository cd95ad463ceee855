"""Each kind of raw data gives labels, unique keys and image bytes, and says at once what is wrong with it."""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from livt_scale.data.build.folder import open_folder
from livt_scale.data.build.idx import open_idx
from livt_scale.data.build.sources import open_list, open_tars, shard_key
from livt_scale.util.errors import SampleError, ShardError, SourceError, UnusableImage
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import encoded, write_idx, write_idx_set, write_image_folder


def test_a_folder_gives_its_classes_by_name_and_images_at_any_depth(tmp_path):
    root = write_image_folder(tmp_path / "a 'folder'\n", {"zebra": 2, "ant hill": 3})
    (root / "zebra" / "more").mkdir()
    (root / "zebra" / "more" / "x.v2.JPEG").write_bytes(encoded(90, kind="jpeg"))
    (root / "zebra" / "Thumbs.db").write_bytes(b"not an image")
    (root / "zebra" / ".hidden.png").write_bytes(b"not an image")
    (root / "notes.txt").write_text("not a class")
    source = open_folder("raw", root)
    assert source.class_names == ("ant hill", "zebra")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [source.key(i) for i in (0, 5)] == ["ant%20hill/0000", "zebra/more/x%2Ev2"]
    assert source.image(5) == ("jpg", encoded(90, kind="jpeg"))
    assert source.image(0)[0] == "png"


def test_class_names_give_the_order_of_the_folders(tmp_path):
    root = write_image_folder(tmp_path / "raw", {"a": 1, "b": 2})
    assert open_folder("raw", root, class_names=("b", "a")).labels.tolist() == [0, 0, 1]
    empty = open_folder("raw", root, class_names=("b", "a", "c"))  # whether a set can do without c is the set's to say
    assert (empty.class_names, empty.labels.tolist()) == (("b", "a", "c"), [0, 0, 1])
    with pytest.raises(SourceError, match="b is no class"):
        open_folder("raw", root, class_names=("a",))


def test_a_folder_without_classes_or_images_is_refused(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        open_folder("raw", tmp_path / "nothing")
    with pytest.raises(SourceError, match="holds no folders"):
        open_folder("raw", tmp_path)
    root = write_image_folder(tmp_path / "raw", {"a": 0, "b": 0})
    with pytest.raises(SourceError, match="source raw: no images"):
        open_folder("raw", root)


def test_images_that_differ_by_their_ending_alone_have_it_in_their_keys(tmp_path):
    root = write_image_folder(tmp_path / "raw", {"a": 2})
    (root / "a" / "0000.jpg").write_bytes(encoded(1, kind="jpeg"))
    (root / "a" / "0000%2Ejpg.png").write_bytes(encoded(7))  # what another rule would make of the second one
    source = open_folder("raw", root)
    keys = {source.paths[i]: source.key(i) for i in range(4)}
    assert keys == {
        "a/0000.jpg": "a/0000%2Ejpg",
        "a/0000.png": "a/0000%2Epng",
        "a/0000%2Ejpg.png": "a/0000%252Ejpg",
        "a/0001.png": "a/0001",
    }
    part = source.part(np.array([source.paths.index("a/0000.png")]))
    assert part.key(0) == "a/0000%2Epng"


def test_the_type_of_an_image_is_what_it_is_not_what_its_name_says(tmp_path):
    root = write_image_folder(tmp_path / "raw", {"a": 2})
    (root / "a" / "0000.png").rename(root / "a" / "0000.JPEG")
    (root / "a" / "0001.png").write_bytes(b"<html>404</html>")
    source = open_folder("raw", root)
    assert source.image(0) == ("png", encoded(0))
    with pytest.raises(UnusableImage, match=r"0001\.png: not an image") as error:
        source.image(1)
    assert error.value.reason == "not an image"


@pytest.fixture
def listed(tmp_path):
    """Images below tmp_path/raw, and a function that opens a list of lines over them."""
    root = write_image_folder(tmp_path / "raw", {"a": 2, "with space": 2})

    def opened(*lines, **options):
        (tmp_path / "list.txt").write_text("\n".join(lines))
        return open_list("raw", root, list_file=tmp_path / "list.txt", **options)

    return opened


def test_a_list_is_read_as_imagenet_lt_publishes_it(listed):
    source = listed("a/0000.png 0", "a/0001.png 0\r", "", "with space/0000.png 1", "./with space/0001.png\t1", "")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.class_names == ("0", "1")
    assert [source.key(i) for i in range(4)] == ["a/0000", "a/0001", "with%20space/0000", "with%20space/0001"]
    assert source.image(3) == ("png", encoded(3))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a/0000.png 0", "a/0001.png"], r"line 2: .* is not `path label`"),
        (["a/0000.png zero"], r"line 1: .* is not `path label`"),
        (["/etc/passwd 0"], "not below the root"),
        (["a/../../list.txt 0"], "not below the root"),
        (["a/0000.png 0", "a/0007.png 0"], r"there is no image .*a/0007\.png"),
        (["b/0000.png 0"], r"there is no image .*b/0000\.png"),
        (["a/\0/x.png 0"], "cannot be the name of a file"),
        (["a/0000.png 0", "./a/0000.png 0"], "'a/0000' is there twice"),
        ([], "no images"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_the_line_or_the_image(listed, lines, said):
    with pytest.raises(SourceError, match=said):
        listed(*lines)


def test_a_label_outside_the_classes_names_the_image(listed):
    with pytest.raises(SourceError, match="a/0001 has the label 2, outside the 2 classes 0 to 1"):
        listed("a/0000.png 0", "a/0001.png 2", class_names=("x", "y"))


def test_an_image_that_goes_missing_is_named(listed, tmp_path):
    source = listed("a/0000.png 0")
    (tmp_path / "raw" / "a" / "0000.png").unlink()
    with pytest.raises(UnusableImage, match=r"there is no image .*a/0000\.png") as error:
        source.image(0)
    assert error.value.reason == "missing"


@pytest.mark.parametrize("packed", [True, False])
def test_idx_images_become_the_same_pngs_every_time(tmp_path, packed):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    images = write_idx(tmp_path / "images", pixels, packed=packed)
    labels = write_idx(tmp_path / "labels", np.array([0, 1, 0, 1, 2], dtype=np.uint8), packed=packed)
    source = open_idx("train", images, labels=labels)
    assert source.labels.tolist() == [0, 1, 0, 1, 2]
    assert [source.key(i) for i in (0, 4)] == ["train-000000", "train-000004"]
    kind, png = source.image(3)
    assert kind == "png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels[3])
    assert source.image(3) == (kind, png)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-5], "cannot be read"),
        (lambda data: b"PK" + data, "not an IDX file"),
        (lambda data: b"", "not an IDX file"),
        (lambda data: bytes([0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255]), "bytes of data"),
        (lambda data: bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]), "has the shape"),
        (None, "images.gz: No such file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, said):
    folder = write_idx_set(tmp_path, [0, 1, 2])
    images = folder / "images.gz"
    if damage:
        images.write_bytes(damage(images.read_bytes()))
    else:
        images.unlink()
    with pytest.raises(SourceError, match=said):
        open_idx("train", images, labels=folder / "labels.gz")


def test_tars_are_a_source_and_keep_their_keys(tmp_path):
    for number in range(2):
        parts = [sample_bytes(f"t{number}/é {k}", k, ("jpg", encoded(k, kind="jpeg"))) for k in range(3)]
        (tmp_path / f"{number}.tar").write_bytes(b"".join(parts) + END)
    source = open_tars("raw", tmp_path)
    assert [source.key(i) for i in range(6)] == [f"t{n}/é {k}" for n in range(2) for k in range(3)]
    assert source.labels.tolist() == [0, 1, 2] * 2
    assert source.image(4) == ("jpg", encoded(1, kind="jpeg"))


def test_tars_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds no \.tar"):
        open_tars("raw", tmp_path)
    sample = sample_bytes("a", 0, ("png", encoded(0)))
    (tmp_path / "0.tar").write_bytes(sample + END)
    (tmp_path / "1.tar").write_bytes(sample + END)
    with pytest.raises(SourceError, match="'a' is there twice"):
        open_tars("raw", tmp_path)
    (tmp_path / "1.tar").write_bytes(sample)
    with pytest.raises((ShardError, SampleError), match=r"1\.tar"):
        open_tars("raw", tmp_path)


def test_a_part_is_small_and_numbered_from_zero(tmp_path):
    whole = open_idx("train", write_idx_set(tmp_path, [0, 1] * 5000) / "images.gz", labels=tmp_path / "labels.gz")
    part = pickle.loads(pickle.dumps(whole.part(np.array([9999, 3]))))
    assert (len(part), part.key(0), part.label(1)) == (2, "train-009999", 1)
    assert part.image(1) == whole.image(3)
    assert len(pickle.dumps(part)) < 2000


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_keys_that_fit_a_tar_header(names):
    keys = [shard_key(name) for name in names]
    assert keys[0] != keys[1]
    for key in keys:
        assert "." not in key
        assert len(key.encode()) <= 94


def test_a_name_that_is_not_utf8_has_a_key():
    assert shard_key(os.fsdecode(b"a\xff")) == "a%FF"
