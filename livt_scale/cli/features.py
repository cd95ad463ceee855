"""`livt features`: what a model's head is given, for each image of a set, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson, Force, Sets, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo, starting


def features(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_EXPORT", help="A run, an export, or a recipe file: the model as its fine-tuning begins."
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="Shards.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the features.")],
    which: WhichCheckpoint = None,
    weights: Weights = WeightsName.raw,
    sets: Sets = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per forward pass.")] = 64,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compute and save features of images, for knn and probe.

    Under torchrun or srun the ranks share the images.

    livt features runs/try --data shards/fashion-mnist-lt/train-lt --out features/train

    livt features runs/try/recipe.yaml --data shards/fashion-mnist-lt/val --out features/val
    """
    starting(f"features {path}")
    from livt_scale.cli.evaluation import TIMEOUT_S
    from livt_scale.config.load import load_recipe
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.distributed.cpu_cores import share_with_loader
    from livt_scale.distributed.world import detect, process_group
    from livt_scale.posthoc.feature_set import backbone_of, check_target, write_features
    from livt_scale.train.open_trained import open_trained
    from livt_scale.util.errors import UsageError

    check_target(out, force=force)
    if path.is_file():
        if which is not None or weights is not WeightsName.raw:
            raise UsageError(f"{path} is a recipe: it has no checkpoint to choose", remedy="leave out the choice")
        recipe = load_recipe(path, sets=sets or ())
        shards = ShardSet.open(data, data=recipe.data)
        trained = backbone_of(recipe, shards)
    else:
        if sets:
            raise UsageError("--set changes a recipe, and this is not a recipe file", remedy="leave it out")
        trained = open_trained(path, which=which, weights=weights.value)
        shards = ShardSet.open(data, data=trained.recipe.data)
    world = detect()
    with process_group(world, timeout_s=TIMEOUT_S, loads=True), share_with_loader(world):
        facts = write_features(trained, shards, out, batch=batch, force=force, world=world)
    if not world.is_main:
        return
    echo(facts.model_dump_json() if as_json else f"{facts.num_samples:,} images, {facts.width} features: {out}")
