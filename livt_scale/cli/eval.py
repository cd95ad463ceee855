"""`livt eval`: parse, call one function, print. What it does is in `livt_scale.cli.evaluation`, which imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson, EvaluationShards, Force, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo, starting

VIEWS_HELP = "Views of each image to average: 1 (centre crop), 2 (and its mirror image), 5 (crops) or 10 (both)."
RESIZE_HELP = "Pixels of the shorter side of the image that views are cut from."
AVERAGE_HELP = "What to average over the views."
GALLERY_HELP = "Write the most frequent confusions as HTML."
REPORTS_HELP = "Folder for per_class.csv, per_class.png and reliability.png."
TAU_HELP = "Subtract tau times the log training prior. Several values: a table. auto: chosen on half of the set."


def eval_(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run directory, an export, or a file of --save-logits.")
    ],
    data: EvaluationShards = None,
    which: WhichCheckpoint = None,
    weights: Weights = WeightsName.raw,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per forward pass.", show_default="64")
    ] = None,
    views: Annotated[
        int | None, typer.Option("--views", metavar="<1|2|5|10>", help=VIEWS_HELP, show_default="1")
    ] = None,
    average: Annotated[
        str | None, typer.Option("--average", metavar="<logits|probs>", help=AVERAGE_HELP, show_default="logits")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option("--resize", min=1, help=RESIZE_HELP, show_default="as data.crop_pct says"),
    ] = None,
    tau: Annotated[str | None, typer.Option("--tau", metavar="<t[,t...]|auto>", help=TAU_HELP)] = None,
    temperature: Annotated[
        bool, typer.Option("--temperature", help="Fit a temperature on half of the set; report on the other half.")
    ] = False,
    reports: Annotated[Path | None, typer.Option("--reports", help=REPORTS_HELP)] = None,
    gallery: Annotated[Path | None, typer.Option("--gallery", help=GALLERY_HELP)] = None,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", help="Write all logits, for later reports.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the report to, as eval.json.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run, an export or saved logits.

    Prints accuracy for all, many-, medium- and few-shot classes, and calibration. Under torchrun or srun the ranks
    share the images; each image counts once.

    livt eval runs/try

    livt eval exports/try --data shards/fashion-mnist-lt/val --json

    livt eval runs/try --views 10 --save-logits logits.safetensors

    livt eval logits.safetensors --tau 0,0.5,1 --reports reports/try
    """
    starting(f"eval {path}")
    from livt_scale.cli.evaluation import Wanted, evaluated, print_report

    wanted = Wanted(tau, temperature, reports, gallery, save_logits, out, force)
    typed = {"which": which, "batch": batch, "views": views, "average": average, "resize": resize}
    typed["weights"] = None if weights is WeightsName.raw else weights.value
    run = {name: value for name, value in typed.items() if value is not None}
    done = evaluated(path, data=data, run=run, wanted=wanted)
    if done is None:  # not the main rank
        return
    if as_json:
        echo(json.dumps(done.report))
    else:
        print_report(done)
