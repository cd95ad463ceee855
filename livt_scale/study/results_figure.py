"""A claim's results as a picture: each arm with its seeds and its deviation; by epoch or by size where that is asked.

The same results give the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from livt_scale.study.results_page import COLUMNS, UNITS
from livt_scale.util.plots import GREY, PALETTE, log_scale, png_figure

MEASURES = ("top1_all", "reconstruction_loss")  # the first that was measured is drawn


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of `result`, as `collect` gives it, to `path` (PNG)."""
    measure = next((m for m in MEASURES if any(m in of for of in result["values"].values())), MEASURES[0])
    scale = 100 if measure.startswith("top1") else 1
    values = {arm: [scale * v for v in of[measure].values()] for arm, of in result["values"].items() if measure in of}
    by_seed = {arm: list(of.values()) for arm, of in result["curves"].items()}
    curves = {arm: lines for arm, lines in by_seed.items() if any(len(line) > 1 for line in lines)}
    by_size = len({result["weights"][arm] for arm in values}) > 1
    beside = bool(curves) or by_size
    label = COLUMNS[measure] if scale == 1 else f"top-1 %, {COLUMNS[measure]}"
    with png_figure(path, width=9 if beside else 5, height=0.35 * max(len(values), 6) + 1.2) as figure:
        axes = figure.subplots(1, 2 if beside else 1, squeeze=False)[0]
        _bars(axes[0], values, label=label)
        if by_size:
            _sizes(axes[1], values, result["weights"], label=label)
        elif curves:
            _epochs(axes[1], curves)


def draw_crossings(found: Mapping[str, Any], path: Path) -> None:
    """The gain of the two stages in each setting, as `crossings_of` gives it, with its interval, and 0, to `path`."""
    axis = next((name for name in UNITS if _varies(found, name)), "num_images")
    with png_figure(path, width=9, height=3.2) as figure:
        for panel, (measure, name) in zip(
            figure.subplots(1, 2), (("top1_all", "all"), ("top1_few", "few")), strict=True
        ):
            lines: dict[str, list[Mapping[str, Any]]] = {}
            for row in found["settings"]:
                rest = [f"{row[n]:,} {words}" for n, words in UNITS.items() if n != axis and _varies(found, n)]
                if measure in row:
                    lines.setdefault(", ".join(rest) or name, []).append(row)
            for label, rows in lines.items():
                rows = sorted(rows, key=lambda row: row[axis])
                gains = [100 * row[measure]["gain"] for row in rows]
                known = [row[measure]["low"] is not None for row in rows]
                half = [
                    100 * (r[measure]["high"] - r[measure]["gain"]) if k else 0
                    for r, k in zip(rows, known, strict=True)
                ]
                panel.errorbar([row[axis] for row in rows], gains, yerr=half, fmt="o-", capsize=3, label=label)
            panel.axhline(0, color=GREY, linewidth=0.8)
            log_scale(panel, "x", ticks=sorted({row[axis] for row in found["settings"]}))
            panel.set(xlabel=UNITS[axis], ylabel=f"gain over labels alone, points of top-1, {name}")
            if lines:
                panel.legend()


def _varies(found: Mapping[str, Any], name: str) -> bool:
    return len({row[name] for row in found["settings"]}) > 1


def _bars(axes: Any, values: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Mean and deviation as a bar with a whisker, the seeds as dots."""
    for row, (arm, of) in enumerate(reversed(list(values.items()))):
        spread = statistics.stdev(of) if len(of) > 1 else 0
        axes.barh(row, statistics.fmean(of), xerr=spread, color=PALETTE[5], alpha=0.6, ecolor=GREY, capsize=3)
        axes.plot(of, [row] * len(of), "o", color=PALETTE[0], markersize=3, label=arm)
    axes.set_yticks(range(len(values)), list(reversed(list(values))))
    axes.set_xlabel(label)
    every = [v for of in values.values() for v in of]
    if every:  # differences are small beside the values: the axis starts near the lowest
        room = 0.3 * (max(every) - min(every)) or 0.1 * abs(max(every)) or 1
        axes.set_xlim(min(every) - room, max(every) + room)


def _epochs(axes: Any, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Mean over seeds of the accuracy by epoch, its deviation as a band."""
    for arm, lines in curves.items():
        length = max(map(len, lines))
        by_epoch = list(zip(*(line for line in lines if len(line) == length), strict=True))
        epochs = range(1, length + 1)
        mean = [100 * statistics.fmean(each) for each in by_epoch]
        spread = [100 * statistics.stdev(each) if len(each) > 1 else 0 for each in by_epoch]
        (line,) = axes.plot(epochs, mean, label=arm)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("evaluations, epoch by epoch of fine-tuning")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("top-1 %, all")
    axes.legend()


def _sizes(axes: Any, values: Mapping[str, Sequence[float]], weights: Mapping[str, int], *, label: str) -> None:
    """Each arm against its number of weights."""
    for arm, of in values.items():
        spread = statistics.stdev(of) if len(of) > 1 else 0
        axes.errorbar(weights[arm] / 1e6, statistics.fmean(of), yerr=spread, fmt="o", capsize=3, label=arm)
    log_scale(axes, "x")
    axes.set_xlabel("weights of the classifier, millions")
    axes.set_ylabel(label)
    axes.legend()
