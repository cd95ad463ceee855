"""Evaluates a run or an export on a set of shards, as `livt eval` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import BATCH, evaluate
from livt_scale.evaluation.logits import About, Outputs, gather
from livt_scale.evaluation.tta import Views
from livt_scale.train.load_trained import Weights
from livt_scale.train.open_trained import evaluation_set, open_trained
from livt_scale.train.run_dir import is_run
from livt_scale.util.errors import UsageError


@dataclass(frozen=True)
class Evaluated:
    """outputs: on rank 0, where they were to be kept."""

    report: dict[str, Any]
    outputs: Outputs | None


def evaluate_path(
    path: Path,
    *,
    data: str | Path | None = None,
    which: str | None = None,
    weights: Weights = "raw",
    batch: int = BATCH,
    views: Views = Views(),  # noqa: B008 - frozen
    keep: bool = False,
    world: World = World(),  # noqa: B008 - frozen
) -> Evaluated:
    """Evaluate a run or an export on the shards in `data`, a folder or URL (None: the run's own evaluation set).

    A collective call of the ranks of `world`. The report of `train.evaluate.evaluate`, with `weights`: what was
    evaluated, and from where it was read; with `keep` the logits of every image too.
    """
    trained = open_trained(path, which=which, weights=weights)
    folder = data or evaluation_set(path, trained)
    if folder is None:
        why = "an export does not know any" if not is_run(path) else "its recipe has no data.val"
        raise UsageError(f"no evaluation set for {path}: {why}", remedy="give a folder of shards with --data")
    shards = ShardSet.open(folder, data=trained.recipe.data)
    kept: list[Tensor] | None = [] if keep else None
    report = evaluate(
        trained.model.to(world.device),
        shards,
        trained.recipe,
        world=world,
        classes=trained.classes,
        batch=batch,
        views=views,
        keep=kept,
    )
    report |= {"weights": {**trained.weights, "read_from": str(path)}}
    if kept is None:
        return Evaluated(report, None)
    about = About.of(trained.classes, trained.recipe, report)
    return Evaluated(report, gather(kept, shards, about, world=world))
