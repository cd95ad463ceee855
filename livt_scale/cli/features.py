"""`livt features`: what a head is given, for each image of a set; `livt knn` and `livt probe` classify by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Force, Sets, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo, starting

TrainFeatures = Annotated[Path, typer.Argument(metavar="TRAIN", help="Features of a training set.")]
EvalFeatures = Annotated[Path, typer.Argument(metavar="EVAL", help="Features of an evaluation set.")]


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


def knn(
    train: TrainFeatures,
    evaluated: EvalFeatures,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours that vote.")] = 20,
    temperature: Annotated[
        float, typer.Option("--temperature", help="A vote counts exp(similarity / temperature).")
    ] = 0.07,
    as_json: AsJson = False,
) -> None:
    """Classify features by their nearest neighbours.

    The vote of DINO (arXiv 2104.14294): cosine similarity, weighted. Accuracy for many-, medium- and few-shot classes.

    livt knn features/train features/val --k 20
    """
    starting(f"knn {train}")
    from livt_scale.posthoc.feature_set import FeatureSet
    from livt_scale.posthoc.knn import knn_report

    report = knn_report(FeatureSet.read(train), FeatureSet.read(evaluated), k=k, temperature=temperature)
    _print(report, as_json=as_json)


def probe(
    train: TrainFeatures,
    evaluated: EvalFeatures,
    loss: Annotated[str, typer.Option("--loss", metavar="<ce|bal_ce|bal_bce>", help="Training loss.")] = "ce",
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", min=0, help="Strength of the L2 term.", show_default="1 / images")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of L-BFGS, at most.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Fit a linear classifier to features (L-BFGS); evaluate it.

    livt probe features/train features/val --loss bal_ce
    """
    starting(f"probe {train}")
    from livt_scale.posthoc.feature_set import FeatureSet
    from livt_scale.posthoc.probe import ProbeSettings, probe_report

    settings = ProbeSettings(loss=loss, weight_decay=weight_decay, max_steps=steps)
    report = probe_report(FeatureSet.read(train), FeatureSet.read(evaluated), settings=settings)
    _print(report, as_json=as_json)


def _print(report: dict[str, Any], *, as_json: bool) -> None:
    from livt_scale.evaluation.results import accuracy_table
    from livt_scale.util.tables import plain_console

    if as_json:
        echo(json.dumps(report))
    else:
        plain_console().print(accuracy_table(report))
