"""`livt export`: the trained weights in the layout of another library."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import AsJson, Force, RunOrExport, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo, starting
from livt_scale.cli.train import StageName


class Layout(StrEnum):
    timm = "timm"
    onnx = "onnx"
    mae = "mae"
    hf = "hf"


TO_HELP = "Whose layout: timm, ONNX, MAE's code or Hugging Face."
STAGE_HELP = "Stage to export, with --to mae."
STAGE_DEFAULT = "pretrain for mae and hf, else finetune"


def export(
    path: RunOrExport,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write.", show_default="RUN/export, or RUN/export-TO")
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help=TO_HELP)] = Layout.timm,
    which: WhichCheckpoint = None,
    stage: Annotated[StageName | None, typer.Option(help=STAGE_HELP, show_default=STAGE_DEFAULT)] = None,
    weights: Weights = WeightsName.raw,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a run for timm, ONNX, MAE's code or Hugging Face.

    livt export runs/try --out exports/try

    livt export runs/try --to onnx --out exports/onnx

    livt export runs/try --to hf --out exports/mae-hf

    python -c "import timm; timm.create_model('local-dir:exports/try', pretrained=True)"
    """
    starting(f"export {path}")
    from livt_scale.util.errors import UsageError

    target = out or path / ("export" if to is Layout.timm else f"export-{to}")
    if to in (Layout.mae, Layout.hf) or stage is StageName.pretrain:
        if weights is not WeightsName.raw:
            raise UsageError("--weights ema needs --to timm or onnx", remedy="leave out --weights")
        from livt_scale.export.mae_hf import export_as

        written = export_as(path, target, layout=to, stage=stage or "pretrain", which=which, force=force)
        text = f"{written['file']}: {written['tensors']} tensors, {to} layout"
        echo(json.dumps(written) if as_json else text)
        return

    if to is Layout.onnx:
        from livt_scale.export.onnx import ONNX, export_onnx
        from livt_scale.export.open_trained import open_trained

        info = export_onnx(open_trained(path, which=which, weights=weights.value), target, force=force)
        use = f"onnxruntime.InferenceSession({str(target / ONNX)!r})"
    else:
        from livt_scale.export.write_export import export_run

        info = export_run(path, target, which=which, weights=weights.value, force=force)
        use = f"timm.create_model({'local-dir:' + str(target)!r}, pretrained=True)"
    if as_json:
        echo(json.dumps({"out": str(target), **info.model_dump(mode="json")}))
        return
    echo(f"{info.lineage['checkpoint']} of {path}: {len(info.class_names)} classes, {info.weights.bytes:,} bytes")
    echo(use)
