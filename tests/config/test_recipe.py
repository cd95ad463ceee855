"""What a recipe's values may be, and which of them a continued run must not change."""

import pytest
from pydantic import ValidationError

from livt_scale.config.recipe import MODEL_SIZES, Finetune, Model, Recipe, digest, learnt_from
from livt_scale.data.image.augment import make_augment
from livt_scale.losses import LOSSES


def recipe(**parts):
    return Recipe.model_validate(
        {"name": "r", "data": {"train": "t"}, "stages": {"pretrain": {}, "finetune": {}}} | parts
    )


def test_defaults_are_the_papers_table():
    pretrain, finetune = recipe().stages.pretrain, recipe().stages.finetune
    assert (pretrain.epochs, pretrain.global_batch, pretrain.warmup_epochs) == (800, 4096, 40)
    assert pretrain.peak_lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert (finetune.epochs, finetune.global_batch, finetune.layer_decay) == (100, 1024, 0.75)
    assert finetune.loss == LOSSES["bal_bce"](tau=1.0)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_every_size_is_a_possible_model(size):
    width, depth, heads, patch_px = MODEL_SIZES[size]
    model = Model(size=size, image_px=patch_px * 14)
    assert model.dims == (width, depth, heads, patch_px)
    assert model.num_patches == 14 * 14


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_px": 225}, "the nearest are 224 and 240"),
        ({"image_px": 3}, "the nearest are 16 and 32"),
        ({"heads": 7}, "does not divide the width 768"),
        ({"width": 90, "heads": 3}, "multiple of 4"),
        ({"decoder": {"width": 64, "heads": 3}}, "decoder.heads is 3"),
    ],
)
def test_a_model_that_cannot_be_says_what_would_fit(fields, said):
    with pytest.raises(ValidationError, match=said):
        Model.model_validate(fields)


def test_mixing_pairs_need_an_even_micro_batch_and_no_mixing_does_not():
    with pytest.raises(ValidationError, match="micro_batch is 7"):
        Finetune(micro_batch=7)
    with pytest.raises(ValidationError, match="global_batch is 1023"):
        Finetune(global_batch=1023)
    assert Finetune(micro_batch=7, mixup=0, cutmix=0).micro_batch == 7


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({}, "stages is empty"),
        ({"finetune": {}}, "there is no stage pretrain"),
        ({"pretrain": {"epochs": 2}}, "warmup_epochs is 40, more than epochs = 2"),
        ({"pretrain": {"crop_scale": [0.9, 0.2]}}, "crop_scale"),
        ({"pretrain": {"global_batch": 32}}, "micro_batch is 64, more than global_batch = 32"),
        ({"finetune": {"init": "scratch", "loss": {"name": "ce", "tau": 1}}}, "the loss 'ce' has no options"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, said):
    with pytest.raises(ValidationError, match=said):
        recipe(stages=stages)


def test_pixel_statistics_have_one_value_a_channel():
    with pytest.raises(ValidationError, match=r"data.mean has 3 values for model.channels = 1"):
        recipe(model={"channels": 1, "image_px": 224})


def test_moving_files_and_work_leaves_the_digest_alone():
    moved = {"name": "other", "run_dir": "/elsewhere", "data": {"train": "/copy/t", "workers": 9}}
    moved |= {"parallel": {"strategy": "ddp"}, "checkpoint": {"every_steps": 3}, "log": {"every_steps": 1}}
    moved |= {"stages": {"pretrain": {"micro_batch": 8}, "finetune": {"eval_every_epochs": 1}}, "slurm": {"nodes": 4}}
    for stage in ("pretrain", "finetune"):
        assert digest(learnt_from(recipe(**moved), stage)) == digest(learnt_from(recipe(), stage))


@pytest.mark.parametrize(
    ("parts", "stages"),
    [
        ({"seed": 1}, {"pretrain", "finetune"}),
        ({"model": {"size": "vit_s"}}, {"pretrain", "finetune"}),
        ({"stages": {"pretrain": {"epochs": 801}, "finetune": {}}}, {"pretrain"}),
        ({"stages": {"pretrain": {}, "finetune": {"loss": {"name": "ce"}}}}, {"finetune"}),
    ],
)
def test_what_is_learnt_from_changes_the_digest_of_its_stage_alone(parts, stages):
    before, after = recipe(), recipe(**parts)
    changed = {s for s in ("pretrain", "finetune") if digest(learnt_from(before, s)) != digest(learnt_from(after, s))}
    assert changed == stages


@pytest.mark.parametrize("name", ["a/b", "..", ".", "../x", "a\0b"])
def test_a_name_that_is_not_one_folder_is_refused(name):
    with pytest.raises(ValidationError, match="it names the folder runs/NAME"):
        Recipe.model_validate({"name": name, "data": {"train": "t"}, "stages": {"pretrain": {}}})


