"""`livt predict`: a folder of images, or one image, to a CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson, Force, RunOrExport, WhichCheckpoint
from livt_scale.cli.output import echo, starting


def predict(
    path: RunOrExport,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images, at any depth, or one image.")],
    out: Annotated[Path, typer.Option("--out", help="The CSV to write.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes per image.")] = 5,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write a damaged image's error to its row and continue.")
    ] = False,
    tau: Annotated[float, typer.Option("--tau", help="Subtract tau times the log training prior.")] = 0.0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Divide the logits by this.", show_default="as fitted, else 1")
    ] = None,
    views: Annotated[int, typer.Option("--views", metavar="<1|2|5|10>", help="Views to average, as in livt eval.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Decoding processes.", show_default="one per core, at most 8")
    ] = None,
    which: WhichCheckpoint = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Classify every image in a folder, or one image; write a CSV.

    livt predict exports/try photos --out photos.csv

    livt predict runs/try photos --out photos.csv --top-k 3 --skip-bad --json
    """
    from livt_scale.posthoc.predict_inputs import CSV_MARK, check_inputs
    from livt_scale.util.outputs import check_output

    check_inputs(path, images)
    check_output(out, marks=[CSV_MARK], command="predict", force=force)
    starting(f"predict {path}")
    from livt_scale.distributed.world import detect
    from livt_scale.evaluation.tta import Views
    from livt_scale.posthoc.predict import Prediction
    from livt_scale.posthoc.predict import predict as run
    from livt_scale.train.open_trained import open_trained
    from livt_scale.util.errors import UsageError

    if detect().world_size > 1:
        raise UsageError("livt predict runs in one process", remedy="start it without torchrun, one folder at a time")
    how = Prediction(top_k, tau, temperature, Views(views))
    summary = run(
        open_trained(path, which=which), images, out, how=how, skip_bad=skip_bad, batch=batch, workers=workers
    )
    if as_json:
        echo(json.dumps(summary))
        return
    echo(f"{summary['predicted']:,} of {summary['images']:,} images: {out}")
    for bad in summary["bad_files"][:10]:
        echo(f"bad: {bad['file']!r}: {bad['error']}", err=True)
    if summary["bad"] > 10:
        echo(f"bad: {summary['bad'] - 10:,} more, in the CSV", err=True)
