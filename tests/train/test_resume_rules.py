"""Which changes of a recipe a run may go on with in mid-stage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from livt_scale.config.load import _all_fields
from livt_scale.config.recipe import Recipe, learnt_from
from livt_scale.train.resume_rules import ALLOWABLE, check_allowable, check_same
from livt_scale.util.errors import CheckpointMismatch, UsageError

BASE = {"name": "x", "data": {"train": "t"}, "stages": {"pretrain": {}, "finetune": {}}}
HERE = Path("step-00000009")


def facts(stage: str = "pretrain", **fields: object) -> dict:
    tree = copy.deepcopy(BASE)
    for path, value in fields.items():
        *parts, name = path.split(".")
        part = tree
        for key in parts:
            part = part.setdefault(key, {})
        part[name] = value
    recipe = Recipe.model_validate(tree)
    learnt = {**learnt_from(recipe, stage), "data.manifest": "0" * 64}
    return {"stage": stage, "recipe": recipe.model_dump(mode="json"), "learnt_from": learnt}


def test_every_field_that_can_be_allowed_is_one_of_the_recipe_and_decides_what_is_learnt():
    assert {".".join(path) for path in _all_fields()} >= set(ALLOWABLE)
    learnt = learnt_from(Recipe.model_validate(BASE), "pretrain") | learnt_from(Recipe.model_validate(BASE), "finetune")
    resnet = BASE | {"model": {"size": "resnet18"}, "stages": {"finetune": {"init": "scratch", "layer_decay": 1.0}}}
    of_resnet = learnt_from(Recipe.model_validate(resnet), "finetune")
    assert of_resnet.keys() - learnt.keys() == {"stages.finetune.micro_batch"}  # batch norm sees one
    assert learnt.keys() | of_resnet.keys() >= set(ALLOWABLE)


@pytest.mark.parametrize(
    "field", ["seed", "model.width", "stages.pretrain.global_batch", "stages.pretrain.mask_ratio", "data.manifest"]
)
def test_what_the_model_is_and_which_samples_come_when_cannot_be_allowed(field):
    with pytest.raises(UsageError, match=f"--allow {field}: this change cannot be allowed"):
        check_allowable([field])


def test_a_misspelt_field_gets_the_nearest_one():
    with pytest.raises(UsageError, match=r"did you mean 'stages\.pretrain\.weight_decay'"):
        check_allowable(["stages.pretrain.weight_deca"])


def test_nothing_changed_is_nothing_to_say():
    assert check_same(facts(), facts(), HERE) == []
    assert check_same(facts(), facts(), HERE, allow=["stages.pretrain.epochs"]) == []  # a requeued job says it again


def test_only_what_is_named_is_let_through_and_it_is_told():
    new = facts(**{"stages.pretrain.epochs": 900, "stages.pretrain.base_lr": 1e-3})
    with pytest.raises(CheckpointMismatch) as caught:
        check_same(new, facts(), HERE)
    assert "--allow stages.pretrain.base_lr --allow stages.pretrain.epochs" in caught.value.remedy
    with pytest.raises(CheckpointMismatch, match="epochs: 800 in the checkpoint, 900 here") as caught:
        check_same(new, facts(), HERE, allow=["stages.pretrain.base_lr"])
    assert "base_lr" not in str(caught.value)
    allowed = check_same(new, facts(), HERE, allow=["stages.pretrain.base_lr", "stages.pretrain.epochs"])
    assert [line.split(":")[0] for line in allowed] == ["stages.pretrain.base_lr", "stages.pretrain.epochs"]


def test_where_a_part_cannot_be_allowed_allowing_the_rest_is_not_offered():
    with pytest.raises(CheckpointMismatch, match="seed: 0 in the checkpoint, 4 here") as caught:
        check_same(facts(seed=4, **{"stages.pretrain.min_lr": 1.0}), facts(), HERE)
    assert "--allow" not in caught.value.remedy


def test_another_stage_and_a_checkpoint_without_facts_are_refused():
    with pytest.raises(CheckpointMismatch, match="of stage finetune, not pretrain"):
        check_same(facts(), facts("finetune"), HERE)
    with pytest.raises(CheckpointMismatch, match="of stage None"):
        check_same(facts(), {}, HERE)
    with pytest.raises(CheckpointMismatch, match="does not say what it was trained by"):
        check_same(facts(), {"stage": "pretrain"}, HERE)
