"""The panels of a section as one PNG for a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from livt_scale.study.report.series import Panel, Series, short, ticks_of
from livt_scale.util.errors import UsageError
from livt_scale.util.plots import GREY, MARKERS, PALETTE, Target, png_figure

DPI = 150


def draw_panels(panels: Sequence[Panel], path: Target) -> None:
    """Write the panels of one section to `path`. The same panels give the same bytes."""
    if not panels:
        raise UsageError("there is nothing to draw")
    across = min(2 if len(panels) < 5 else 3, len(panels))
    down = math.ceil(len(panels) / across)
    with png_figure(path, width=4.4 * across, height=3.3 * down, dpi=DPI) as figure:
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()


def _draw(axes: Any, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(visible=False, axis="x")
    if panel.x_log:
        every = [x for of in panel.series for x in of.x]
        low, high = min(every) / 1.15, max(every) * 1.15
        ticks = [tick for tick in ticks_of(panel) if low <= tick <= high]
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
    if panel.categories:
        axes.set_xticks(range(len(panel.categories)), panel.categories)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.band:
        axes.fill_between(panel.band.x, panel.band.low, panel.band.high, color=GREY, alpha=0.25, linewidth=0)
        axes.plot(panel.band.x, panel.band.mid, color=GREY, label="fitted law")
    labelled: set[str] = set()
    for series in panel.series:
        _draw_series(axes, panel, series, label=None if series.label in labelled else series.label)
        labelled.add(series.label)
    if panel.band or len(labelled) > 1:  # a single series is what the title says
        axes.legend()


def _draw_series(axes: Any, panel: Panel, series: Series, *, label: str | None) -> None:
    x = series.x
    if panel.categories:
        x = [at + 0.22 * (series.colour - (len(panel.series) - 1) / 2) for at in x]
    axes.plot(
        x,
        series.y,
        label=label,
        color=PALETTE[series.colour % len(PALETTE)],
        marker=MARKERS[series.colour % len(MARKERS)],
        markersize=3 if series.joined else 5,
        markerfacecolor="none" if series.hollow else None,
        linestyle="-" if series.joined else "none",
    )
