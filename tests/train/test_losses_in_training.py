"""Fine-tuning learns by the loss that the recipe names, with the options that it gives."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from livt_scale.config.recipe import Finetune
from livt_scale.data.loader import Batch
from livt_scale.distributed.world import World
from livt_scale.losses import LOSSES, make_loss
from livt_scale.losses.formulas import soft_targets
from livt_scale.train.finetune import finetune_task
from livt_scale.train.run import train
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.losses.test_losses import OTHERWISE
from tests.whole_runs import metrics

LABELS_ONLY = {"mixup": 0, "cutmix": 0, "smoothing": 0}
TARGETS = {"ls_ce": {"smoothing": 0}, "mislas": {"smoothing": 0}, "lade": LABELS_ONLY}  # what each needs switched off
LOSSES_WITH_OPTIONS = [(name, options) for name in sorted(LOSSES) for options in ({}, OTHERWISE[name])]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 images of class 0, 1 and 2: 8, 8 and 7."""
    return tiny_set(tmp_path_factory.mktemp("losses") / "set")


def recipe_of(shards, name, options, **changes):
    finetune = {"init": "scratch", "epochs": 2, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1}
    finetune |= {"rand_augment": None, "random_erasing": 0, "loss": {"name": name} | options} | TARGETS.get(name, {})
    return tiny_recipe(shards.folder, stages={"finetune": finetune}, model__depth=1, **changes)


@pytest.mark.parametrize(("name", "options"), LOSSES_WITH_OPTIONS)
def test_the_objective_is_that_loss_with_those_options_and_the_sets_counts(shards, name, options, tmp_path):
    recipe = recipe_of(shards, name, options, data__val=None)
    task = finetune_task(recipe, shards, run_dir=tmp_path, world=World())
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(
        images, labels, ("a", "b", "c", "d"), epoch=0, step=0, micro_index=0, mix=None, drop=torch.zeros(4, 2)
    )
    targets = soft_targets(labels, 3, recipe.stages.finetune.smoothing)
    expected = make_loss(name, shards.class_counts, **options)(logits, targets)
    assert task.objective(lambda *_: logits, batch) == expected
    if options:
        assert expected != make_loss(name, shards.class_counts)(logits, targets)


@pytest.mark.parametrize(("name", "options"), LOSSES_WITH_OPTIONS)
def test_a_run_learns_by_it(shards, name, options, tmp_path):
    train(recipe_of(shards, name, options, run_dir=str(tmp_path / "run"), data__val=None))
    losses = [line["loss"] for line in metrics(tmp_path / "run", "finetune")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("loss", "fields", "said"),
    [
        ({"name": "ls_ce"}, {}, r"smoothing is 0.1, but the loss 'ls_ce' smooths its targets itself.*set smoothing: 0"),
        ({"name": "mislas"}, {}, r"smoothing is 0.1, but the loss 'mislas' .*head_smoothing.*set smoothing: 0"),
        ({"name": "lade"}, {}, "mixup is 0.8, cutmix is 1, smoothing is 0.1.*set mixup: 0, cutmix: 0, smoothing: 0"),
        (
            {"name": "lade"},
            {"mixup": 0, "smoothing": 0},
            "cutmix is 1, but the loss 'lade' needs to know.*set cutmix: 0",
        ),
        ({"name": "ce", "beta": 0.9}, {}, "the loss 'ce' has no options: leave it out, or take cb_ce or cb_bce"),
        (
            {"name": "ldam", "tau": 1},
            {},
            "the loss 'ldam' has the options max_margin, scale: leave it out, or take bal_ce or bal_bce",
        ),
        ({"name": "cb_ce", "beta": 1}, {}, "less than 1"),
        ({"name": "ldam", "scale": 0}, {}, "greater than 0"),
        ({"name": "foca"}, {}, "'focal'"),
    ],
)
def test_a_recipe_whose_loss_cannot_be_is_refused(loss, fields, said):
    with pytest.raises(ValidationError, match=said):
        Finetune.model_validate({"loss": loss} | fields)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_with_those_targets_switched_off_it_is_a_recipe(name):
    assert Finetune.model_validate({"loss": {"name": name}} | TARGETS[name]).loss.name == name
