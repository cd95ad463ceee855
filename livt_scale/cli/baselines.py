"""`livt retrain`, `livt tau-norm` and `livt soup`: methods applied to finished runs, exported (docs/baselines.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale.cli.options import (
    AsJson,
    EvaluationShards,
    ExportFolder,
    Force,
    RunOrExport,
    Weights,
    WeightsName,
    WhichCheckpoint,
)
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
    _print_change(result)


def tau_norm(
    source: RunOrExport,
    out: ExportFolder,
    taus: Annotated[
        list[float] | None, typer.Option("--tau", min=0, help="Value to try. Repeatable.", show_default="0 to 2 by 0.1")
    ] = None,
    keep_bias: Annotated[bool, typer.Option("--keep-bias", help="Keep the head's bias; the paper drops it.")] = False,
    data: EvaluationShards = None,
    which: WhichCheckpoint = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Normalise the head's rows by the power tau; export it.

    Each row is divided by its norm to the power tau. Nothing is trained. Tau is chosen on half of the evaluation set;
    the figures are from the other half.

    livt tau-norm runs/try --out exports/tau
    """
    starting(f"tau-norm {source}")
    from livt_scale.posthoc.tau_norm import TAUS, tau_normalise

    result = tau_normalise(source, out, taus=taus or TAUS, keep_bias=keep_bias, data=data, which=which, force=force)
    if as_json:
        echo(json.dumps(result))
        return
    chosen_on = result["held_out"]["chosen_on"]
    for row in result["sweep"]:
        mark = "  <- chosen" if row["tau"] == result["tau"] else ""
        echo(f"tau {row['tau']:<4g}  mean class {100 * row['mean_class']:.1f} % of {chosen_on} images{mark}")
    _print_change(result)


def soup(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Runs, exports, or folders of fine-tuning checkpoints.")
    ],
    out: ExportFolder,
    greedy: Annotated[bool, typer.Option("--greedy", help="Add a member only if accuracy does not drop.")] = False,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Use every checkpoint of each run, not only the final one.")
    ] = False,
    data: EvaluationShards = None,
    weights: Weights = WeightsName.raw,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Average the weights of models of one start; export the mean.

    Members are chosen on half of the evaluation set; the figures are from the other half.

    livt soup runs/try --all-checkpoints --greedy --out exports/soup
    """
    starting(f"soup {', '.join(map(str, paths))}")
    from livt_scale.posthoc.soup import make_soup, read_members

    members = read_members(paths, all_checkpoints=all_checkpoints, weights=weights.value)
    result = make_soup(members, out, method="greedy" if greedy else "uniform", data=data, run=paths[0], force=force)
    if as_json:
        echo(json.dumps(result))
        return
    for row in result["members"]:
        state = "in" if row["in"] else "left out"
        of_run = "" if Path(row["path"]).name == row["checkpoint"] else f"  {row['checkpoint']}"
        echo(f"{row['path']}{of_run}  mean class {100 * row['mean_class']:.1f} %  {state}")
    _print_change(result)


def _print_change(result: dict[str, Any]) -> None:
    """Accuracy before and after, and the export."""
    images = f" on {result['held_out']['reported_on']} other images" if "held_out" in result else ""
    for name in ("before", "after"):
        if result[name] is not None:
            parts = (f"{group} {100 * value:.1f}" for group, value in result[name].items() if value is not None)
            echo(f"{name:<6}  top-1 in %{images}: {'  '.join(parts)}")
    echo(f"written: {result['out']}")
