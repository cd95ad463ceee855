"""A study's runs as one table, read from their directories, with the state of each: `livt study collect`.

    table = collect_study(loaded)        plain JSON: the report and the fits use it alone
    as_csv(table)                        one line per run: axes, parameters, images, measures, minutes, state

A run that is missing, unfinished, failed, of another recipe or of other images is in the table with its state and the
reason, and its measures are empty: only complete runs are counted.
"""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livt_scale import __version__
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.config.recipe import STAGES, Recipe, Stage, digest, learnt_from
from livt_scale.data.shard_set import ShardSet
from livt_scale.plan.flops import stage_flops
from livt_scale.slurm.status import look_at
from livt_scale.study.collect import (
    SameImages,
    beside_the_recipes,
    evaluations,
    measures_of,
    num_weights,
    sets_read,
    training_minutes,
    what_is_wrong,
)
from livt_scale.study.definition import LoadedStudy, Point, last_run, points, stages_of
from livt_scale.study.runs import Run
from livt_scale.train.run_files import EVAL, METRICS, read_eval, read_metrics
from livt_scale.util.errors import LivtError

FORMAT, VERSION = "livt-study", 1
MAX_POINTS = 200  # of a curve: a report holds a hundred runs


def collect_study(loaded: LoadedStudy, *, command: str = "") -> dict[str, Any]:
    """The table of all points, in their order."""
    every = points(loaded)
    known, images = Sets(), SameImages()
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": loaded.study.name,
        "study": str(loaded.path),
        "recipe": beside_the_recipes(str(loaded.recipe)),
        "folder": str(loaded.folder),
        "axes": {axis: list(values) for axis, values in loaded.study.axes.given.items()},
        "sets": dict(loaded.study.sets),
        "command": command or f"livt study submit {loaded.path}",
        "runs": [_row(loaded, point, known, images) for point in every],
        "fits": [],
        "versions": {"livt_scale": __version__, "torch": _torch(), "python": platform.python_version()},
    }


def state_of(loaded: LoadedStudy, point: Point) -> tuple[str, str]:
    """("done" | "running" | "preempted" | "failed" | "stalled" | "not run" | "not counted", why)."""
    run = last_run(loaded, point)
    place = run.at(loaded.folder)
    if not (place / "recipe.yaml").is_file():
        return "not run", ""
    view = look_at(place)
    wrong = what_is_wrong(run, loaded.folder)
    if not wrong:
        return "done", ""
    if wrong.startswith("of another recipe") or view.state == "done":
        return "not counted", wrong
    waits = "pretraining is done" if view.state == "pending" and view.stage == "finetune" else ""
    return ("not run" if view.state == "pending" else view.state), view.why or waits


def _row(loaded: LoadedStudy, point: Point, known: Sets, same: SameImages) -> dict[str, Any]:
    run, place = last_run(loaded, point), loaded.folder / point.name
    state, why = state_of(loaded, point)
    recipe, stages = run.load(loaded.folder), stages_of(loaded, point)
    measured: dict[str, Any] = {"measures": {}, "minutes": {}, "curves": {}, "picture": None, "images": []}
    images, classes = known.of(recipe)
    if state == "done":
        try:
            sets = sets_read(run, place, train=recipe.data.train, val=recipe.data.val)
            why = same.differ(sets, point.name)
            if why:
                state = "not counted"
            else:
                measured = _of_a_whole_run(stages, run, place) | {"images": list(sets.values())}
                images, classes = _size_of_its_set(run, place)
        except (LivtError, OSError, ValueError, LookupError) as error:
            state, why = "not counted", f"it cannot be read: {' '.join(str(error).split())}"[:300]
    return {
        "name": point.name, "state": state, "why": why, "folder": str(place), "axes": dict(point.axes),
        "num_weights": None if classes is None else num_weights(recipe, num_classes=classes), "num_images": images,
        **_epochs(recipe, stages), **measured, "flops": _flops(recipe, stages, images, classes),
        "recipe": digest({stage: learnt_from(recipe, stage) for stage in stages}),
    }  # fmt: skip


