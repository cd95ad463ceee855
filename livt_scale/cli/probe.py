"""`livt probe`: logistic regression on cached features."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from livt_scale.cli.knn import EvalFeatures, TrainFeatures
from livt_scale.cli.options import AsJson
from livt_scale.cli.output import echo, starting


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
    from livt_scale.evaluation.results import accuracy_table
    from livt_scale.posthoc.feature_set import FeatureSet
    from livt_scale.posthoc.probe import ProbeSettings, probe_report
    from livt_scale.util.tables import plain_console

    settings = ProbeSettings(loss=loss, weight_decay=weight_decay, max_steps=steps)
    report = probe_report(FeatureSet.read(train), FeatureSet.read(evaluated), settings=settings)
    if as_json:
        echo(json.dumps(report))
    else:
        plain_console().print(accuracy_table(report))
