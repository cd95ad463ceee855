"""FLOPs by formula against torch's own count of what the models do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Model
from livt_scale.config.tuning import TrainHead
from livt_scale.distributed.blocks import prepare_blocks
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.models.parameter_efficient import build_tuned
from livt_scale.plan import flops

MODELS = {
    "vit_micro at 28 px": Model(
        size="vit_micro", image_px=28, channels=1, decoder={"width": 64, "depth": 2, "heads": 2}
    ),
    "vit_ti of 2 blocks": Model(size="vit_ti", depth=2, decoder={"width": 96, "depth": 1, "heads": 3}),
    "vit_s of 4 blocks at 96 px": Model(
        size="vit_s", depth=4, image_px=96, decoder={"width": 128, "depth": 2, "heads": 4}
    ),
    "vit_b of 2 blocks": Model(size="vit_b", depth=2, image_px=64, decoder={"width": 256, "depth": 1, "heads": 8}),
}
CLASSIFIERS = MODELS | {
    "vit_micro of two heads": Model(size="vit_micro", depth=1, image_px=28, channels=1, distillation_token=True)
}
BATCH = 2
QUICKSTART = Path(__file__).parents[2] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def meta_device():
    """Operations are counted and not computed."""
    with torch.device("meta"):
        yield


def counted(call) -> int:
    """FLOPs an image. Attention as plain products: torch's counter knows no fused attention of CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / BATCH


def images(model: Model) -> torch.Tensor:
    return torch.rand(BATCH, model.channels, model.image_px, model.image_px)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_a_pretraining_step_has_the_flops_of_the_formula(name, mask_ratio, recompute):
    model = MODELS[name]
    network = build_mae(model, norm_pix=True, mask_ratio=mask_ratio)
    prepare_blocks(network, recompute=recompute, compiled=False)
    batch, noise = images(model), torch.rand(BATCH, model.num_patches)
    formula = flops.mae_flops(model, mask_ratio=mask_ratio)
    measured = counted(lambda: network(batch, noise).backward())
    assert (formula.hardware if recompute else formula.train) == pytest.approx(measured, rel=0.02)
    if not recompute:
        assert formula.forward == pytest.approx(counted(lambda: network(batch, noise)), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_fine_tuning_step_has_the_flops_of_the_formula(name, recompute):
    model = CLASSIFIERS[name]
    network = build_classifier(model, num_classes=100, drop_path=0.0)
    prepare_blocks(network, recompute=recompute, compiled=False)
    batch = images(model)
    formula = flops.classifier_flops(model, num_classes=100)
    measured = counted(lambda: network(batch).sum().backward())
    assert (formula.hardware if recompute else formula.train) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("size", "px"),
    [
        *(("resnet_micro", px) for px in (28, 33, 65, 70)),
        ("resnet50", 33),
        ("resnet18", 65),
        ("resnet34", 70),
    ],
)
def test_a_resnets_step_has_the_flops_of_the_formula(size, px):
    model = Model(size=size, image_px=min(px, 64) if size == "resnet_micro" else px)
    network = build_classifier(model, num_classes=100, drop_path=0.0)
    batch, formula = images(model), flops.classifier_flops(model, num_classes=100)
    assert formula.forward == counted(lambda: network(batch))
    assert formula.train == counted(lambda: network(batch).sum().backward())
    assert formula.hardware == formula.train


def test_a_linear_probes_step_has_the_flops_of_the_formula():
    sets = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w"]
    sets += ["stages.finetune.train=head", "stages.finetune.layer_decay=1", "stages.finetune.drop_path=0"]
    recipe = load_recipe(QUICKSTART, sets=sets)
    network = build_tuned(recipe.model, num_classes=100, drop_path=0.0, tuning=TrainHead())
    formula = flops.network_flops(recipe, "finetune", num_classes=100)
    assert formula.train == pytest.approx(counted(lambda: network(images(recipe.model)).sum().backward()), rel=0.02)
    assert formula.hardware == formula.train


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "adaptformer", "vpt", "layernorm"])
def test_a_tuned_networks_step_has_about_the_flops_of_the_formula(train):
    """Not exactly: below the first trained parameter, in the first block, nothing goes back."""
    sets = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w", "model.depth=12"]
    recipe = load_recipe(QUICKSTART, sets=[*sets, f"stages.finetune.train={train}"])
    tuning = recipe.stages.finetune.train
    network = build_tuned(recipe.model, num_classes=100, drop_path=0.0, tuning=tuning)
    formula = flops.network_flops(recipe, "finetune", num_classes=100)
    assert formula.train == pytest.approx(counted(lambda: network(images(recipe.model)).sum().backward()), rel=0.05)


def test_a_recipe_says_whether_blocks_are_computed_again():
    for stage in ("pretrain", "finetune"):
        plain = flops.stage_flops(load_recipe(QUICKSTART), stage, num_classes=10)
        sets = ["parallel.activation_checkpointing=true"]
        again = flops.stage_flops(load_recipe(QUICKSTART, sets=sets), stage, num_classes=10)
        assert plain.hardware == plain.train == again.train < again.hardware


def test_the_numbers_of_the_docstring():
    vit_b = Model(size="vit_b")
    classifier = flops.classifier_flops(vit_b, num_classes=1000)
    mae = flops.mae_flops(vit_b, mask_ratio=0.75)
    assert (round(classifier.forward / 1e9), round(classifier.train / 1e9)) == (35, 105)
    assert (round(mae.forward / 1e9), round(mae.train / 1e9)) == (19, 57)
