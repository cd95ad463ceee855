"""`livt export`: the trained weights in the layout of another library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson, Force, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo


def export(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write. Default: RUN/export.")] = None,
    which: WhichCheckpoint = None,
    layout: Annotated[str, typer.Option(help="File layout: timm, mae or hf.")] = "timm",
    stage: Annotated[str | None, typer.Option(help="pretrain or finetune. Default for mae and hf: pretrain.")] = None,
    weights: Weights = WeightsName.raw,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a run for timm, MAE's code or Hugging Face.

    livt export runs/try --out exports/try

    livt export runs/try --layout hf --out exports/mae-hf

    python -c "import timm; timm.create_model('local-dir:exports/try', pretrained=True)"
    """
    from livt_scale.export.write_export import export_run
    from livt_scale.util.errors import UsageError

    target = out or run / ("export" if layout == "timm" else f"export-{layout}")
    if layout != "timm" or stage not in (None, "finetune"):
        if weights != WeightsName.raw:
            raise UsageError(
                "--weights ema needs the timm layout and the fine-tuning stage", remedy="leave out --weights"
            )
        from livt_scale.export.mae_hf import export_as

        written = export_as(run, target, layout=layout, stage=stage or "pretrain", which=which, force=force)
        text = f"{written['file']}: {written['tensors']} tensors, {layout} layout"
        echo(json.dumps(written) if as_json else text)
        return
    info = export_run(run, target, which=which, weights=weights.value, force=force)
    if as_json:
        echo(json.dumps({"out": str(target), **info.model_dump(mode="json")}))
        return
    lineage = info.lineage
    echo(f"{lineage['checkpoint']} of {run}: {len(info.class_names)} classes, {info.weights.bytes:,} bytes")
    echo(f"timm.create_model({'local-dir:' + str(target)!r}, pretrained=True)")
