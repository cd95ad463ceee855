"""`livt export`: the trained weights in the layout of another library, or of ours."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from livt_scale.cli.options import AsJson, Force, RunOrExport, Weights, WeightsName, WhichCheckpoint
from livt_scale.cli.output import echo, starting
from livt_scale.cli.train import StageName

if TYPE_CHECKING:
    from livt_scale.train.export_info import ExportInfo


class Layout(StrEnum):
    timm = "timm"
    onnx = "onnx"
    peft = "peft"
    livt = "livt"
    mae = "mae"
    hf = "hf"


TO_HELP = "Whose layout: timm, ONNX, peft (LoRA), livt, MAE's code or Hugging Face."
BASE_HELP = "With --to peft: folder for the network without the adapter."
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
    base: Annotated[Path | None, typer.Option("--base", help=BASE_HELP, show_default="not written")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a run for timm, ONNX, peft, MAE's code or Hugging Face.

    livt export runs/try --out exports/try

    livt export runs/try --to onnx --out exports/onnx

    livt export runs/lora --to peft --out exports/adapter --base exports/base

    livt export runs/try --to hf --out exports/mae-hf

    python -c "import timm; timm.create_model('local-dir:exports/try', pretrained=True)"
    """
    starting(f"export {path}")
    from livt_scale.util.errors import UsageError

    if base is not None and to is not Layout.peft:
        raise UsageError(f"--base has no effect with --to {to}", remedy="leave it out, or give --to peft")
    target = out or path / ("export" if to is Layout.timm else f"export-{to}")
    if to in (Layout.mae, Layout.hf) or stage is StageName.pretrain:
        if weights is not WeightsName.raw:
            raise UsageError("--weights ema needs --to timm, onnx, peft or livt", remedy="leave out --weights")
        from livt_scale.export.mae_hf import export_as

        written = export_as(path, target, layout=to, stage=stage or "pretrain", which=which, force=force)
        text = f"{written['file']}: {written['tensors']} tensors, {to} layout"
        echo(json.dumps(written) if as_json else text)
        return

    info, use = _write(path, target, to, base=base, which=which, weights=weights, force=force)
    if as_json:
        echo(json.dumps({"out": str(target), **info.model_dump(mode="json")}))
        return
    echo(f"{info.lineage['checkpoint']} of {path}: {len(info.class_names)} classes, {info.weights.bytes:,} bytes")
    echo(use)


def _write(
    path: Path, target: Path, to: Layout, *, base: Path | None, which: str | None, weights: WeightsName, force: bool
) -> tuple[ExportInfo, str]:
    """Write a classifier; (its facts, a line of Python that opens it)."""
    if to is Layout.onnx:
        from livt_scale.export.onnx import ONNX, export_onnx
        from livt_scale.train.open_trained import open_trained

        info = export_onnx(open_trained(path, which=which, weights=weights.value), target, force=force)
        use = f"onnxruntime.InferenceSession({str(target / ONNX)!r})"
    elif to is Layout.peft:
        from livt_scale.export.peft import export_peft

        info = export_peft(path, target, base=base, which=which, weights=weights.value, force=force)
        use = f"peft.PeftModel.from_pretrained(network, {str(target)!r})"
    else:
        from livt_scale.export.write_export import export_run

        is_timm = to is Layout.timm
        info = export_run(path, target, which=which, weights=weights.value, for_timm=is_timm, force=force)
        folder = f"local-dir:{target}" if is_timm else str(target)
        use = f"timm.create_model({folder!r}, pretrained=True)" if is_timm else f"livt_scale.load({folder!r})"
    return info, use
