"""The report of one run as sections of plain blocks: tables, pictures and text, before anything is HTML.

    for section in sections_of_run(read_run(folder)):
        section.title, section.missing, section.blocks         # missing: why there is nothing to show

Whatever a picture shows is also in a table.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from livt_scale.config.load import to_yaml
from livt_scale.evaluation import plots
from livt_scale.evaluation.intervals import of_mean, wilson
from livt_scale.plan.flops import stage_flops
from livt_scale.study.report.figures import draw_panels
from livt_scale.study.report.run_record import RunRecord, StageRecord, class_rows
from livt_scale.study.report.sections import Fact
from livt_scale.study.report.series import Panel, Series, short
from livt_scale.study.report.thumbnails import small_uri
from livt_scale.train.run_files import training_seconds
from livt_scale.util.text import visible

MAX_POINTS = 100  # of a curve, in the plot and in its table
MAX_PAIRS = 100  # of classes that are confused
MATRIX_CLASSES = 20  # up to which the matrix is a table
PICTURE_BYTES = 600_000
DIGESTS = {"recipe_digest": "digest of its recipe", "trained_on": "digest of its training set"}
GROUPS = ("all", "mean_class", "many", "medium", "few")


class RunTable(NamedTuple):
    """heads: (title, is it a number) of each column."""

    caption: str
    heads: list[tuple[str, bool]]
    rows: list[list[str]]


class Picture(NamedTuple):
    """An image as a data URI. values: the same as a table, shown on a click."""

    uri: str
    alt: str
    values: RunTable | None = None


class Listing(NamedTuple):
    """Text as it is."""

    text: str


@dataclass(frozen=True)
class RunSection:
    """A part of the page with a heading. missing: why it has no blocks."""

    id: str
    title: str
    text: str = ""
    missing: str = ""
    blocks: Sequence[RunTable | Picture | Listing] = field(default_factory=list)


def sections_of_run(run: RunRecord) -> list[RunSection]:
    return [
        _curves(run),
        *_evaluation(run),
        _reconstructions(run),
        _speed(run),
        _lineage(run),
        RunSection("recipe", "Recipe", "As resolved when the run started last.", blocks=[Listing(to_yaml(run.recipe))]),
    ]


def facts_of_run(run: RunRecord) -> list[Fact]:
    """For the head of the page."""
    found = [Fact(stage.name, stage.state, _position(stage)) for stage in run.stages]
    if run.evaluation:
        for what, name in (("Accuracy, all images", "all"), ("Accuracy, mean of classes", "mean_class")):
            value, interval = _top1(run.evaluation, name)
            found.append(Fact(what, value, f"95 % interval {interval}"))
        calibration = run.evaluation["calibration"]
        found.append(Fact("Calibration error", _percent(calibration["ece"]), "expected, over 15 bins"))
        if calibration.get("pdc") is not None:
            found.append(Fact("PDC", f"{calibration['pdc']:.2f}", "0: classes are predicted as often as they occur"))
    seconds = sum(training_seconds(stage.lines) for stage in run.stages)
    if seconds:
        found.append(Fact("Time in steps", _duration(seconds), "without start, evaluation and saving"))
    return found


def _position(stage: StageRecord) -> str:
    status = stage.status or {}
    step, total, why = status.get("step"), status.get("total_steps"), str(status.get("why") or "")
    at = f"step {step:,} of {total:,}" if step is not None and total is not None else ""
    return ": ".join(part for part in (at, visible(why) if why else "") if part)


# --- curves ---


def _curves(run: RunRecord) -> RunSection:
    panels = [panel for stage in run.stages for panel in _stage_panels(stage)]
    text = f"At most {MAX_POINTS} points of a curve are shown, evenly spaced; metrics.jsonl has every line."
    if not panels:
        return RunSection("curves", "Loss, learning rate, accuracy", missing="No step has been logged yet.")
    blocks = [Picture(png_uri(partial(draw_panels, [panel])), caption_of(panel), _values(panel)) for panel in panels]
    return RunSection("curves", "Loss, learning rate, accuracy", text, blocks=blocks)


def _stage_panels(stage: StageRecord) -> Iterator[Panel]:
    title = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}[stage.name]
    for name, label in (("loss", "loss"), ("lr", "learning rate")):
        points = [(line.epoch, getattr(line, name)) for line in stage.lines]
        if drawn := _series(label, 0, points):
            yield Panel(f"{stage.name}-{name}", f"{title}: {label}", "epoch", label, [drawn])
    if len(stage.evaluations) < 2:  # one evaluation is no curve: it is in the tables
        return
    accuracies = []
    for number, group in enumerate(("all", "many", "medium", "few")):
        found = [(line.epoch, getattr(line, f"top1_{group}")) for line in stage.evaluations]
        if drawn := _series(group, number, [(x, None if y is None else 100 * y) for x, y in found]):
            accuracies.append(drawn)
    if accuracies:
        yield Panel(f"{stage.name}-top1", f"{title}: evaluations", "epoch", "top-1 accuracy (%)", accuracies)


def _series(label: str, colour: int, points: Sequence[tuple[float | None, float | None]]) -> Series | None:
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not known:
        return None
    places = range(min(len(known), MAX_POINTS))
    kept = [known[k * (len(known) - 1) // max(len(places) - 1, 1)] for k in places]
    return Series(label, colour, [x for x, _ in kept], [y for _, y in kept], [label] * len(kept), joined=True)


def caption_of(panel: Panel) -> str:
    """The curves in words."""
    said = []
    only = len(panel.series) == 1
    for of in panel.series:
        points = list(zip(of.y, of.x, strict=True))
        (low, low_at), (high, high_at) = min(points), max(points)
        label = "" if only else f"{of.label} "
        said.append(
            f"{label}from {short(of.y[0])} at epoch {short(of.x[0])} to {short(of.y[-1])} at epoch "
            f"{short(of.x[-1])}; lowest {short(low)} at {short(low_at)}, highest {short(high)} at {short(high_at)}"
        )
    return f"{panel.title}{' ' if only else ': '}{'. '.join(said)}."


def _values(panel: Panel) -> RunTable:
    heads = [("series", False), ("epoch", True), (panel.y_label, True)]
    rows = [[of.label, short(x), short(y)] for of in panel.series for x, y in zip(of.x, of.y, strict=True)]
    return RunTable(f"Values: {panel.title}", heads, rows)


# --- evaluation ---


def _evaluation(run: RunRecord) -> list[RunSection]:
    titles = {"groups": "Accuracy by group", "classes": "Accuracy by class", "confusion": "Confusion",
              "calibration": "Calibration"}  # fmt: skip
    report = run.evaluation
    if report is None:
        why = "The final evaluation has not been written yet."
        if "finetune" not in run.recipe.stage_names:
            why = "The run has no fine-tuning, so no classifier is evaluated."
        elif not run.recipe.data.val:
            why = "The recipe has no data.val, so nothing is evaluated."
        return [RunSection(id_, title, missing=why) for id_, title in titles.items()]
    names = run.class_names
    rows = class_rows(report, names)
    return [
        _groups(report, titles["groups"]),
        RunSection(
            "classes",
            titles["classes"],
            "By training images, the largest first. Intervals are Wilson's, 95 %.",
            blocks=[
                Picture(
                    png_uri(lambda to: plots.classes_by_frequency(rows, to)), "Accuracy of each class, see the table."
                ),
                _class_table(rows),
            ],
        ),
        _confusion(report, names, titles["confusion"]),
        _calibration(report, titles["calibration"]),
    ]


def _groups(report: dict[str, Any], title: str) -> RunSection:
    rows = []
    for name in GROUPS:
        classes = _classes_of(report, name)
        value, interval = _top1(report, name)
        label = {"all": "all images", "mean_class": "all classes, mean"}.get(name, f"{name}-shot classes, mean")
        images = sum(c["images"] for c in classes)
        trained = sum(c["train_images"] for c in classes)
        top5 = _percent((report.get("top5") or {}).get(name))
        rows.append([label, f"{len(classes):,}", f"{trained:,}", f"{images:,}", value, interval, top5])
    heads = [("", False), ("classes", True), ("training images", True), ("evaluation images", True), ("top-1", True),
             ("95 % interval", True), ("top-5", True)]  # fmt: skip
    text = "The interval is of the evaluation images alone: another seed of the training is not in it."
    return RunSection("groups", title, text, blocks=[RunTable("Top-1 and top-5 accuracy", heads, rows)])


def _classes_of(report: dict[str, Any], group: str) -> list[dict[str, Any]]:
    return [one for one in report["per_class"] if group in ("all", "mean_class", one["group"])]


def _top1(report: dict[str, Any], group: str) -> tuple[str, str]:
    """(the accuracy, its interval), as text."""
    classes = [one for one in _classes_of(report, group) if one["images"] and one["top1"] is not None]
    images = [int(one["images"]) for one in classes]
    right = [one["top1"] * one["images"] for one in classes]
    interval = wilson(sum(right), sum(images)) if group == "all" else of_mean(right, images)
    return _percent(report["top1"].get(group)), _range(interval)


def _class_table(rows: Sequence[Any]) -> RunTable:
    heads = [("class", False), ("group", False), ("training images", True), ("evaluation images", True),
             ("top-1", True), ("95 % interval", True), ("top-5", True), ("most often taken for", False)]  # fmt: skip
    cells = []
    for row in sorted(rows, key=lambda row: (-row.train_images, row.number)):
        interval = wilson((row.top1 or 0.0) * row.images, row.images)
        other = f"{row.confused_with_name} ({_percent(row.confused_share)})" if row.confused_with_name else "–"
        cells.append([row.name, row.group, f"{row.train_images:,}", f"{row.images:,}", _percent(row.top1),
                      _range(interval), _percent(row.top5), other])  # fmt: skip
    return RunTable("Classes", heads, cells)


def _confusion(report: dict[str, Any], names: list[str], title: str) -> RunSection:
    matrix = report["confusion"]
    if matrix is None:
        return RunSection("confusion", title, missing="With more than 1,000 classes the report has no matrix.")
    pairs = [(matrix[t][p] / max(sum(matrix[t]), 1), matrix[t][p], t, p)
             for t in range(len(names)) for p in range(len(names)) if t != p and matrix[t][p]]  # fmt: skip
    pairs.sort(key=lambda pair: (-pair[0], -pair[1], pair[2:]))
    rows = [[names[t], names[p], f"{count:,}", _percent(share)] for share, count, t, p in pairs[:MAX_PAIRS]]
    heads = [("true class", False), ("taken for", False), ("images", True), ("share of the class", True)]
    shown = f"the {MAX_PAIRS} with the largest share" if len(pairs) > MAX_PAIRS else "all"
    blocks: list[RunTable | Picture | Listing] = [
        Picture(png_uri(lambda to: plots.confusion(report, names, to)), "Shares of each true class, see the tables."),
        RunTable(f"Pairs of classes, {shown} of {len(pairs):,}", heads, rows),
    ]
    if len(names) <= MATRIX_CLASSES:
        head = [("true class", False), *((name, True) for name in names)]
        cells = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, matrix, strict=True)]
        blocks.append(RunTable("Images by true class (row) and predicted class (column)", head, cells))
    return RunSection("confusion", title, blocks=blocks)


def _calibration(report: dict[str, Any], title: str) -> RunSection:
    fitted = report.get("temperature")
    panels = {"as trained": report["calibration"]}
    if isinstance(fitted, dict) and "before" in fitted:
        panels = {"T = 1": fitted["before"], f"T = {fitted['temperature']:.3f}": fitted["after"]}
    heads = [("", False), ("confidence from", True), ("to", True), ("images", True), ("mean confidence", True),
             ("accuracy", True)]  # fmt: skip
    rows = [
        [
            name,
            f"{b['from']:.2f}",
            f"{b['to']:.2f}",
            f"{b['images']:,}",
            _percent(b["confidence"]),
            _percent(b["accuracy"]),
        ]
        for name, panel in panels.items()
        for b in panel["bins"]
        if b["images"]
    ]
    errors = ", ".join(
        f"{_percent(panel['ece'])} {'at ' if len(panels) > 1 else ''}{name}" for name, panel in panels.items()
    )
    text = f"Expected calibration error: {errors}."
    if fitted and len(panels) > 1:
        text += (
            f" The temperature is fitted on one half of the evaluation images ({fitted['fitted_on']:,}); both figures "
            "are of the other half."
        )
    return RunSection(
        "calibration",
        title,
        text,
        blocks=[
            Picture(png_uri(lambda to: plots.reliability(panels, to)), "Accuracy by confidence, see the table."),
            RunTable("Bins of confidence", heads, rows),
        ],
    )


# --- the rest ---


def _reconstructions(run: RunRecord) -> RunSection:
    title = "Reconstructions"
    stage = next((stage for stage in run.stages if stage.name == "pretrain"), None)
    if stage is None:
        return RunSection("reconstructions", title, missing="The run has no pretraining.")
    if not stage.pictures:
        return RunSection("reconstructions", title, missing="No picture has been saved yet.")
    newest = stage.pictures[-1]
    try:
        uri = small_uri(newest, max_bytes=PICTURE_BYTES)
    except (OSError, ValueError) as error:
        return RunSection("reconstructions", title, missing=f"{newest.name} cannot be read: {visible(str(error))}")
    alt = f"Images, masked images and their reconstructions ({newest.name})"
    return RunSection("reconstructions", title, "Original, masked and reconstructed.", blocks=[Picture(uri, alt)])


def _speed(run: RunRecord) -> RunSection:
    heads = [("stage", False), ("images/s", True), ("step", True), ("wait for data", True), ("MFU", True),
             ("peak memory", True), ("ranks", True), ("time in steps", True), ("device hours", True),
             ("model FLOPs", True)]  # fmt: skip
    rows = [_speed_row(run, stage) for stage in run.stages if stage.lines]
    if not rows:
        return RunSection("speed", "Speed and cost", missing="No step has been logged yet.")
    text = (
        "Medians over the lines of metrics.jsonl. Time in steps is without start, evaluation and saving; device hours "
        "are that time on every rank; FLOPs are those of the model, forward and backward, by formula."
    )
    return RunSection("speed", "Speed and cost", text, blocks=[RunTable("Stages", heads, rows)])


def _speed_row(run: RunRecord, stage: StageRecord) -> list[str]:
    lines, last = stage.lines, stage.lines[-1]
    seconds = training_seconds(lines)
    waits = sum((line.data_wait_s or 0) for line in lines) / max(sum((line.step_s or 0) for line in lines), 1e-9)
    images = last.step * run.recipe.stage(stage.name).global_batch
    num_classes = len(run.class_names)
    flops = images * stage_flops(run.recipe, stage.name, num_classes=num_classes or 1).train
    return [
        stage.name,
        _median([line.images_per_s for line in lines], short),
        _median([line.step_s for line in lines], lambda s: f"{s:.3f} s"),
        _percent(waits),
        _median([line.mfu for line in lines], _percent),
        _median([line.memory_peak_gib for line in lines], lambda gib: f"{gib:.2f} GiB"),
        str(last.world_size or "–"),
        _duration(seconds),
        f"{seconds * (last.world_size or 1) / 3600:.3g}",
        short(flops),
    ]


def _lineage(run: RunRecord) -> RunSection:
    rows = [["run directory", visible(str(run.folder))]]
    weights = (run.evaluation or {}).get("weights") or {}
    at = 0
    while isinstance(weights, dict) and weights and at < 8:  # a start from a start …
        what = "evaluated" if not at else "which started from"
        rows += [[what, f"{weights.get('stage', '?')}, {visible(str(weights.get('checkpoint', '?')))}"]]
        rows += [[label, str(weights[name])] for name, label in DIGESTS.items() if weights.get(name)]
        weights, at = weights.get("init"), at + 1
    data = (run.evaluation or {}).get("data") or {}
    rows += [[f"evaluation set, {name}", visible(str(value))] for name, value in data.items()]
    rows += [["training set", visible(run.recipe.data.train)]]
    for stage in run.stages:
        status = stage.status or {}
        kept = ", ".join(stage.checkpoints) or "none"
        rows.append([f"{stage.name}: checkpoints", kept])
        rows.append([f"{stage.name}: starts", f"{status.get('starts', 0)}; anomalous steps: {stage.num_anomalies}"])
    rows += [[f"with {name}", visible(str(version))] for name, version in (run.facts.get("versions") or {}).items()]
    heads = [("what", False), ("value", False)]
    return RunSection("lineage", "Lineage", blocks=[RunTable("Where the numbers come from", heads, rows)])


def png_uri(draw: Callable[[io.BytesIO], None]) -> str:
    """What `draw` writes, as a data URI."""
    picture = io.BytesIO()
    draw(picture)
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _range(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _median(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return show(statistics.median(known)) if known else "–"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
