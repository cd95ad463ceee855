"""Outputs of a trained model for each image of a set, and the figures that choices and reports are made from.

What is chosen on a set (a τ, the members of a soup) looks better there than it is. So each choice is made on the first
half, and the figures are of the second (`evaluation.holdout`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from livt_scale.config.recipe import Recipe
from livt_scale.data.classes import TrainingClasses, check_same_classes
from livt_scale.data.loader import eval_batches, normalise
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed import precision
from livt_scale.distributed.world import World
from livt_scale.evaluation.calibration import Calibration, fit_calibration
from livt_scale.evaluation.evaluate import BATCH, data_lineage
from livt_scale.evaluation.holdout import SEED, half_rows
from livt_scale.metrics import Tally
from livt_scale.models.classifier import DistilledClassifier, head_name
from livt_scale.train.export_info import is_export
from livt_scale.train.load_trained import Trained
from livt_scale.train.open_trained import evaluation_set
from livt_scale.train.run_dir import is_run
from livt_scale.util.errors import UsageError


@dataclass(frozen=True)
class LabelledOutputs:
    """values float32 [N, K] (logits, or features before the head) and labels int64 [N], in the order of the set."""

    values: Tensor
    labels: Tensor

    def rows(self, rows: NDArray[np.int64]) -> LabelledOutputs:
        chosen = torch.from_numpy(rows)
        return LabelledOutputs(self.values[chosen], self.labels[chosen])


@torch.inference_mode()
def model_outputs(
    model: nn.Module,
    shards: ShardSet,
    recipe: Recipe,
    *,
    batch: int = BATCH,
    world: World = World(),  # noqa: B008 - frozen
) -> LabelledOutputs:
    """The outputs of `model` for this rank's images of `shards`, prepared as for evaluation, on the model's device."""
    device = next(model.parameters()).device
    values, labels = [], []
    with eval_batches(shards, recipe, **world.for_loader, batch=batch) as batches:
        for one in batches:
            images = normalise(one.to(device).images, recipe.data.mean, recipe.data.std, torch.float32)
            values.append(precision.infer(model, device, recipe.parallel.precision, images).float().cpu())
            labels.append(one.labels.cpu())
    return LabelledOutputs(torch.cat(values).clone(), torch.cat(labels).clone())


def features(
    trained: Trained,
    shards: ShardSet,
    *,
    batch: int = BATCH,
    world: World = World(),  # noqa: B008 - frozen
) -> LabelledOutputs:
    """The input of the head of `trained` for this rank's images of `shards`: values [N, D]."""
    body = copy.deepcopy(trained.model)
    body.set_submodule(head_name(body), nn.Identity())
    if isinstance(body, DistilledClassifier):
        body.head_dist = nn.Identity()  # the mean of both tokens, as timm's
    return model_outputs(body.to(world.device), shards, trained.recipe, batch=batch, world=world)


def held_out_set(trained: Trained, where: Path, data: str | None) -> ShardSet:
    """The set to choose and report on: `data`, or that of the run at `where`. Raises UsageError, DataError."""
    own = None if is_export(where) else trained.recipe.data.val
    folder = data or (evaluation_set(where, trained) if is_run(where) else own)
    if folder is None:
        raise UsageError(f"no evaluation set for {where}", remedy="give a folder of shards with --data")
    shards = ShardSet.open(folder, data=trained.recipe.data)
    check_same_classes(shards, trained.classes)
    return shards


def figures(logits: Tensor, labels: Tensor, classes: TrainingClasses, recipe: Recipe) -> dict[str, Any]:
    """The report of logits float [N, C], as `livt eval` counts it."""
    tally = Tally(len(classes.names))
    tally.update(logits, labels)
    data = recipe.data
    return tally.report(
        classes.counts, many_over=data.many_over, few_under=data.few_under, group_counts=classes.group_counts
    )


def mean_class_accuracy(logits: Tensor, labels: Tensor, classes: TrainingClasses, recipe: Recipe) -> float:
    """What choices are made by: mean of the classes' top-1, so that no class counts more for having more images."""
    return float(figures(logits, labels, classes, recipe)["top1"]["mean_class"])


def calibration(logits: Tensor, labels: Tensor, shards: ShardSet) -> Calibration:
    """The temperature of logits float [N, C] of `shards`, fitted on the half that choices are made on."""
    if len(labels) < 2:
        return Calibration(why="the evaluation set has a single image")
    rows = torch.from_numpy(half_rows(labels.numpy())[0])
    return fit_calibration(logits[rows], labels[rows], data=data_lineage(shards))


def about_halves(shards: ShardSet, chosen: NDArray[np.int64], reported: NDArray[np.int64]) -> dict[str, Any]:
    """For the lineage: which images decided, and how many the figures are of."""
    digest = data_lineage(shards)["manifest_digest"]
    return {"manifest_digest": digest, "chosen_on": len(chosen), "reported_on": len(reported), "seed": SEED}
