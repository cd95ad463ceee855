"""The tables that `livt train` and `livt eval` print, made of an eval.json. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def results_table(run_dir: Path, report: dict[str, Any], *, console: Console | None = None) -> None:
    """Print accuracy for all, many, medium and few-shot classes, and where everything else is."""
    console = console or Console()
    console.print(accuracy_table(report))
    console.print(f"calibration error {100 * report['calibration']['ece']:.1f} %", highlight=False)
    pictures = sorted((run_dir / "pretrain" / "samples").glob("*.png"))[-1:]
    pictures += sorted((run_dir / "finetune" / "samples").glob("*.png"))[-1:]
    for label, path in (("everything", run_dir), *((p.parent.parent.name, p) for p in pictures)):
        console.print(f"{label}: {path}", highlight=False, soft_wrap=True)


def accuracy_table(report: dict[str, Any]) -> Table:
    """Top-1 and top-5 of `report` (as `evaluate` gives it), in per cent, of all classes and of each group."""
    groups = ("all", "many", "medium", "few")
    table = Table(title=f"{report['num_samples']} evaluation images, accuracy in %")
    for name in ("", *groups):
        table.add_column(name, justify="left" if not name else "right")
    for metric in ("top1", "top5"):
        values = [report[metric][group] for group in groups]
        table.add_row(metric.replace("top", "top-"), *("-" if v is None else f"{100 * v:.1f}" for v in values))
    return table


def sweep_table(report: dict[str, Any]) -> Table:
    """Top-1 by τ, in per cent: a row for each of `report["tau_sweep"]`."""
    chosen = report.get("adjustment", {}).get("chosen_on")
    where = f"{chosen} images that τ is chosen on" if chosen else f"{report['num_samples']} evaluation images"
    table = Table(title=f"{where}, top-1 accuracy in %")
    groups = ("all", "mean_class", "many", "medium", "few")
    for name in ("τ", "all", "mean of classes", "many", "medium", "few"):
        table.add_column(name, justify="right")
    for row in report["tau_sweep"]:
        values = [row["top1"][group] for group in groups]
        table.add_row(f"{row['tau']:g}", *("-" if v is None else f"{100 * v:.1f}" for v in values))
    return table
