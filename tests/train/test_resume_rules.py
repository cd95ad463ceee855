"""Which changes of a recipe a run may go on with in mid-stage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from livt_scale.config.fields import all_fields
from livt_scale.config.recipe import Recipe, learnt_from
from livt_scale.config.resume import Change, allowable, resume_of
from livt_scale.train.resume_rules import check_allowable, check_same
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
    assert {".".join(path) for path in all_fields()} >= set(allowable(Recipe))
    learnt = learnt_from(Recipe.model_validate(BASE), "pretrain") | learnt_from(Recipe.model_validate(BASE), "finetune")
    resnet = BASE | {"model": {"size": "resnet18"}, "stages": {"finetune": {"init": "scratch", "layer_decay": 1.0}}}
    of_resnet = learnt_from(Recipe.model_validate(resnet), "finetune")
    assert of_resnet.keys() - learnt.keys() == {"stages.finetune.micro_batch"}  # batch norm sees one
    assert learnt.keys() | of_resnet.keys() >= set(allowable(Recipe))


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
    assert allowed == [
        Change("stages.pretrain.base_lr", 1.5e-4, 1e-3, "allow"),
        Change("stages.pretrain.epochs", 800, 900, "allow"),
    ]


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


@pytest.mark.parametrize(
    ("path", "policy", "with_batchnorm"),
    [
        ("seed", "fixed", "fixed"),
        ("run_dir", "free", "free"),
        ("slurm.pretrain.nodes", "free", "free"),  # the part is free
        ("stages.pretrain.epochs", "allow", "allow"),  # the base class says so, the subclass has another default
        ("stages.finetune.smoothing", "allow", "allow"),
        ("stages.finetune.loss.tau", "fixed", "fixed"),
        ("stages.finetune.micro_batch", "free", "allow"),
        ("no.such.field", "fixed", "fixed"),
    ],
)
def test_each_field_carries_its_policy(path, policy, with_batchnorm):
    resume = resume_of(path, Recipe)
    assert (resume.of(batchnorm=False), resume.of(batchnorm=True)) == (policy, with_batchnorm)


def test_what_may_be_allowed_is_this_and_no_more():
    both = ["base_lr", "clip_grad", "crop_rule", "crop_scale", "epochs", "flip"]
    both += ["min_lr", "warmup_epochs", "weight_decay"]
    finetune = ["drop_path", "layer_decay", "micro_batch", "rand_augment", "random_erasing", "smoothing"]
    fields = {f"stages.{stage}.{field}" for stage in ("pretrain", "finetune") for field in both}
    fields |= {f"stages.finetune.{field}" for field in finetune} | {"data.many_over", "data.few_under"}
    assert set(allowable(Recipe)) == fields


def test_fields_that_came_later_have_their_defaults_in_an_older_checkpoint():
    older = facts("finetune")
    of_head = ("head", "head_norm", "head_init", "head_file", "distill")
    for name in ("ema", "train", "optimizer", "momentum", "repeats", *of_head):
        del older["recipe"]["stages"]["finetune"][name]
    del older["recipe"]["model"]["distillation_token"]
    assert check_same(facts("finetune"), older, HERE) == []


def test_a_recipe_in_a_checkpoint_that_cannot_be_read_is_a_mismatch():
    newer = facts()
    newer["recipe"]["warp"] = 9
    with pytest.raises(CheckpointMismatch, match="its recipe cannot be read"):
        check_same(facts(), newer, HERE)
