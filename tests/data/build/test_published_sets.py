"""The sets of the paper, from look-alikes of what people have on disk: the same formats, few and tiny images."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from livt_scale.data.build.builder import build
from livt_scale.data.build.cifar import open_cifar
from livt_scale.data.build.inaturalist import open_inaturalist
from livt_scale.data.build.spec import check_published_counts, load_spec
from livt_scale.data.shard_set import ShardSet
from livt_scale.longtail import class_counts_exponential
from livt_scale.util.errors import SourceError
from tests.small_sets import contents

SHARDS = Path(__file__).resolve().parents[3] / "shards"
COUNTS = [4, 2, 1]


def image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (value, 10, 20)).save(path, "jpeg")


@pytest.fixture
def inat(tmp_path):
    """Three species, as train2018.json tells of them; a name with a space and a quote."""
    images, annotations = [], []
    for label, count in enumerate(COUNTS):
        for k in range(count):
            number = 100 * label + k
            name = f"train_val2018/Aves/{label}/it's {number}.jpg"
            image(tmp_path / name, number % 256)
            images.append({"id": number, "file_name": name, "width": 9})
            annotations.insert(0, {"id": 7, "image_id": number, "category_id": label})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": c, "name": "x"} for c in (2, 0, 1)]}

    def write(**changed):
        (tmp_path / "train2018.json").write_text(json.dumps({**tree, **changed}))
        return open_inaturalist("train", tmp_path, annotations=tmp_path / "train2018.json")

    write.tree = tree
    return write


def test_inaturalist_joins_images_and_annotations_by_their_numbers(inat):
    source = inat()
    assert np.bincount(source.labels).tolist() == COUNTS
    assert source.class_names == ("0", "1", "2")
    assert source.image(0)[0] == "jpg"
    assert "it%27s%20200" in source.key(6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["images"][0].update(file_name="../../etc/passwd"), "not below the root"),
        (lambda t: t["images"][0].update(file_name="/etc/passwd"), "not below the root"),
        (lambda t: t["images"][0].update(file_name="train_val2018/a\0.jpg"), "cannot be the name of a file"),
        (lambda t: t["images"][0].update(file_name="\ud800/a.jpg"), "contains half a character"),
        (lambda t: t["images"][0].update(file_name="train_val2018/none.jpg"), "there is no image"),
        (lambda t: [i.update(file_name=f"no\n{i['id']}.jpg") for i in t["images"]], r"of 7 images 7 are .* and 4 more"),
        (lambda t: t["images"][0].update(file_name=t["images"][1]["file_name"]), "is there twice"),
        (lambda t: t["images"][0].update(file_name=7), "file_name is 7"),
        (lambda t: t["images"][1].update(id=0), "the id 0 is there twice"),
        (lambda t: t["images"][1].update(id=77), "image 77 has no annotation"),
        (lambda t: t["annotations"].append({"image_id": 0, "category_id": 1}), "two annotations"),
        (lambda t: t["annotations"].append({"image_id": 12345, "category_id": 1}), "are of no image, as 12345"),
        (lambda t: t["annotations"][0].update(category_id=-1), "the category is -1"),
        (lambda t: t["annotations"][0].update(category_id=True), "category_id is True"),
        (lambda t: t["categories"].pop(), "not numbered 0 to 1"),
        (lambda t: t.pop("annotations"), "no list 'annotations'"),
        (lambda t: t.update(images={}), "no list 'images'"),
    ],
)
def test_what_does_not_fit_together_is_named(inat, change, said):
    inat()
    tree = json.loads(json.dumps(inat.tree))
    change(tree)
    with pytest.raises(SourceError, match=said) as told:
        inat(**{**{"annotations": None}, **tree})
    assert "\n" not in str(told.value)


def test_categories_are_classes_by_number_or_in_the_order_of_an_image_folder(tmp_path):
    images, annotations = [], []
    for c in range(12):
        image(tmp_path / f"{c}.jpg", c)
        images.append({"id": c, "file_name": f"{c}.jpg"})
        annotations.append({"image_id": c, "category_id": c})
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert open_inaturalist("train", tmp_path, annotations=path).labels.tolist() == list(range(12))
    source = open_inaturalist("train", tmp_path, annotations=path, as_text=True)
    assert source.class_names == ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    assert [source.class_names[label] for label in source.labels] == [str(c) for c in range(12)]


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[1]", "holds no images"), ("[" * 10**5, "nested more than 64 deep")]
)
def test_a_damaged_json_is_named(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=said):
        open_inaturalist("train", tmp_path, annotations=tmp_path / "a.json")


def cifar(folder, name, labels, *, classes):
    """A file of CIFAR's binary version; pixel (channel, y, x) of image i is i + 10 · channel at the corner."""
    records = np.zeros((len(labels), (1 if classes == 10 else 2) + 3072), np.uint8)
    records[:, -3073] = labels
    if classes == 100:
        records[:, 0] = 19  # the coarse label, which is not read
    for i in range(len(labels)):
        records[i, -3072:] = np.repeat([i, i + 10, i + 20], 1024)
    folder.mkdir(exist_ok=True)
    records.tofile(folder / name)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_over_its_files_with_planes_as_colours(tmp_path, classes):
    labels = np.arange(classes).repeat(2)
    cifar(tmp_path, "a.bin", labels[:-3], classes=classes)
    cifar(tmp_path, "b.bin", labels[-3:], classes=classes)
    source = open_cifar("train", tmp_path, files=["a.bin", "b.bin"], classes=classes)
    assert source.labels.tolist() == labels.tolist()
    kind, data = source.part(np.array([len(labels) - 2])).image(0)
    assert kind == "png"
    (tmp_path / "x.png").write_bytes(data)
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.size == (32, 32)
        assert opened.getpixel((31, 0)) == (1, 11, 21), "the second image of the second file"


