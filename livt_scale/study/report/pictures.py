"""The pictures of a report: reconstructions made small enough for a page, and the panels as PNG for papers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from livt_scale.study.report.plots import PALETTE
from livt_scale.study.report.series import Panel, Series, short, ticks_of, values_of, varied
from livt_scale.util.errors import UsageError
from livt_scale.util.plots import new_figure, png_of

TOTAL_BYTES = 2_200_000  # of all reconstructions in one page, as data URIs
WIDEST_PX, NARROWEST_PX = 640, 160
MAX_PIXELS = 50_000_000  # a picture beyond that is not one of ours
DPI = 150
MPL_MARKERS = ("o", "s", "^", "D", "v", "h")


class Cell(NamedTuple):
    """One picture of the table sizes x lengths. uri is empty where there is none, `why` then says so."""

    name: str
    uri: str
    alt: str
    why: str = ""


class Grid(NamedTuple):
    """Rows of cells with their heads."""

    row_axis: str
    column_axis: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def reconstructions(collected: Mapping[str, Any]) -> Grid | None:
    """The pictures side by side, the first seed's of each; None where no run has one."""
    row_axis, column_axis = [*varied(collected), "", ""][:2]
    rows, columns = (values_of(collected, axis) or [None] for axis in (row_axis, column_axis))
    chosen = {(r, c): _first(collected, {row_axis: rows[r], column_axis: columns[c]})
              for r in range(len(rows)) for c in range(len(columns))}  # fmt: skip
    num = sum(1 for run in chosen.values() if run and run.get("picture"))
    if not num:
        return None
    budget = TOTAL_BYTES * 3 // 4 // num  # base64 takes a third more
    cells = [[_cell(chosen[r, c], budget) for c in range(len(columns))] for r in range(len(rows))]
    heads = [f"{row_axis} {at}".strip() if row_axis else "all runs" for at in rows]
    across = [f"{column_axis} {at}".strip() if column_axis else "picture" for at in columns]
    return Grid(row_axis, column_axis, across, list(zip(heads, cells, strict=True)))


def _first(collected: Mapping[str, Any], at: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first run at this place, one with a picture if there is any."""
    here = [r for r in collected["runs"] if all(not a or r["axes"].get(a) == v for a, v in at.items())]
    return next((r for r in here if r.get("picture")), here[0] if here else None)


def _cell(run: Mapping[str, Any] | None, budget: int) -> Cell:
    if run is None:
        return Cell("", "", "", "not in the study")
    name = str(run["name"])
    if not run.get("picture"):
        return Cell(name, "", "", "no picture" if run["state"] == "done" else str(run["state"]))
    try:
        uri = small_uri(Path(run["picture"]), max_bytes=budget)
    except (OSError, ValueError, Image.DecompressionBombError):
        return Cell(name, "", "", "its picture cannot be read")
    return Cell(name, uri, f"Masked images and their reconstructions by the run {name}")


def small_uri(path: Path, *, max_bytes: int) -> str:
    """The picture as a data URI (WebP) of at most `max_bytes` bytes before base64, or of the narrowest width."""
    with Image.open(path) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{path} has {opened.width} x {opened.height} pixels")
        image = opened.convert("RGB")
    width = min(WIDEST_PX, image.width)
    while True:
        height = max(1, round(image.height * width / image.width))
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, format="webp", quality=80)
        if buffer.tell() <= max_bytes or width <= NARROWEST_PX:
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        width = max(NARROWEST_PX, int(width * 0.8))


def png(panels: Sequence[Panel]) -> bytes:
    """The panels of one section as a picture for a paper. The same panels give the same bytes."""
    if not panels:
        raise UsageError("there is nothing to draw")
    across = min(2 if len(panels) < 5 else 3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(4.4 * across, 3.3 * down)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _paint(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return png_of(figure, dpi=DPI)


def _paint(axes: Any, panel: Panel) -> None:
    axes.set_title(plain_math(panel.title), fontsize=9, loc="left")
    axes.set_xlabel(plain_math(panel.x_label), fontsize=8)
    axes.set_ylabel(plain_math(panel.y_label), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    if panel.x_log:
        axes.set_xscale("log")
        every = [x for of in panel.series for x in of.x]
        low, high = min(every) / 1.15, max(every) * 1.15
        ticks = [tick for tick in ticks_of(panel) if low <= tick <= high]
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
    if panel.categories:
        axes.set_xticks(range(len(panel.categories)), [plain_math(name) for name in panel.categories])
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.band:
        axes.fill_between(panel.band.x, panel.band.low, panel.band.high, color="#808890", alpha=0.25, linewidth=0)
        axes.plot(panel.band.x, panel.band.mid, color="#606870", label="fitted law")
    said: set[str] = set()
    for series in panel.series:
        _points(axes, panel, series, label=None if series.label in said else series.label)
        said.add(series.label)
    axes.legend(fontsize=6.5, frameon=False)


def _points(axes: Any, panel: Panel, series: Series, *, label: str | None) -> None:
    colour = PALETTE[series.colour % len(PALETTE)]
    style: dict[str, Any] = {"color": colour, "markersize": 3 if series.joined else 5}
    style["label"] = None if label is None else plain_math(label)
    style["marker"] = MPL_MARKERS[series.colour % len(MPL_MARKERS)]
    x = series.x
    if panel.categories:
        x = [at + 0.22 * (series.colour - (len(panel.series) - 1) / 2) for at in x]
    if series.hollow:
        style["markerfacecolor"] = "none"
    axes.plot(x, series.y, linestyle="-" if series.joined else "none", linewidth=1.1, **style)


def plain_math(text: str) -> str:
    """Text that matplotlib does not set as a formula."""
    return text.replace("$", r"\$")
