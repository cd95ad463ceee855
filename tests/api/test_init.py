"""`livt.init`: what it writes for each form of a folder, what it refuses before it writes, that the result trains."""

import re

import pytest
import torch
from safetensors.torch import save_file

import livt_scale as livt
from livt_scale.config.load import load_recipe
from livt_scale.data.build.builder import PlannedBuild
from livt_scale.data.build.spec import load_spec
from livt_scale.train.preflight import check_run
from livt_scale.util.errors import SourceError, UsageError, WeightsError
from tests.photographs import LONG_TAIL, photograph_folder
from tests.small_sets import contents, encoded, write_image_folder
from tests.weights.small_mae import official_state

COUNTS = {"cat": 30, "dog": 12, "owl": 3}


@pytest.fixture
def photos(tmp_path):
    return write_image_folder(tmp_path / "photos", COUNTS)


def made(folder, out, **options):
    """(the recipe, the training set, the evaluation set, what was reported)."""
    lines = []
    path = livt.init(folder, out=out, report=lines.append, **options)
    recipe = load_recipe(path)
    assert check_run(recipe) == []
    return recipe, livt.ShardSet.open(recipe.data.train), livt.ShardSet.open(recipe.data.val), lines


def counts_of(shards):
    return dict(zip(shards.class_names, shards.class_counts.tolist(), strict=True))


def test_a_folder_of_classes_is_split(photos, tmp_path):
    recipe, train, val, _ = made(photos, tmp_path / "project")
    assert counts_of(train) == {"cat": 24, "dog": 10, "owl": 2}
    assert counts_of(val) == {"cat": 6, "dog": 2, "owl": 1}
    assert not set(train.keys(range(36))) & set(val.keys(range(9)))
    assert (recipe.name, recipe.model.channels, recipe.model.image_px) == ("project", 3, 16)
    assert recipe.stages.pretrain is not None


def test_train_and_val_are_taken_as_they_are_and_val_may_lack_a_class(tmp_path):
    write_image_folder(tmp_path / "set" / "train", COUNTS)
    write_image_folder(tmp_path / "set" / "Validation", {"cat": 4, "dog": 2})
    write_image_folder(tmp_path / "set" / "test", {"cat": 1})
    _, train, val, lines = made(tmp_path / "set", tmp_path / "project")
    assert counts_of(train) == COUNTS
    assert counts_of(val) == {"cat": 4, "dog": 2, "owl": 0}
    assert [line for line in lines if "note" in line] == ["note: test is not used: the evaluation set is Validation"]


def test_a_class_may_be_called_train(tmp_path):
    write_image_folder(tmp_path / "vehicles", {"train": 6, "bus": 5, "car": 4})
    assert set(counts_of(made(tmp_path / "vehicles", tmp_path / "project")[1])) == {"train", "bus", "car"}


def test_a_list_file_numbers_its_classes(photos, tmp_path):
    lines = [f"{p.relative_to(photos)} {k}" for k, c in enumerate(COUNTS) for p in sorted((photos / c).iterdir())]
    (photos / "all.txt").write_text("\n".join(lines))
    assert counts_of(made(photos / "all.txt", tmp_path / "project")[1]) == {"0": 24, "1": 10, "2": 2}


def test_both_files_say_why_of_each_value_and_can_be_used_again(photos, tmp_path):
    made(photos, tmp_path / "project")
    for name in ("shards.yaml", "recipe.yaml"):
        lines = (tmp_path / "project" / name).read_text().splitlines()
        assert [ln for ln in lines if not (ln.startswith("#") or ln.endswith(":") or re.search(r"  # \w", ln))] == []
    spec = load_spec(tmp_path / "project" / "shards.yaml")
    assert (tmp_path / "project" / spec.build.name / "train" / "manifest.json").is_file()


def test_large_images_are_made_smaller_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "large" / name).mkdir(parents=True)
        for k in range(2):
            (tmp_path / "large" / name / f"{k}.jpg").write_bytes(encoded(k + ord(name), kind="jpeg", px=500))
    made(tmp_path / "large", tmp_path / "project")
    assert load_spec(tmp_path / "project" / "shards.yaml").build.sets["train"].prepare.resize_shorter == 256


# --- from given weights ---


def test_weights_decide_the_model_and_there_is_no_pretraining(photos, tmp_path):
    livt.register_model_size("vit_of_the_test", livt.ViTDims(32, 2, 4, 4))
    try:
        save_file(official_state(), tmp_path / "mae.safetensors")
        recipe, *_ = made(photos, tmp_path / "project", weights=tmp_path / "mae.safetensors")
    finally:
        from livt_scale.config.model import MODEL_SIZES

        MODEL_SIZES.remove("vit_of_the_test")
    assert recipe.stages.pretrain is None
    assert (recipe.stages.finetune.init, recipe.model.size, recipe.model.image_px) == ("weights", "vit_of_the_test", 16)
    assert recipe.data.mean == (0.485, 0.456, 0.406)


