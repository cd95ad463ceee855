"""`livt retrain`: the head of a finished run, trained again with class-balanced sampling."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from livt_scale.cli.change import print_change
from livt_scale.cli.options import AsJson, EvaluationShards, ExportFolder, Force, RunOrExport, WhichCheckpoint
from livt_scale.cli.output import echo, starting


def retrain(
    source: RunOrExport,
    out: ExportFolder,
    train: Annotated[str | None, typer.Option("--train", help="Training shards.", show_default="the run's")] = None,
    data: EvaluationShards = None,
    which: WhichCheckpoint = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over as many images as the set has.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 512,
    lr: Annotated[float, typer.Option(min=1e-9, help="Initial learning rate per batch of 256.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the image order.")] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Retrain the head on class-balanced batches (cRT); export it.

    livt retrain runs/try --out exports/crt
    """
    starting(f"retrain {source}")
    from livt_scale.posthoc.crt import Settings, retrain_head

    settings = Settings(epochs=epochs, batch=batch, lr=lr, seed=seed)
    result = retrain_head(source, out, train=train, data=data, which=which, settings=settings, force=force)
    if as_json:
        echo(json.dumps(result))
        return
    echo(f"{result['steps']} steps of the head with {result['batch']} images each, sampled evenly over classes")
    print_change(result)
