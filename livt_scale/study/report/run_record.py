"""What a report says of one run, read from its directory: whatever is there, of a run in any state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.checkpoint.catalog import step_folders
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.config.load import load_saved
from livt_scale.config.recipe import STAGES, Recipe, Stage
from livt_scale.config.run_place import SAVED
from livt_scale.evaluation.per_class import ClassRow
from livt_scale.train.run_dir import is_run
from livt_scale.train.run_files import (
    ANOMALIES,
    EVAL,
    EVALUATIONS,
    METRICS,
    EvaluationLine,
    MetricsLine,
    StageStatus,
    read_anomalies,
    read_eval,
    read_evaluations,
    read_metrics,
    read_status,
)
from livt_scale.util.errors import CheckpointError, RunError, UsageError
from livt_scale.util.text import visible


@dataclass(frozen=True)
class StageRecord:
    """One stage of the recipe; empty where it has not started."""

    name: Stage
    status: StageStatus | None
    lines: list[MetricsLine]
    evaluations: list[EvaluationLine]
    num_anomalies: int
    checkpoints: list[str]  # names, the oldest first
    pictures: list[Path]  # samples, the newest last

    @property
    def state(self) -> str:
        return str(self.status["state"]) if self.status else "not started"


@dataclass(frozen=True)
class RunRecord:
    """A run. evaluation: its eval.json, or None; facts: of its newest checkpoint."""

    folder: Path
    recipe: Recipe
    stages: list[StageRecord]
    evaluation: dict[str, Any] | None
    facts: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """Made visible; numbers where no checkpoint has the names."""
        num = len(self.evaluation["per_class"]) if self.evaluation else len(self.facts.get("class_names", []))
        names = [visible(str(name)) for name in self.facts.get("class_names", [])]
        return names if len(names) == num else [f"class {c}" for c in range(num)]


def read_run(folder: Path) -> RunRecord:
    """Raises UsageError (`folder` is not a run), RecipeError and RunError (files that cannot be read)."""
    if not is_run(folder) or not (folder / SAVED).is_file():
        raise UsageError(f"{folder} is not a run", remedy="give a run directory: it holds recipe.yaml and stages")
    recipe = load_saved(folder / SAVED)
    report = read_eval(folder / "finetune" / EVAL) if (folder / "finetune" / EVAL).exists() else None
    if report is not None:
        _check(report, folder / "finetune" / EVAL)
    stages = [_stage(folder, name) for name in STAGES if name in recipe.stage_names]
    return RunRecord(folder, recipe, stages, report, _newest_facts(folder, stages))


def _stage(folder: Path, name: Stage) -> StageRecord:
    place = folder / name
    return StageRecord(
        name,
        read_status(folder, name),
        read_metrics(place / METRICS).lines,
        read_evaluations(place / EVALUATIONS),
        len(read_anomalies(place / ANOMALIES).lines),
        [path.name for path in step_folders(place / "checkpoints")],
        sorted((place / "samples").glob("*.png")),
    )


def _newest_facts(folder: Path, stages: list[StageRecord]) -> dict[str, Any]:
    for stage in reversed(stages):
        for name in reversed(stage.checkpoints):
            try:
                return read_manifest(folder / stage.name / "checkpoints" / name).facts
            except CheckpointError:  # damaged: an older one may have them
                continue
    return {}


def _check(report: dict[str, Any], path: Path) -> None:
    """Raise RunError unless `report` has the parts that a page shows."""
    try:
        class_rows(report, [""] * len(report["per_class"]))
        float(report["top1"]["all"])
        fitted = report.get("temperature")
        for part in [report["calibration"], *([fitted["before"], fitted["after"]] if fitted else [])]:
            [(b["images"], b["from"], b["to"], b["accuracy"], b["confidence"], part["ece"]) for b in part["bins"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(
            f"{path} is not a report of an evaluation: {error!r}",
            remedy=f"write it again: livt eval {path.parent.parent} --out {path}",
        ) from error


def class_rows(report: dict[str, Any], names: list[str]) -> list[ClassRow]:
    """The classes of an eval.json; what each is mistaken for comes from its matrix, if it has one."""
    matrix = report["confusion"]
    given = [sum(row[c] for row in matrix) for c in range(len(names))] if matrix else []
    rows = []
    for one, name in zip(report["per_class"], names, strict=True):
        c, images = int(one["class"]), int(one["images"])
        others = [(count, -k) for k, count in enumerate(matrix[c]) if k != c and count] if matrix else []
        times, number = max(others, default=(0, 0))
        rows.append(
            ClassRow(
                number=c,
                name=name,
                group=str(one["group"]),
                train_images=int(one["train_images"]),
                images=images,
                top1=one["top1"],
                top5=one["top5"],
                precision=matrix[c][c] / given[c] if matrix and given[c] else None,
                recall=one["top1"],
                mean_confidence=None,
                confused_with=-number if times else None,
                confused_with_name=names[-number] if times else None,
                confused_share=times / images if times and images else None,
            )
        )
    return rows
