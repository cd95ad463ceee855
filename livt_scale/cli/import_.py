"""`livt import`: foreign weights, as a folder that a run can start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale.cli.options import AsJson
from livt_scale.cli.output import echo


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors or .pth file, or a folder with one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new.")],
    layout: Annotated[str, typer.Option(help="Naming of the weights: auto, mae, livt, timm or hf.")] = "auto",
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the encoder, if its size is unknown.")
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the decoder.", show_default="16")
    ] = None,
    image_px: Annotated[int | None, typer.Option(min=1, help="Resample positions to this image size.")] = None,
    patch_px: Annotated[int | None, typer.Option(min=1, help="Resample the patch embedding to this size.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Image channels.")] = None,
    drop_head: Annotated[bool, typer.Option("--drop-head", help="Drop a fine-tuned head.")] = False,
    as_json: AsJson = False,
) -> None:
    """Import weights of MAE, LiVT, timm or Hugging Face.

    livt import mae_pretrain_vit_base.pth --out weights/mae-b

    livt train RECIPE --set stages.finetune.init=weights --set stages.finetune.weights=weights/mae-b
    """
    from livt_scale.weights.importer import import_weights

    report = import_weights(
        file, out, layout=layout, heads=heads, decoder_heads=decoder_heads, image_px=image_px, patch_px=patch_px,
        channels=channels, drop_head=drop_head,
    )  # fmt: skip
    if as_json:
        echo(json.dumps(report))
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    from livt_scale.util.tables import plain_console, plain_table

    rows = []
    for what in ("used", "left", "made"):
        names = report[what]
        rows.append([what, str(len(names)), ", ".join(names[:4]) + (" …" if len(names) > 4 else "")])
    rows += [["changed", "1", f"{name}: {how}"] for name, how in report["changed"].items()]
    plain_console().print(plain_table(["what", "tensors", "which"], rows))
    source = report["source"]
    echo(f"{source['file']}, layout {source['layout']}, is in {report['out']}")
