"""Options that several commands share, in one wording."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.util.errors import UsageError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, or livt:NAME for a shipped one.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="<a.b=c>", help="Override a recipe value (a.b=c). Repeatable.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="<field>", help="Accept a changed recipe field when resuming. Repeatable."),
]
Price = Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0, help="Any currency.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RunOrExport = Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run directory or an export.")]
ExportFolder = Annotated[Path, typer.Option("--out", help="Folder to write the export to.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what another run or command wrote there.")]
EvaluationShards = Annotated[
    str | None, typer.Option("--data", help="Evaluation shards.", show_default="the run's data.val")
]
WhichCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="<best|newest|step>",
        help="`best`, `newest` or a step.",
        show_default="the final checkpoint",
    ),
]

COST_DEVICE = "h100"
CostDevice = Annotated[
    str | None, typer.Option("--device", help="With --dry-run: device to estimate hours for.", show_default=COST_DEVICE)
]


def check_cost_options(*, dry_run: bool, device: str | None, price: float | None) -> None:
    """Raises UsageError: an option of --dry-run without it."""
    if not dry_run and (device is not None or price is not None):
        option = "--price-per-gpu-hour" if device is None else "--device"
        raise UsageError(f"{option} is for the cost of runs", remedy="add --dry-run, or leave it out")


def check_needs(option: str, other: str, *, given: bool, there: bool) -> None:
    """Raises UsageError: `option` is given, and has no effect without `other`."""
    if given and not there:
        raise UsageError(f"{option} has no effect without {other}", remedy=f"add {other}, or leave it out")


class WeightsName(StrEnum):
    raw = "raw"
    ema = "ema"


Weights = Annotated[
    WeightsName, typer.Option("--weights", help="`raw`: as trained. `ema`: their moving average, if the run kept one.")
]