def test_weights_that_cannot_be_read_leave_no_project(photos, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises(WeightsError):
        livt.init(photos, out=tmp_path / "project", weights=tmp_path / "w.safetensors")
    assert not (tmp_path / "project").exists()


# --- what cannot be used ---


def refused(error, folder, out, match, **options):
    with pytest.raises(error, match=match) as caught:
        livt.init(folder, out=out, **options)
    assert not out.exists()
    return caught.value


def test_one_class_is_refused_and_classes_inside_of_it_are_named(tmp_path):
    write_image_folder(tmp_path / "one", {"cat": 3})
    refused(SourceError, tmp_path / "one", tmp_path / "project", "one class, 'cat'")
    write_image_folder(tmp_path / "nested" / "photos", COUNTS)
    error = refused(SourceError, tmp_path / "nested", tmp_path / "project", "one class, 'photos'")
    assert str(tmp_path / "nested" / "photos") in error.remedy


def test_classes_in_folders_inside_classes_are_one_class_which_is_noted(tmp_path):
    write_image_folder(tmp_path / "all" / "animals", {"cat": 3, "dog": 3})
    write_image_folder(tmp_path / "all" / "cars", {"bus": 3})
    _, train, _, lines = made(tmp_path / "all", tmp_path / "project")
    assert list(train.class_names) == ["animals", "cars"]
    assert [line for line in lines if "'animals' are in folders inside it (cat, dog)" in line]


def test_a_class_of_one_image_is_trained_on_and_noted(tmp_path):
    write_image_folder(tmp_path / "few", {"cat": 9, "owl": 1})
    _, train, val, lines = made(tmp_path / "few", tmp_path / "project")
    assert (counts_of(train)["owl"], counts_of(val)["owl"]) == (1, 0)
    assert [line for line in lines if line.startswith("note: 1 class has one image (owl)")]


@pytest.mark.parametrize("empty", [(), ("cat", "dog")])
def test_no_image_is_refused(tmp_path, empty):
    (tmp_path / "none").mkdir()
    for name in empty:
        (tmp_path / "none" / name).mkdir()
    refused(SourceError, tmp_path / "none", tmp_path / "project", "no folders|no images")


def test_an_empty_folder_beside_the_classes_is_named(photos, tmp_path):
    (photos / "New Folder").mkdir()
    refused(SourceError, photos, tmp_path / "project", "1 of 4 classes have no image: New Folder")


def test_an_evaluation_class_that_is_not_trained_on_is_refused(tmp_path):
    write_image_folder(tmp_path / "set" / "train", {"cat": 2, "dog": 2})
    write_image_folder(tmp_path / "set" / "val", {"cat": 2, "owl": 2})
    refused(SourceError, tmp_path / "set", tmp_path / "project", "owl")


def test_a_project_that_exists_is_refused_before_anything_is_read(photos, tmp_path):
    (tmp_path / "project").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        livt.init(tmp_path / "nowhere", out=tmp_path / "project")
    made(photos, tmp_path / "other")
    before = contents(tmp_path / "other")
    with pytest.raises(UsageError, match="exists already"):
        livt.init(photos, out=tmp_path / "other")
    assert contents(tmp_path / "other") == before


def test_a_project_inside_the_images_and_a_folder_that_is_not_there_are_refused(photos, tmp_path):
    refused(UsageError, photos, photos / "project", "inside the source")
    refused(UsageError, tmp_path / "nowhere", tmp_path / "project", "there is no")


def test_images_that_cannot_be_used_are_refused_or_left_out(photos, tmp_path):
    (photos / "cat" / "0000.png").write_bytes(b"<html>")
    refused(SourceError, photos, tmp_path / "project", "1 of 45 images cannot be used")
    _, train, val, lines = made(photos, tmp_path / "project", skip_bad=True)
    assert train.num_samples + val.num_samples == 44
    assert any("cat/0000.png" in line for line in lines)


def test_a_project_that_was_interrupted_is_resumed_but_not_over_another_one(photos, tmp_path, monkeypatch):
    def killed(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PlannedBuild, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            livt.init(photos, out=tmp_path / "project")
    assert [p.name for p in (tmp_path / "project").iterdir()] == ["shards.yaml"]
    write_image_folder(tmp_path / "others", {"a": 4, "b": 4})
    with pytest.raises(UsageError, match="exists already"):
        livt.init(tmp_path / "others", out=tmp_path / "project")
    made(photos, tmp_path / "project")


def test_the_recipe_trains_to_a_model(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = livt.init("photos", out="project")
    short = {"stages.*.epochs": 1, "stages.*.warmup_epochs": 0, "data.workers": 0, "log.tensorboard": False}
    run = livt.train(recipe, overrides=short)
    assert run == tmp_path / "runs" / "project"
    predicted = livt.load(run)([photos / "cat" / "0001.png"])
    assert predicted.class_names == ("cat", "dog", "owl")
    assert torch.allclose(predicted.probabilities.sum(), torch.tensor(1.0))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes of CPU time
def test_on_photographs_the_accuracy_is_far_above_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photograph_folder(tmp_path / "photos", counts=LONG_TAIL)
    run = livt.train(livt.init("photos", out="project"))
    from livt_scale.train.run_files import read_eval

    top1 = read_eval(run / "finetune" / "eval.json")["top1"]
    assert top1["mean_class"] > 3 / len(LONG_TAIL)
