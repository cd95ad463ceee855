"""`livt export` and `livt eval`: what a finished run is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

From = Annotated[
    str | None,
    typer.Option("--from", metavar="CHECKPOINT", help="best, newest or a step; without it, the final checkpoint."),
]
TIMEOUT_S = 1800  # ranks wait so long for the slowest
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def export(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; without it, RUN/export.")] = None,
    which: From = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's classifier as model.safetensors and config.json, as timm reads them.

    livt export runs/try --out exports/try

    python -c "import timm; timm.create_model('local-dir:exports/try', pretrained=True)"
    """
    from livt_scale.export import export_run

    target = out or run / "export"
    info = export_run(run, target, which=which)
    if as_json:
        typer.echo(json.dumps({"out": str(target), **info.model_dump(mode="json")}))
        return
    lineage = info.lineage
    typer.echo(f"{lineage['checkpoint']} of {run}: {len(info.class_names)} classes, {info.weights.bytes:,} bytes")
    typer.echo(f"timm.create_model({'local-dir:' + str(target)!r}, pretrained=True)")


def eval_(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run directory, or an export.")],
    data: Annotated[str | None, typer.Option("--data", help="Shards; without it, the run's own data.val.")] = None,
    which: From = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a forward pass.")] = 64,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the report there, as eval.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run or an export: accuracy by group, per class, calibration, confusion.

    Under torchrun or srun the ranks share the images; each is counted once.

    livt eval runs/try

    livt eval exports/try --data shards/fashion-mnist-lt/val --json
    """
    from livt_scale.export import evaluate_path
    from livt_scale.parallel.cores import told_to_loader
    from livt_scale.parallel.topology import detect, process_group
    from livt_scale.train.evaluate import write_eval

    world = detect()
    with process_group(world, timeout_s=TIMEOUT_S), told_to_loader(world):
        report = evaluate_path(path, data=data, which=which, batch=batch, world=world)
    if not world.is_main:
        return
    if out is not None:
        weights = report["weights"]
        write_eval({k: v for k, v in report.items() if k != "weights"}, out, weights=weights)
    if as_json:
        typer.echo(json.dumps(report))
        return
    from rich.console import Console

    from livt_scale.train.results import accuracy_table

    Console().print(accuracy_table(report))
    weights = report["weights"]
    typer.echo(f"calibration error {100 * report['calibration']['ece']:.1f} %")
    typer.echo(f"weights: {weights['checkpoint']} of {weights['read_from']}, recipe {weights['recipe_digest'][:12]}")
    typer.echo(f"data: {report['data']['folder']}, manifest {report['data']['manifest_digest'][:12]}")
