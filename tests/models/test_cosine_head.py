"""The cosine head against its formula in NumPy, what it ignores, and where it is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from livt_scale.config.recipe import Finetune, Recipe
from livt_scale.losses import make_loss
from livt_scale.models.classifier import build_classifier
from livt_scale.models.cosine_head import CosineHead
from livt_scale.plan.parameters import stage_weights
from tests.tiny_run import tiny_recipe


def cosines(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(weight, axis=1)[None]
    return features @ weight.T / norms


def test_logits_are_the_scaled_cosines_and_ignore_all_norms() -> None:
    torch.manual_seed(0)
    head = CosineHead(7, 5, scale=25.0)
    features = torch.randn(4, 7)
    expected = 25 * cosines(features.numpy(), head.weight.detach().numpy())
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    before = head(features)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([0.1, 1, 2, 30, 7])[:, None])
    torch.testing.assert_close(head(100 * features), before)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_a_balanced_loss_of_its_logits_is_that_of_the_formula() -> None:
    torch.manual_seed(1)
    head, counts = CosineHead(6, 3, scale=25.0), [90, 9, 1]
    features, labels = torch.randn(8, 6), torch.randint(0, 3, (8,))
    loss = make_loss("bal_ce", counts)(head(features), torch.eye(3)[labels])
    z = 25 * cosines(features.double().numpy(), head.weight.detach().double().numpy()) + np.log(np.array(counts) / 100)
    expected = np.mean([np.log(np.exp(row).sum()) - row[y] for row, y in zip(z, labels, strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert head.weight.grad is not None
    along = (head.weight.grad * head.weight).sum(dim=1)  # the loss does not depend on a row's norm
    torch.testing.assert_close(along, torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["vit_micro", "resnet_micro"])
def test_the_network_of_a_recipe_has_it_and_the_plan_counts_it(size: str) -> None:
    tree = tiny_recipe(size=size).model_dump()
    tree["stages"]["finetune"] |= {"head": "cosine", "head_scale": 16.0}
    recipe = Recipe.model_validate(tree)
    part = recipe.stages.finetune
    assert part is not None
    model = build_classifier(recipe.model, num_classes=4, drop_path=0.0, cosine_scale=part.cosine_scale)
    planned = {w.name: w.shape for w in stage_weights(recipe, "finetune", num_classes=4)}
    assert planned == {name: tuple(p.shape) for name, p in model.named_parameters()}
    head = model.get_submodule("head" if recipe.model.is_vit else "fc")
    assert isinstance(head, CosineHead)
    assert head.scale == 16.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"head_scale": 16}, "head_scale has no effect with head 'linear'"),
        ({"head_init": "file"}, "head_init: file needs a file"),
        ({"head_file": "f"}, "head_init is 'random' and head_file is 'f'"),
        ({"init": "scratch", "head_init": "class_means"}, "backbone of init 'scratch' is random"),
        ({"init": "weights", "weights": "w", "keep_head": True, "head": "cosine"}, "keep_head takes a linear head"),
        (
            {"train": "head", "layer_decay": 1, "drop_path": 0, "head_norm": "batch", "head_init": "class_means"},
            "head_norm 'batch' changes the features",
        ),
    ],
)
def test_options_of_a_head_without_effect_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Finetune(**fields)
