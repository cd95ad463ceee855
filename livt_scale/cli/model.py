"""`livt export` and `livt eval`: what a finished run is good for."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

From = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="WHICH", help="best, newest or a step (default: the final checkpoint)."),
]
VIEWS_HELP = "Views of each image that are averaged: 1 centre crop, 2 and its mirror image, 5 crops, 10 both."
AVERAGE_HELP = "What of the views is averaged; logits by default."
REPORTS_HELP = "Write per_class.csv, per_class.png and reliability.png there."
TAU_HELP = "Take the training prior out of the logits, so strongly; several: a table; auto: chosen on half of the set."


class WeightsName(StrEnum):
    raw = "raw"
    ema = "ema"


Weights = Annotated[
    WeightsName, typer.Option("--weights", help="raw: as trained; ema: their average, if the run kept one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def export(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; without it, RUN/export.")] = None,
    which: From = None,
    layout: Annotated[str, typer.Option(help="timm, mae or hf: whose files to write.")] = "timm",
    stage: Annotated[str | None, typer.Option(help="pretrain or finetune; mae and hf: pretrain without it.")] = None,
    weights: Weights = WeightsName.raw,
    as_json: AsJson = False,
) -> None:
    """Write a run's classifier as timm reads it, or its masked autoencoder as MAE's code or Hugging Face reads it.

    livt export runs/try --out exports/try

    livt export runs/try --layout hf --out exports/mae-hf

    python -c "import timm; timm.create_model('local-dir:exports/try', pretrained=True)"
    """
    from livt_scale.export.timm import export_run
    from livt_scale.util.errors import UsageError

    target = out or run / ("export" if layout == "timm" else f"export-{layout}")
    if layout != "timm" or stage not in (None, "finetune"):
        if weights != WeightsName.raw:
            raise UsageError("--weights ema goes with the timm layout of fine-tuning alone", remedy="leave it out")
        from livt_scale.export.mae_hf import export_as

        told = export_as(run, target, layout=layout, stage=stage or "pretrain", which=which)
        typer.echo(json.dumps(told) if as_json else f"{told['file']}: {told['tensors']} tensors of the {layout} layout")
        return
    info = export_run(run, target, which=which, weights=weights.value)
    if as_json:
        typer.echo(json.dumps({"out": str(target), **info.model_dump(mode="json")}))
        return
    lineage = info.lineage
    typer.echo(f"{lineage['checkpoint']} of {run}: {len(info.class_names)} classes, {info.weights.bytes:,} bytes")
    typer.echo(f"timm.create_model({'local-dir:' + str(target)!r}, pretrained=True)")


def eval_(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run directory, an export, or a file of --save-logits.")
    ],
    data: Annotated[str | None, typer.Option("--data", help="Shards; without it, the run's own data.val.")] = None,
    which: From = None,
    weights: Weights = WeightsName.raw,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Images a forward pass; 64 by default.")] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="1|2|5|10", help=VIEWS_HELP)] = None,
    average: Annotated[str | None, typer.Option("--average", metavar="logits|probs", help=AVERAGE_HELP)] = None,
    tau: Annotated[str | None, typer.Option("--tau", metavar="T[,T...]|auto", help=TAU_HELP)] = None,
    temperature: Annotated[
        bool, typer.Option("--temperature", help="Fit a temperature on one half of the set, report it on the other.")
    ] = False,
    reports: Annotated[
        Path | None,
        typer.Option("--reports", metavar="DIR", help=REPORTS_HELP),
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option("--gallery", metavar="FILE", help="Write the worst confusions as one HTML file.")
    ] = None,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", metavar="FILE", help="Write all logits, for further reports.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the report there, as eval.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run or an export: accuracy by group, per class, calibration, confusion.

    Under torchrun or srun the ranks share the images; each is counted once.

    livt eval runs/try

    livt eval exports/try --data shards/fashion-mnist-lt/val --json

    livt eval runs/try --views 10 --save-logits logits.safetensors

    livt eval logits.safetensors --tau 0,0.5,1 --reports reports/try
    """
    from livt_scale.cli.evaluation import Wanted, evaluated, print_report

    wanted = Wanted(tau, temperature, reports, gallery, save_logits, out)
    typed = {"which": which, "batch": batch, "views": views, "average": average}
    typed["weights"] = None if weights is WeightsName.raw else weights.value
    run = {name: value for name, value in typed.items() if value is not None}
    done = evaluated(path, data=data, run=run, wanted=wanted)
    if done is None:  # not the main rank
        return
    if as_json:
        typer.echo(json.dumps(done.report))
    else:
        print_report(done)
