"""`livt knn`: cached features classified by their nearest neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson
from livt_scale.cli.output import echo, starting

TrainFeatures = Annotated[Path, typer.Argument(metavar="TRAIN", help="Features of a training set.")]
EvalFeatures = Annotated[Path, typer.Argument(metavar="EVAL", help="Features of an evaluation set.")]


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
    from livt_scale.evaluation.results import accuracy_table
    from livt_scale.posthoc.feature_set import FeatureSet
    from livt_scale.posthoc.knn import knn_report
    from livt_scale.util.tables import plain_console

    report = knn_report(FeatureSet.read(train), FeatureSet.read(evaluated), k=k, temperature=temperature)
    if as_json:
        echo(json.dumps(report))
    else:
        plain_console().print(accuracy_table(report))
