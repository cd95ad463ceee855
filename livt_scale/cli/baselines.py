"""`livt retrain`, `livt tau-norm` and `livt soup`: other classifiers from finished runs, each as an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale.cli.model import AsJson, From, Weights, WeightsName

Source = Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run directory, or an export.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write the export to.")]
OnData = Annotated[str | None, typer.Option("--data", help="Evaluation shards; without it, the run's own data.val.")]


def retrain(
    source: Source,
    out: Out,
    train: Annotated[str | None, typer.Option("--train", help="Training shards; without it, the run's own.")] = None,
    data: OnData = None,
    which: From = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over as many images as the set has.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 512,
    lr: Annotated[float, typer.Option(min=1e-9, help="Of the first step, for a batch of 256; scaled linearly.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of images.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train the head alone again, on images drawn evenly by class (cRT), and export the result.

    livt retrain runs/try --out exports/crt
    """
    from livt_scale.posthoc.crt import Settings, retrain_head

    settings = Settings(epochs=epochs, batch=batch, lr=lr, seed=seed)
    told = retrain_head(source, out, train=train, data=data, which=which, settings=settings)
    if _told_as_json(told, as_json=as_json):
        return
    typer.echo(f"{told['steps']} steps of the head on {told['batch']} images each, drawn evenly by class")
    _tell(told)


def tau_norm(
    source: Source,
    out: Out,
    taus: Annotated[
        list[float] | None, typer.Option("--tau", min=0, help="Can be given again; without it, 0 to 2 by 0.1.")
    ] = None,
    keep_bias: Annotated[bool, typer.Option("--keep-bias", help="Keep the head's bias; the paper drops it.")] = False,
    data: OnData = None,
    which: From = None,
    as_json: AsJson = False,
) -> None:
    """Divide the rows of the head by their norm to the power tau, and export the result. Nothing is trained.

    Tau is chosen on half of the evaluation set; the figures are of the other half.

    livt tau-norm runs/try --out exports/tau
    """
    from livt_scale.posthoc.tau_norm import TAUS, tau_normalise

    told = tau_normalise(source, out, taus=taus or TAUS, keep_bias=keep_bias, data=data, which=which)
    if _told_as_json(told, as_json=as_json):
        return
    chosen_on = told["held_out"]["chosen_on"]
    for row in told["sweep"]:
        mark = "  <- taken" if row["tau"] == told["tau"] else ""
        typer.echo(f"tau {row['tau']:<4g}  mean class {100 * row['mean_class']:.1f} % of {chosen_on} images{mark}")
    _tell(told)


def soup(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Runs, exports, or folders of fine-tuning checkpoints.")
    ],
    out: Out,
    greedy: Annotated[bool, typer.Option("--greedy", help="Keep only members that make the soup no worse.")] = False,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Of each run all checkpoints, not the final one alone.")
    ] = False,
    data: OnData = None,
    weights: Weights = WeightsName.raw,
    as_json: AsJson = False,
) -> None:
    """Average the weights of several models that were fine-tuned from one start, and export the result.

    Members are chosen on half of the evaluation set; the figures are of the other half.

    livt soup runs/try --all-checkpoints --greedy --out exports/soup
    """
    from livt_scale.posthoc.soup import make_soup, read_members

    members = read_members(paths, all_checkpoints=all_checkpoints, weights=weights.value)
    told = make_soup(members, out, method="greedy" if greedy else "uniform", data=data, run=paths[0])
    if _told_as_json(told, as_json=as_json):
        return
    for row in told["members"]:
        state = "in" if row["in"] else "left out"
        typer.echo(f"{row['checkpoint']}  mean class {100 * row['mean_class']:.1f} %  {state}")
    _tell(told)


def _told_as_json(told: dict[str, Any], *, as_json: bool) -> bool:
    if as_json:
        typer.echo(json.dumps(told))
    return as_json


def _tell(told: dict[str, Any]) -> None:
    images = f" on {told['held_out']['reported_on']} other images" if "held_out" in told else ""
    for name in ("before", "after"):
        if told[name] is not None:
            parts = (f"{group} {100 * value:.1f}" for group, value in told[name].items() if value is not None)
            typer.echo(f"{name:<6}  top-1 in %{images}: {'  '.join(parts)}")
    typer.echo(f"written: {told['out']}")