def test_the_python_version_is_not_unpickled_and_the_binary_one_is_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SourceError, match="holds pickles") as told:
        open_cifar("train", tmp_path, files=["data_batch_1.bin"], classes=10)
    assert "cifar-10-binary" in told.value.remedy
    (tmp_path / "data_batch_1").rename(tmp_path / "data_batch_1.bin")
    with pytest.raises(SourceError, match="no multiple of a record"):
        open_cifar("train", tmp_path, files=["data_batch_1.bin"], classes=10)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("cut", "said"), [(1, "no multiple"), (10**9, "no multiple")])
def test_a_cut_file_is_named(tmp_path, cut, said):
    cifar(tmp_path, "a.bin", range(10), classes=10)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(max(10 * 3073 - cut, 0))
    with pytest.raises(SourceError, match=said):
        open_cifar("train", tmp_path, files=["a.bin"], classes=10)


def test_a_label_outside_the_classes_is_named(tmp_path):
    cifar(tmp_path, "a.bin", [*range(10), 10], classes=10)
    with pytest.raises(SourceError, match="has the label 10"):
        open_cifar("train", tmp_path, files=["a.bin"], classes=10)


# --- what is expected of a published set ---


def test_another_number_of_images_of_a_class_is_named_with_both_numbers():
    known = np.array([5, 3, 2])
    check_published_counts("train", known, images=10, classes=3, known=known)
    with pytest.raises(SourceError, match=r"1 of 3 classes differ \(class 1: 4 instead of 3\)"):
        check_published_counts("train", np.array([5, 4, 2]), images=10, classes=3, known=known)
    with pytest.raises(SourceError, match="the same numbers in another order"):
        check_published_counts("train", np.array([3, 5, 2]), images=10, classes=3, known=known)
    with pytest.raises(SourceError, match="4 classes, the published set 3"):
        check_published_counts("train", np.array([5, 3, 2, 1]), images=10, classes=3, known=None)
    with pytest.raises(SourceError, match="11 images, the published set 10"):
        check_published_counts("train", np.array([5, 4, 2]), images=10, classes=3)
    check_published_counts("val", np.array([3, 3, 3]), images=9, classes=3, smallest=3, largest=3)
    with pytest.raises(SourceError, match="its largest class, 1, has 4 of them and the published one's 3"):
        check_published_counts("val", np.array([2, 4, 3]), images=9, classes=3, smallest=3, largest=3)
    with pytest.raises(SourceError, match="its smallest class, 0, has 2"):
        check_published_counts("val", np.array([2, 4, 3]), images=9, classes=3, smallest=3, largest=4)


@pytest.mark.parametrize(
    ("n0", "classes", "imbalance", "images"),
    [(5000, 10, 100, 12406), (5000, 10, 10, 20431), (500, 100, 100, 10847), (500, 100, 10, 19573)],
)
def test_the_papers_cifar_sets_have_the_published_numbers(n0, classes, imbalance, images):
    assert class_counts_exponential(n0, classes, imbalance).sum() == images