def _size_of_its_set(run: Run, place: Path) -> tuple[int, int]:
    """(images, classes) that a finished run trained on; its set may be gone from this machine."""
    if run.stage == "pretrain":
        from livt_scale.train.finetune import final_pretraining  # torch

        counts = read_manifest(final_pretraining(place)).facts["class_counts"]
    else:
        counts = [one["train_images"] for one in read_eval(place / "finetune" / EVAL)["per_class"]]
    return sum(counts), len(counts)


def _of_a_whole_run(stages: Sequence[Stage], run: Run, place: Path) -> dict[str, Any]:
    measures = measures_of(run, place)
    if "pretrain" in stages and run.stage != "pretrain":
        from livt_scale.study.reconstruction_loss import (
            reconstruction_loss,
        )  # torch, and only if it was not measured before

        measures["reconstruction_loss"] = reconstruction_loss(place).loss
    curves: dict[str, list[list[float]]] = {stage: _curve(place / stage / METRICS) for stage in stages}
    evaluated = [[line.epoch, line.top1_all] for line in evaluations(place)]
    if run.stage == "finetune":
        curves["evaluations"] = evaluated
    pictures = sorted((place / "pretrain" / "samples").glob("*.png"))
    return {
        "measures": measures,
        "minutes": {stage: training_minutes(place / stage) for stage in stages},
        "curves": curves,
        "picture": str(pictures[-1]) if pictures else None,
    }


def _curve(path: Path) -> list[list[float]]:
    """[[epoch, loss], …], thinned to at most MAX_POINTS, the last one kept."""
    lines = read_metrics(path, strict=True).lines
    step = -(-len(lines) // MAX_POINTS) or 1
    kept = lines[::-1][::step][::-1]
    return [[line.epoch, line.loss] for line in kept if line.epoch is not None and line.loss is not None]


def _epochs(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, int | None]:
    return {f"{s}_epochs": recipe.stage(s).epochs if s in stages else None for s in STAGES}


def _flops(recipe: Recipe, stages: Sequence[Stage], images: int | None, classes: int | None) -> float | None:
    """Of training, by formula (`plan.flops`), all stages together."""
    if images is None or classes is None:
        return None
    total = 0
    for stage in stages:
        part = recipe.stage(stage)
        seen = images // part.global_batch * part.global_batch * part.epochs
        total += seen * stage_flops(recipe, stage, num_classes=classes).train
    return float(total)


class Sets:
    """(images, classes) of training sets, each opened once; (None, None) where one is not here."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int | None, int | None]] = {}

    def of(self, recipe: Recipe) -> tuple[int | None, int | None]:
        where = recipe.data.train
        if where not in self._known:
            try:
                shards = ShardSet.open(where, data=recipe.data)
                self._known[where] = shards.num_samples, shards.num_classes
            except LivtError:
                self._known[where] = None, None
        return self._known[where]


def _torch() -> str:
    import torch

    return torch.__version__


def as_csv(table: dict[str, Any]) -> str:
    """One line per run, after a header. Numbers as Python writes them; missing values are empty."""
    axes = list(table["axes"])
    measures = sorted({name for run in table["runs"] for name in run["measures"]})
    stages = sorted({stage for run in table["runs"] for stage in run["minutes"]}, reverse=True)
    head = ["name", *axes, "num_weights", "num_images", *measures, *(f"{s}_minutes" for s in stages), "flops"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "state", "why", "folder"])
    for run in table["runs"]:
        row: Sequence[Any] = [
            run["name"], *(run["axes"].get(axis) for axis in axes), run["num_weights"], run["num_images"],
            *(run["measures"].get(name) for name in measures), *(run["minutes"].get(stage) for stage in stages),
            run["flops"], run["state"], run["why"], run["folder"],
        ]  # fmt: skip
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()
