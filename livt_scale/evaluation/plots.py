"""The plots of an evaluation: reliability diagrams, accuracy of the classes by frequency, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from livt_scale.evaluation.per_class import ClassRow
from livt_scale.util.plots import GREY, PALETTE, Target, log_scale, one_line, png_figure

NAMED_CLASSES = 20  # up to this number, classes are named and each value is printed
MEAN_OVER = 40  # the line is a running mean over a fortieth of the classes
MATRIX_CELLS = 1000  # a larger confusion matrix is averaged down to this many rows
BLUE, RED = PALETTE[:2]
SHADES = {"many": "#ffffff", "medium": "#f4f4f8", "few": "#e8eaf4"}


def reliability(panels: Mapping[str, Mapping[str, Any]], path: Target) -> None:
    """Draw accuracy against confidence by bin, a panel for each name of `panels`.

    A panel holds `ece` and `bins` as `Tally.report()["calibration"]`. A bar is the bin's accuracy, the red mark its
    mean confidence: on the diagonal they are equal. Below: the share of the images in each bin.
    """
    with png_figure(path, width=3.6 * len(panels) + 0.2, height=4.4) as figure:
        grid = figure.subplots(2, len(panels), squeeze=False, sharex="col", height_ratios=[4, 1])
        for number, (name, panel) in enumerate(panels.items()):
            draw_reliability(grid[0, number], grid[1, number], one_line(name), panel)


def draw_reliability(upper: Any, lower: Any, name: str, panel: Mapping[str, Any]) -> None:
    bins = [b for b in panel["bins"] if b["images"]]
    images = sum(b["images"] for b in bins)
    ece = "no images" if panel["ece"] is None else f"ECE {100 * panel['ece']:.2f} %, {images:,} images"
    left, width = [b["from"] for b in bins], [b["to"] - b["from"] for b in bins]

    upper.set_title(f"{name}: {ece}")
    upper.bar(left, [b["accuracy"] for b in bins], width, align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
    upper.hlines([b["confidence"] for b in bins], left, [b["to"] for b in bins], color=RED, linewidth=2)
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy (red: mean confidence)")
    upper.set_box_aspect(1)

    lower.bar(left, [b["images"] / images for b in bins], width, align="edge", color=GREY, edgecolor="white")
    lower.set(xlabel="confidence", ylabel="share of images")


def classes_by_frequency(rows: Sequence[ClassRow], path: Target) -> None:
    """Draw each class's accuracy (blue) and training images (grey line, logarithmic) over its rank, the largest first.

    Up to 20 classes are bars with names; more are points with a running mean.
    """
    with png_figure(path, width=10, height=4) as figure:
        draw_classes(figure.subplots(), sorted(rows, key=lambda row: (-row.train_images, row.number)))


def draw_classes(axes: Any, ranked: Sequence[ClassRow]) -> None:
    """The classes in the order of `ranked`, on axes whose x is the rank from 0."""
    axes.set(xlim=(-0.5, len(ranked) - 0.5), ylim=(0, 1.05), ylabel="top-1 accuracy of the class (blue)")
    axes.set_xlabel(f"classes by training images, 1 to {len(ranked):,}")
    axes.grid(visible=False, axis="x")
    _shade_groups(axes, ranked)
    _draw_accuracies(axes, ranked)
    counts = axes.twinx()
    counts.plot(range(len(ranked)), [max(row.train_images, 1) for row in ranked], color=GREY)
    log_scale(counts, "y")
    counts.set_ylabel("training images (grey)")
    counts.grid(visible=False)
    if len(ranked) <= NAMED_CLASSES:
        axes.set_xticks(range(len(ranked)), [one_line(row.name) for row in ranked], rotation=45, ha="right")


def _shade_groups(axes: Any, ranked: Sequence[ClassRow]) -> None:
    """The groups as shades. They are adjacent: the classes are sorted by what decides their group."""
    for name, shade in SHADES.items():
        ranks = [k for k, row in enumerate(ranked) if row.group == name]
        if ranks:
            axes.axvspan(ranks[0] - 0.5, ranks[-1] + 0.5, color=shade, linewidth=0, zorder=0)
            axes.text((ranks[0] + ranks[-1]) / 2, 1.03, f"{name} ({len(ranks):,})", color=GREY, ha="center", va="top")


def _draw_accuracies(axes: Any, ranked: Sequence[ClassRow]) -> None:
    measured = [(k, row.top1) for k, row in enumerate(ranked) if row.top1 is not None]
    ranks, values = [k for k, _ in measured], [value for _, value in measured]
    if len(ranked) <= NAMED_CLASSES:
        bars = axes.bar(ranks, values, 0.7, color=BLUE, alpha=0.7)
        axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], fontsize=7)
        return
    axes.plot(ranks, values, ".", color=BLUE, alpha=0.4, markersize=2)
    window = max(1, len(measured) // MEAN_OVER)
    if measured:
        weights = np.full(window, 1 / window)
        axes.plot(*(np.convolve(v, weights, mode="valid") for v in (ranks, values)), color=BLUE, linewidth=1.8)


def confusion(report: Mapping[str, Any], class_names: Sequence[str], path: Target) -> None:
    """Draw `report["confusion"]` ([C, C] counts, row: true class, column: predicted) as shares of each row.

    Draws nothing if the report has no matrix (it has none above `metrics.MAX_CONFUSION_CLASSES`).
    """
    if report["confusion"] is None:
        return
    counts = np.asarray(report["confusion"], dtype=np.float64)
    assert counts.shape == (len(class_names), len(class_names)), counts.shape
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a class without images has an empty row

    is_named = len(shares) <= NAMED_CLASSES
    side = 1.6 + 0.33 * len(shares) if is_named else 9.5
    with png_figure(path, width=side, height=side) as figure:
        axes = figure.subplots()
        # small shares are where the mistakes are: colour by the square root
        axes.imshow(np.sqrt(averaged(shares)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title="% of the true class", xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        if is_named:
            _name_cells(axes, shares, class_names)


def averaged(shares: np.ndarray) -> np.ndarray:
    """[C, C] -> at most [MATRIX_CELLS, MATRIX_CELLS]: the predicted shares of groups of adjacent classes."""
    fold = -(-len(shares) // MATRIX_CELLS)
    pad = -len(shares) % fold
    padded = np.pad(shares, ((0, pad), (0, pad)))
    side = len(padded) // fold
    # [side * fold, side * fold] -> [side, fold, side, fold] -> [side, side]
    return padded.reshape(side, fold, side, fold).sum(axis=(1, 3)) / fold


def _name_cells(axes: Any, shares: np.ndarray, class_names: Sequence[str]) -> None:
    names, ticks = [one_line(name) for name in class_names], range(len(class_names))
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    for row, column in zip(*np.nonzero(shares), strict=True):
        share = shares[row, column]
        ink = "white" if share > 0.3 else "black"
        axes.text(column, row, f"{100 * share:.0f}", color=ink, ha="center", va="center")