@pytest.mark.parametrize(("name", "images", "classes"), [("imagenet_lt", 115_846, 1000), ("inat18", 437_513, 8142)])
def test_the_counts_that_ship_are_the_published_ones(name, images, classes):
    counts = json.loads((SHARDS / "counts" / f"{name}.json").read_text())
    assert (sum(counts), len(counts)) == (images, classes)
    assert min(counts) > 0


# Super-categories are runs of category numbers: (first, how many, training images). How many of both is said by the
# competition's page (https://github.com/visipedia/inat_comp/tree/master/2018), a second source beside the counts that
# ship: those come from LiVT's logs, in the order of an image folder. Where a run begins, paths say: Reptilia/4264/.
INAT18_GROUPS = [
    (142, 2031, 87_192),  # Insecta
    (2229, 369, 7_835),  # Actinopterygii
    (2598, 144, 11_156),  # Amphibia
    (2746, 1258, 143_950),  # Aves
    (4264, 284, 22_754),  # Reptilia
    (4900, 321, 6_864),  # Fungi
    (5221, 2917, 118_800),  # Plantae
]


def test_the_counts_of_inat18_are_in_the_order_of_its_categories():
    counts = json.loads((SHARDS / "counts" / "inat18.json").read_text())
    assert [sum(counts[first : first + size]) for first, size, _ in INAT18_GROUPS] == [n for *_, n in INAT18_GROUPS]
    as_text = json.loads((SHARDS / "counts" / "inat18_as_text.json").read_text())
    assert as_text == [counts[c] for c in sorted(range(8142), key=str)]


