"""A head that begins with class means, against NumPy, and with the vectors of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from livt_scale import optim
from livt_scale.config.recipe import Ema
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.classifier import build_classifier, head_name
from livt_scale.models.cosine_head import CosineHead
from livt_scale.posthoc.features import features
from livt_scale.train.head_init import start_from_class_means, start_from_vectors
from livt_scale.train.load_trained import Trained, load_trained
from livt_scale.util.errors import WeightsError
from tests.timm_families import family
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

COUNTS = {"a": 5, "b": 1, "c": 3}


def no_decay(network: torch.nn.Module) -> list[dict[str, Any]]:
    return optim.param_groups(network, lr=1e-3, weight_decay=0.0)


@pytest.fixture
def train(tmp_path: Path) -> ShardSet:
    return tiny_shards(tmp_path / "data", COUNTS)


@pytest.mark.parametrize("cosine_scale", [None, 25.0])
def test_the_head_and_its_average_begin_with_the_normalised_means(
    train: ShardSet, tmp_path: Path, cosine_scale: float | None
) -> None:
    recipe = tiny_recipe(train=train.folder)
    model = tiny_run(tmp_path / "run", recipe, steps=(40,), class_names=tuple(COUNTS), class_counts=(5, 1, 3))[40]
    reference = features(load_trained(tmp_path / "run"), train)
    values, labels = reference.values.double().numpy(), reference.labels.numpy()
    expected = np.stack([values[labels == c].mean(axis=0) for c in range(3)])
    expected /= np.linalg.norm(expected, axis=1)[:, None]

    begun = build_classifier(recipe.model, num_classes=3, drop_path=0.1, cosine_scale=cosine_scale)
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    begun.load_state_dict(backbone, strict=False)
    ddp = recipe.parallel.model_copy(update={"strategy": "ddp"})
    strategy = make_strategy(ddp, begun, no_decay, betas=(0.9, 0.99), ema=Ema(), world=World())
    start_from_class_means(strategy, train, recipe, world=World())
    for weight in (begun.head.weight, strategy.state()["ema.head.weight"]):
        np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-6)


def test_a_head_of_timm_begins_with_the_means_too(train: ShardSet) -> None:
    recipe = tiny_recipe(train=train.folder)
    recipe = recipe.model_copy(update={"model": family("convnext")})
    begun = build_classifier(recipe.model, num_classes=3, drop_path=0.0, cosine_scale=25.0)
    ddp = recipe.parallel.model_copy(update={"strategy": "ddp"})
    strategy = make_strategy(ddp, begun, no_decay, betas=(0.9, 0.99), world=World())
    start_from_class_means(strategy, train, recipe, world=World())
    classes = TrainingClasses.of(train, recipe.data)
    reference = features(Trained(begun.eval(), recipe, classes, {}, {}), train)
    means = torch.stack([reference.values[reference.labels == c].mean(dim=0) for c in range(3)])
    head = begun.get_submodule(head_name(begun))
    assert isinstance(head, CosineHead)
    torch.testing.assert_close(head.weight.detach(), torch.nn.functional.normalize(means, dim=1))


def test_vectors_of_a_file_are_normalised_and_decide_the_lineage(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    model = build_classifier(recipe.model, num_classes=3, drop_path=0.0)
    vectors = torch.randn(3, 96)
    digests = set()
    for k, given in enumerate((vectors, 2 * vectors)):
        save_file({"vectors": given}, tmp_path / f"{k}.safetensors")
        lineage = start_from_vectors(model, tmp_path / f"{k}.safetensors", {"recipe_digest": "of the backbone"})
        digests.add(lineage["recipe_digest"])
        torch.testing.assert_close(model.head.weight.detach(), vectors / vectors.norm(dim=1, keepdim=True))
    assert len(digests) == 2
    assert "of the backbone" not in digests


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.ones(3, 96), "b": torch.ones(3, 96)}, "holds 2 tensors"),
        ({"a": torch.ones(4, 96)}, r"vectors are \[4, 96\], and the head is \[3, 96\]"),
        ({"a": torch.eye(3, 96) * torch.tensor([1.0, 0, 1])[:, None]}, "vector of class 1 is zero"),
        ({"a": torch.full((3, 96), torch.nan)}, "NaN or infinity"),
    ],
)
def test_vectors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    model = build_classifier(tiny_recipe().model, num_classes=3, drop_path=0.0)
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(WeightsError, match=said):
        start_from_vectors(model, tmp_path / "f.safetensors", {"recipe_digest": "d"})
