"""cRT: retrains only the head, from scratch, on images sampled evenly by class.

The encoder is frozen and no image is augmented, so the features of the training set are computed once, as for
evaluation; only one linear layer on them is trained (seconds, not hours). With augmentation every epoch would need
the encoder again: that is not supported here. The sampling policy `class_balanced`, a function of the seed, decides
which image is in which step; the same command gives the same bytes.

SGD with momentum 0.9, a rate that falls to 0 along half a cosine, weight decay 5e-4, cross entropy: as in the paper.
Its head starts at random; ours at zero, which is the same in each run and costs nothing, since the problem is convex.

Source: Kang et al. 2020, Decoupling Representation and Classifier, arXiv 1910.09217, section 4.1.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from livt_scale import optim
from livt_scale.config.recipe import Recipe
from livt_scale.config.sampling import ClassBalanced
from livt_scale.data.classes import check_same_classes
from livt_scale.data.order.class_balanced import ClassOrder
from livt_scale.data.shard_set import ShardSet
from livt_scale.evaluation.calibration import Calibration
from livt_scale.evaluation.evaluate import data_lineage
from livt_scale.export.write_export import check_target, write_export
from livt_scale.losses import make_loss
from livt_scale.losses.builtin import CrossEntropy
from livt_scale.losses.formulas import soft_targets
from livt_scale.models.classifier import head_of
from livt_scale.posthoc import features
from livt_scale.posthoc.features import LabelledOutputs
from livt_scale.train.export_info import is_export
from livt_scale.train.load_trained import Trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import RunError, UsageError

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Settings:
    """`lr`: the first step's, for a batch of 256; scaled linearly."""

    epochs: int = 10
    batch: int = 512
    lr: float = 0.1
    seed: int = 0


def retrained(outputs: LabelledOutputs, num_classes: int, settings: Settings) -> tuple[nn.Linear, int]:
    """A linear layer trained on features `outputs.values` float32 [N, D] and their labels; how many steps it took."""
    batch = min(settings.batch, len(outputs.labels))
    steps = len(outputs.labels) // batch
    order = ClassOrder(
        outputs.labels.numpy(), batch, seed=settings.seed, steps=steps, epochs=settings.epochs,
        shares=ClassBalanced().shares,
    )  # fmt: skip
    head = nn.Linear(outputs.values.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    peak = settings.lr * batch / 256
    sgd = torch.optim.SGD(head.parameters(), lr=peak, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    counts = torch.bincount(outputs.labels, minlength=num_classes)
    loss_of = make_loss("ce", counts.tolist())
    for step in range(settings.epochs * steps):
        lr = optim.lr_at(step, steps_per_epoch=steps, epochs=settings.epochs, warmup_epochs=0, peak_lr=peak, min_lr=0.0)
        sgd.param_groups[0]["lr"] = lr
        rows = torch.from_numpy(order.positions(*divmod(step, steps)))
        loss = loss_of(head(outputs.values[rows]), soft_targets(outputs.labels[rows], num_classes, 0.0))
        _check_finite(loss, step)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return head, settings.epochs * steps


def retrain_head(
    source: Path,
    out: Path,
    *,
    train: str | None = None,
    data: str | None = None,
    which: str | None = None,
    force: bool = False,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Export `source` (a run or an export) with a head trained again on `train` (None: the run's own training set).

    Returns the steps taken, and, where there is an evaluation set, top-1 `before` and `after` on all of it: nothing was
    chosen on it. Raises DataError where the classes differ, RunError where the loss is no longer finite.
    """
    settings = settings or Settings()
    check_target(out)
    trained = open_trained(source, which=which)
    head_of(trained.model)
    check_target(out, weights={**trained.weights, "baseline": {"method": "crt"}}, force=force)
    folder = train or (None if is_export(source) else trained.recipe.data.train)
    if folder is None:
        raise UsageError(f"{source} is an export, which knows no training set", remedy="give its shards with --train")
    shards = ShardSet.open(folder, data=trained.recipe.data)
    check_same_classes(shards, trained.classes)
    head, steps = retrained(features.features(trained, shards), len(trained.classes.names), settings)
    model = copy.deepcopy(trained.model)
    head_of(model).load_state_dict(head.state_dict())
    made = {
        "method": "crt", **asdict(settings), "steps": steps, "sampling": "class_balanced", "loss": "ce",
        "trained_on": data_lineage(shards)["manifest_digest"],
    }  # fmt: skip
    figures, calibration = _compared(source, trained, head, data)
    weights = {**trained.weights, "baseline": made}
    recipe = _with_plain_loss(trained.recipe)
    own = replace(trained, model=model, recipe=recipe, weights=weights, calibration=calibration)
    write_export(own, out, force=force)
    return {"out": str(out), **made, **figures}


def _with_plain_loss(recipe: Recipe) -> Recipe:
    """The head was trained by cross entropy: an adjustment of its logits has to know that, not the old loss."""
    assert recipe.stages.finetune is not None
    part = recipe.stages.finetune.model_copy(update={"loss": CrossEntropy()})
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"finetune": part})})


def _compared(source: Path, trained: Trained, head: nn.Linear, data: str | None) -> tuple[dict[str, Any], Calibration]:
    """Top-1 before and after, and the temperature that fits the new head."""
    try:
        shards = features.held_out_set(trained, source, data)
    except UsageError:
        return {"before": None, "after": None}, Calibration(why="there was no evaluation set to fit one on")
    outputs = features.features(trained, shards)
    about = (outputs.labels, trained.classes, trained.recipe)
    with torch.inference_mode():
        old = head_of(trained.model)
        before, after = old(outputs.values), head(outputs.values)
    figures = {
        "before": features.figures(before, *about)["top1"],
        "after": features.figures(after, *about)["top1"],
    }
    return figures, features.calibration(after, outputs.labels, shards)


def _check_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise RunError(
            f"the loss is {loss.item()} at step {step} of re-training the head", remedy="give a smaller --lr"
        )
