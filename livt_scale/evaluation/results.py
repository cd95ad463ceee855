"""The tables that `livt quickstart` and `livt eval` print, made of an eval.json. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from livt_scale.util.tables import plain_console, plain_table
from livt_scale.util.text import escaped

if TYPE_CHECKING:
    from rich.table import Table


def results_table(run_dir: Path, report: dict[str, Any]) -> None:
    """Print accuracy for all, many, medium and few-shot classes, and where everything else is."""
    console = plain_console()
    console.print(accuracy_table(report))
    console.print(calibration_line(report))
    pictures = sorted((run_dir / "pretrain" / "samples").glob("*.png"))[-1:]
    pictures += sorted((run_dir / "finetune" / "samples").glob("*.png"))[-1:]
    for label, path in (("everything", run_dir), *((p.parent.parent.name, p) for p in pictures)):
        console.print(escaped(f"{label}: {path}"), soft_wrap=True)


def accuracy_table(report: dict[str, Any]) -> Table:
    """Top-1 and top-5 of `report` (as `evaluate` gives it), in per cent, of all classes and of each group."""
    groups = ("all", "many", "medium", "few")
    rows = [
        [metric.replace("top", "top-"), *(_percent(report[metric][group]) for group in groups)]
        for metric in ("top1", "top5")
    ]
    title = f"{report['num_samples']} evaluation images, accuracy in %"
    return plain_table(["", *groups], rows, title=title, justify="right")


def calibration_line(report: dict[str, Any]) -> str:
    """The errors of calibration, of the probabilities and of how often each class is predicted."""
    calibration = report["calibration"]
    line = f"calibration error {100 * calibration['ece']:.1f} %"
    pdc = calibration.get("pdc")  # missing from a report of an older version
    return line if pdc is None else f"{line}, PDC {pdc:.2f}"


def sweep_table(report: dict[str, Any]) -> Table:
    """Top-1 by τ, in per cent: a row for each of `report["tau_sweep"]`."""
    chosen = report.get("adjustment", {}).get("chosen_on")
    where = f"{chosen} images that τ is chosen on" if chosen else f"{report['num_samples']} evaluation images"
    groups = ("all", "mean_class", "many", "medium", "few")
    rows = [[f"{row['tau']:g}", *(_percent(row["top1"][group]) for group in groups)] for row in report["tau_sweep"]]
    columns = ["τ", "all", "mean of classes", "many", "medium", "few"]
    return plain_table(columns, rows, title=f"{where}, top-1 accuracy in %", justify="right")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