@pytest.mark.parametrize("path", sorted(SHARDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_spec_is_read_and_says_its_command(path):
    assert load_spec(path).build.name == path.stem
    assert f"livt shards build shards/{path.name}" in path.read_text()


def test_a_look_alike_is_refused_with_nothing_written_unless_its_counts_are_ignored(inat, tmp_path):
    inat()
    (tmp_path / "val2018.json").write_text((tmp_path / "train2018.json").read_text())
    sources = [f"train={tmp_path}", f"val={tmp_path}"]
    with pytest.raises(SourceError, match="3 classes, the published set 8142") as told:
        build(load_spec(SHARDS / "inat18.yaml", overrides=sources), tmp_path / "out")
    assert "--ignore-expected" in told.value.remedy
    assert not list((tmp_path / "out").glob("*/*.tar"))
    build(load_spec(SHARDS / "inat18.yaml", overrides=sources, ignore_expected=True), tmp_path / "out")
    assert list(ShardSet.open(tmp_path / "out" / "train").manifest.class_counts) == COUNTS


def test_cifar_lt_is_built_from_look_alikes_with_every_set_of_its_spec(tmp_path):
    cifar(tmp_path, "test_batch.bin", range(10), classes=10)
    for k in range(1, 6):
        cifar(tmp_path, f"data_batch_{k}.bin", np.arange(10).repeat(4), classes=10)
    text = (
        (SHARDS / "cifar10-lt.yaml")
        .read_text()
        .replace("n0: 5000", "n0: 20")
        .replace("imbalance: 100", "imbalance: 20")
    )
    (tmp_path / "cifar10-lt.yaml").write_text(text)
    sources = [f"train={tmp_path}", f"test={tmp_path}"]
    build(load_spec(tmp_path / "cifar10-lt.yaml", overrides=sources, ignore_expected=True), tmp_path / "out")
    counts = list(ShardSet.open(tmp_path / "out" / "train-if10").manifest.class_counts)
    assert counts == class_counts_exponential(20, 10, 10).tolist()
    twin = ShardSet.open(tmp_path / "out" / "train-balanced-if10").manifest.class_counts
    assert sum(twin) == sum(counts)
    assert max(twin) - min(twin) <= 1


# --- whole builds, from lists and folders as they are published ---


def lists(folder, spec, *, train_name, test_name, train_counts=(5, 3, 2), per_class=2):
    """A look-alike of ImageNet or Places365 with its lists; returns the shipped spec with the look-alike's numbers."""
    classes = ["n01440764", "n01443537", "n02391049"]
    for which, counts in (("train", train_counts), ("val", [per_class] * 3)):
        lines = []
        for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
            for k in range(count):
                path = f"{which}/{name}/{name if which == 'train' else 'ILSVRC2012_val'}_{label}{k}.JPEG"
                image(folder / path, 10 * label + k)
                lines.append(f"{path} {label}\n")
        (folder / (train_name if which == "train" else test_name)).write_text("".join(lines))
    (folder / "counts.json").write_text(json.dumps(train_counts))
    told = (SHARDS / spec).read_text()
    train, val = re.findall(r"expected: (\{.*?\})\}", told)
    total = sum(train_counts)
    small = f"images: {total}, classes: 3, largest: {max(train_counts)}, smallest: {min(train_counts)}"
    small += ", counts: counts.json" if "counts" in train else ""
    told = told.replace(train, f"{{{small}}}")
    told = told.replace(val, f"{{images: {3 * per_class}, classes: 3, largest: {per_class}, smallest: {per_class}}}")
    (folder / spec).write_text(told)
    return load_spec(folder / spec, overrides=[f"train={folder}", f"test={folder}"])


LISTED = {
    "imagenet-lt.yaml": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
    "places-lt.yaml": ("Places_LT_train.txt", "Places_LT_test.txt"),
}


@pytest.mark.parametrize("spec", LISTED)
def test_sets_with_published_lists_are_built_and_another_list_or_a_missing_image_is_not(spec, tmp_path):
    train_name, test_name = LISTED[spec]
    out = tmp_path / "out"
    loaded = lists(tmp_path, spec, train_name=train_name, test_name=test_name)
    whole = (tmp_path / test_name).read_text()
    (tmp_path / test_name).write_text((tmp_path / train_name).read_text())  # the list of another split
    with pytest.raises(SourceError, match="set val has 10 images, the published set 6"):
        build(loaded, out, workers=1)
    (tmp_path / test_name).write_text(whole)
    lost = tmp_path / "train" / "n01443537" / "n01443537_11.JPEG"
    lost.rename(tmp_path / "lost")
    with pytest.raises(SourceError, match=r"of 10 images 1 are missing: .*n01443537_11\.JPEG"):
        build(loaded, out, workers=1)
    assert not list(out.glob("*/*")), "nothing half-built"
    (tmp_path / "lost").rename(lost)
    assert [(b.name, b.num_samples) for b in build(loaded, out, workers=1)] == [("train", 10), ("val", 6)]
    assert list(ShardSet.open(out / "train").manifest.class_counts) == [5, 3, 2]


def test_imagenet_bal_takes_as_many_of_each_class_from_the_folders(tmp_path):
    lists(tmp_path, "imagenet-lt.yaml", train_name="a.txt", test_name="b.txt", train_counts=(5, 4, 4))
    told = (SHARDS / "imagenet-bal.yaml").read_text()
    told = told.replace("per_class: 160", "per_class: 3").replace(
        "images: 160000, classes: 1000", "images: 9, classes: 3"
    )
    told = told.replace("images: 50000, classes: 1000, smallest: 50, largest: 50", "images: 6, classes: 3, smallest: 2")
    (tmp_path / "bal.yaml").write_text(told)
    sources = [f"train={tmp_path / 'train'}", f"test={tmp_path / 'val'}"]
    build(load_spec(tmp_path / "bal.yaml", overrides=sources), tmp_path / "out", workers=1)
    manifest = ShardSet.open(tmp_path / "out" / "train").manifest
    assert list(manifest.class_counts) == [3, 3, 3]
    assert list(manifest.class_names) == ["n01440764", "n01443537", "n02391049"], "the order of the lists' labels"


@pytest.mark.parametrize("kind", ["inaturalist", "cifar"])
def test_a_build_that_is_stopped_goes_on_to_the_same_bytes(inat, tmp_path, kind):
    if kind == "cifar":
        cifar(tmp_path, "a.bin", np.arange(10).repeat(3), classes=10)
        source = "cifar: {root: ., files: [a.bin], classes: 10}"
    else:
        inat()
        source = "inaturalist: {root: ., annotations: train2018.json}"
    spec = tmp_path / "some.yaml"
    spec.write_text(f"name: some\nsources: {{raw: {{{source}}}}}\nsets: {{all: {{source: raw, shard_samples: 2}}}}\n")
    (whole,) = build(load_spec(spec), tmp_path / "whole", workers=1)

    def stop(name, samples, *_):
        if name == "all" and samples >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(load_spec(spec), tmp_path / "out", workers=1, progress=stop)
    assert not (tmp_path / "out" / "all" / "manifest.json").exists()
    (built,) = build(load_spec(spec), tmp_path / "out", workers=1)
    assert built.kept >= 2
    assert built.kept + built.made == whole.made
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
