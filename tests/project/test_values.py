"""The values of a generated recipe: a recipe that is valid for any data, groups that hold every class, reasons."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.load import load_recipe
from livt_scale.longtail import shot_groups
from livt_scale.project.files import as_yaml
from livt_scale.project.measure import PixelFacts
from livt_scale.project.values import (
    FEW_UNDER,
    MANY_OVER,
    DataFacts,
    Start,
    Value,
    held_out_fraction,
    recipe_values,
    shot_thresholds,
)

COUNTS = st.lists(st.integers(1, 3000), min_size=2, max_size=40).map(np.array)
COLOUR, GREY = (0.5, 0.4, 0.3), (0.5,)


def facts(counts, *, px=57, channels=3, start=None):
    mean = COLOUR if channels == 3 else GREY
    return DataFacts("a/train", "a/val", np.array(counts), PixelFacts(100, px, channels, mean, mean), start)


def loaded(folder, found):
    head = {"extends": Value("livt:base/livt", "-"), "name": Value("a", "-")}
    path = folder / "recipe.yaml"
    path.write_text(as_yaml(head | recipe_values(found)), encoding="utf-8")
    return load_recipe(path)


@settings(max_examples=20)
@given(counts=COUNTS, px=st.integers(1, 6000), channels=st.sampled_from([1, 3]), scale=st.sampled_from([1, 1000]))
def test_the_recipe_is_valid_for_any_data_and_its_batch_is_not_above_the_images(
    counts, px, channels, scale, tmp_path_factory
):
    found = facts(counts * scale, px=px, channels=channels)
    recipe = loaded(tmp_path_factory.getbasetemp(), found)
    for part in (recipe.stages.pretrain, recipe.stages.finetune):
        assert 2 <= part.global_batch <= found.num_images
        assert part.global_batch % 2 == 0
    assert recipe.model.channels == channels
    assert recipe.stages.finetune.init == "pretrain"


@given(counts=COUNTS)
def test_thresholds_keep_the_usual_ones_where_each_group_has_a_class(counts):
    many_over, few_under = (value.value for value in shot_thresholds(counts))
    usual = shot_groups(counts, many_over=MANY_OVER, few_under=FEW_UNDER)
    if all(len(classes) for classes in usual.values()):
        assert (many_over, few_under) == (MANY_OVER, FEW_UNDER)
    assert 1 <= few_under <= many_over + 1
    groups = shot_groups(counts, many_over=many_over, few_under=few_under)
    if len(set(counts.tolist())) > 2:
        assert all(len(classes) for classes in groups.values())
    assert sorted(np.concatenate(list(groups.values()))) == list(range(len(counts)))


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 3, 3]),
        ([900, 800, 700], [1, 1, 1]),
        ([5, 50], [1, 0, 1]),
        ([41, 16, 6, 1], [1, 2, 1]),
        ([9, 9, 9, 9, 5, 1], [4, 1, 1]),
        ([50, 5, 5, 5], [1, 0, 3]),
    ],
)
def test_else_they_make_thirds_of_the_classes(counts, sizes):
    many_over, few_under = (value.value for value in shot_thresholds(np.array(counts)))
    groups = shot_groups(counts, many_over=many_over, few_under=few_under)
    assert [len(classes) for classes in groups.values()] == sizes


@pytest.mark.parametrize(
    ("images", "size", "px", "patch_px", "epochs", "batch"),
    [
        (480, "vit_micro", 64, 16, 200, 64),
        (20_000, "vit_ti", 64, 8, 800, 2048),
        (115_846, "vit_s", 64, 8, 800, 4096),
        (600_000, "vit_b", 64, 8, 800, 4096),
    ],
)
def test_the_model_the_epochs_and_the_batch_grow_with_the_set(images, size, px, patch_px, epochs, batch):
    values = recipe_values(facts([images // 2, images - images // 2], px=66))
    names = ("model.size", "model.image_px", "model.patch_px", "stages.pretrain.epochs", "stages.pretrain.global_batch")
    assert [values[name].value for name in names] == [size, px, patch_px, epochs, batch]


@pytest.mark.parametrize(("px", "small", "large"), [(8, 16, 16), (28, 32, 32), (90, 96, 96), (2000, 96, 224)])
def test_the_side_of_the_images_follows_the_data_up_to_a_limit(px, small, large):
    assert recipe_values(facts([50, 50], px=px))["model.image_px"].value == small
    assert recipe_values(facts([5000, 5000], px=px))["model.image_px"].value == large


def test_weights_take_the_place_of_pretraining_and_decide_the_model(tmp_path):
    start = Start("/w/model.safetensors", {"size": "vit_s", "image_px": 96, "channels": 3}, COLOUR, COLOUR)
    recipe = loaded(tmp_path, facts([40, 4], start=start))
    assert recipe.stages.pretrain is None
    assert recipe.stages.finetune.init == "weights"
    assert recipe.stages.finetune.weights == "/w/model.safetensors"
    assert (recipe.model.size, recipe.model.image_px) == ("vit_s", 96)
    assert recipe.data.mean == COLOUR


@settings(max_examples=20)
@given(counts=COUNTS, channels=st.sampled_from([1, 3]))
def test_each_value_has_its_reason(counts, channels):
    for line in as_yaml(recipe_values(facts(counts, channels=channels))).splitlines():
        assert line.endswith(":") or re.search(r": .+  # \S{3,}|: .+  # \S+", line), line


@given(st.integers(4, 10**7))
def test_a_larger_set_holds_out_a_smaller_part_but_not_fewer_images(num):
    fraction, larger = held_out_fraction(num).value, held_out_fraction(2 * num).value
    assert 0 < larger <= fraction <= 0.2
    assert larger * 2 * num >= fraction * num


def test_text_of_any_kind_is_read_back_as_it_was(tmp_path):
    for text in ("a: b", "# no", "yes", "12", "-5", "-0x1f", "null", "ä ö", 'a "b" \\c', "- x", "é\x85"):
        values = {"name": text, "data.train": "/a", "stages.finetune.init": "scratch"}
        path = tmp_path / "recipe.yaml"
        path.write_text(as_yaml({name: Value(value, "-") for name, value in values.items()}), encoding="utf-8")
        assert load_recipe(path).name == text