@pytest.mark.parametrize(
    ("model", "part", "said"),
    [
        ({}, {"mask_ratio": 0.999}, r"stages\.pretrain\.mask_ratio 0\.999 of 196 patches keeps 0"),
        ({}, {"mask_ratio": 0.99, "image_px": 64}, "of 16 patches keeps 0"),
        ({"image_px": 16}, {}, "of 1 patches keeps 0"),
        ({"patch_px": 1, "channels": 1, "image_px": 8}, {}, r"stages\.pretrain\.norm_pix with patch_px 1"),
        ({}, {"betas": [0.9, 1.0]}, "less than 1"),
    ],
)
def test_what_no_pretraining_could_begin_with_is_refused(model, part, said):
    pixels = {"mean": [0.5], "std": [0.2]} if "channels" in model else {}
    tree = {"name": "r", "data": {"train": "t", **pixels}, "model": model, "stages": {"pretrain": part}}
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate(tree)


# --- a resolution of its own for each stage ---


def test_pretraining_may_have_another_resolution_than_fine_tuning():
    tree = {"name": "r", "data": {"train": "t"}, "model": {"image_px": 224}}
    recipe = Recipe.model_validate(tree | {"stages": {"pretrain": {"image_px": 128}, "finetune": {}}})
    assert recipe.at("pretrain").model.num_patches == 64
    assert recipe.at("finetune") is recipe
    assert recipe.at("pretrain").at("pretrain").model.image_px == 128
    assert learnt_from(recipe.at("pretrain"), "pretrain")["model.image_px"] == 128
    assert learnt_from(recipe, "pretrain") == learnt_from(recipe.at("pretrain"), "pretrain")
    with pytest.raises(ValidationError, match=r"stages\.pretrain\.image_px is 130.*128 and 144"):
        Recipe.model_validate(tree | {"stages": {"pretrain": {"image_px": 130}}})


# --- a linear probe ---

PROBE = {"init": "weights", "weights": "w", "train": "head", "layer_decay": 1, "drop_path": 0}


def probe(parts=None, **fields):
    return Recipe.model_validate(
        {"name": "r", "data": {"train": "t"}, "stages": {"finetune": {**PROBE, **fields}}, **(parts or {})}
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"init": "scratch", "weights": None}, "backbone of init 'scratch' would stay random"),
        ({"layer_decay": 0.75}, "layer_decay is 0.75, which has no effect on the frozen backbone.*layer_decay: 1"),
        ({"drop_path": 0.1}, "drop_path is 0.1, which has no effect.*drop_path: 0"),
        ({"train": "all", "head_norm": "batch"}, "head_norm is 'batch', whose statistics.*set train: head"),
        ({"keep_head": True, "head_norm": "batch"}, "that head was trained without head_norm"),
        ({"momentum": 0.8}, "momentum has no effect on optimizer 'adamw'"),
        ({"optimizer": "lars", "betas": (0.9, 0.999)}, "betas has no effect on optimizer 'lars'"),
        ({"train": "heads"}, "did you mean 'head'"),
    ],
)
def test_a_probe_refuses_what_would_have_no_effect_on_it(fields, said):
    with pytest.raises(ValidationError, match=said):
        probe(**fields)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_zeros_refuse_lars_and_a_frozen_backbone(strategy):
    parallel = {"parallel": {"strategy": strategy}}
    with pytest.raises(ValidationError, match=f"'head' leaves parallel.strategy '{strategy}'.*ddp or fsdp"):
        probe(parallel)
    with pytest.raises(ValidationError, match=r"'lars' is given complete parameters.*set strategy to ddp or fsdp"):
        probe(parallel, train="all", optimizer="lars")


def test_how_a_backbone_is_trained_is_refused_for_a_probe_alone_and_not_beside_a_pretraining():
    again = {"parallel": {"activation_checkpointing": True}}
    with pytest.raises(ValidationError, match="activation_checkpointing has no effect"):
        probe(again)
    with pytest.raises(ValidationError, match=r"parallel\.adamw has no effect"):
        probe({"parallel": {"adamw": "foreach"}}, optimizer="lars")
    stages = {"pretrain": {}, "finetune": {**PROBE, "init": "pretrain", "weights": None}}
    assert probe({**again, "stages": stages}).stages.finetune.backbone_frozen


def test_lars_has_maes_momentum_unless_another_is_given_and_a_probe_is_another_run():
    assert probe().stage("finetune").lars_momentum is None
    assert probe(optimizer="lars").stage("finetune").lars_momentum == 0.9
    assert probe(optimizer="lars", momentum=0.5).stage("finetune").lars_momentum == 0.5
    learnt = learnt_from(probe(optimizer="lars", head_norm="batch"), "finetune")
    assert {name.rpartition(".")[2] for name in learnt} >= {"train", "optimizer", "head_norm"}


@pytest.mark.parametrize("notation", ["rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.5-mmax20", "rand-tweights-m7"])
def test_what_timm_reads_as_an_augmentation_is_accepted(notation):
    part = Finetune(rand_augment=notation)
    assert make_augment(part.rand_augment, image_px=28, mean=(0.3,)).ops


@pytest.mark.parametrize("notation", ["xx", "", "rand-mx", "rand-foo", "rand-m9.5", "rand-q3", "augmix-m3", "rand_m9"])
def test_another_augmentation_is_refused_before_anything_is_trained(notation):
    with pytest.raises(ValidationError, match=f"rand_augment is '{notation}', not timm's notation"):
        Finetune(rand_augment=notation)
