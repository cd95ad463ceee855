"""The panels of a report as Bokeh plots, and what they need inside the page: the library itself, inline.

Bokeh (BSD-3) brings its script in the wheel, so a page needs no network, and works from a file. Colours of text and
grid are left to the page's own script: they follow its light, dark or print style.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from livt_scale.study.report.series import Panel, Series, short, ticks_of
from livt_scale.util.errors import UsageError
from livt_scale.util.plots import GREY, PALETTE

MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
DASHES = ("solid", "dashed", "dotted", "dotdash")
HEIGHT_PX = 300
DODGE = 0.22  # between the groups at one category


def library() -> str:
    """Bokeh's script. Raises UsageError where the package is not installed."""
    try:
        import bokeh
    except ImportError as error:
        raise UsageError(
            "a report needs Bokeh, which is not installed", remedy="install it: pip install bokeh"
        ) from error
    return (Path(bokeh.__file__).parent / "server/static/js/bokeh.min.js").read_text(encoding="utf-8")


def item(panel: Panel) -> dict[str, Any]:
    """The plot as `Bokeh.embed.embed_item` takes it."""
    from bokeh.embed import json_item

    return dict(json_item(_figure(panel)))


def as_script_data(items: dict[str, Any]) -> str:
    """JSON that is safe inside a <script> element: nothing in it ends the element."""
    text = json.dumps(items, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(panel: Panel) -> Any:
    from bokeh.models import BoxZoomTool, HoverTool, PanTool, ResetTool, WheelZoomTool
    from bokeh.plotting import figure

    wheel = WheelZoomTool(modifiers="ctrl")  # a plain wheel scrolls the page
    box = BoxZoomTool()
    plot = figure(
        height=HEIGHT_PX,
        sizing_mode="stretch_width",
        x_axis_type="log" if panel.x_log else "linear",
        tools=[PanTool(), box, wheel, ResetTool()],
        active_drag=box,
        active_scroll=wheel,
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = False
    plot.xaxis.axis_label, plot.yaxis.axis_label = plain(panel.x_label), panel.y_label
    if panel.y_range:
        plot.y_range.start, plot.y_range.end = panel.y_range
    _axes(plot, panel)
    if panel.band:
        _draw_band(plot, panel)
    drawn = [_draw(plot, panel, series) for series in panel.series]
    tips = [("run", "@name"), (plain(panel.x_label), "@said_x"), (panel.y_label, "@said_y")]
    plot.add_tools(HoverTool(tooltips=tips, renderers=drawn))
    _legend(plot, panel)
    return plot


def _axes(plot: Any, panel: Panel) -> None:
    from bokeh.models import FixedTicker

    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "13px", "12px"
        axis.minor_tick_line_color = None
    plot.xgrid.grid_line_color = None
    if panel.categories:
        plot.xaxis.ticker = FixedTicker(ticks=list(range(len(panel.categories))))
        plot.xaxis.major_label_overrides = {k: plain(name) for k, name in enumerate(panel.categories)}
        plot.x_range.start, plot.x_range.end = -0.6, len(panel.categories) - 0.4
    elif panel.x_log:
        ticks = ticks_of(panel)
        plot.xaxis.ticker = FixedTicker(ticks=ticks)
        plot.xaxis.major_label_overrides = {tick: short(tick) for tick in ticks}


def plain(text: str) -> str:
    """Text that Bokeh shows verbatim: it would fetch a typesetter for text between double dollars."""
    return text.replace("$$", "$\u200b$").replace("\\[", "\\\u200b[").replace("\\(", "\\\u200b(")


def _draw(plot: Any, panel: Panel, series: Series) -> Any:
    from bokeh.models import ColumnDataSource

    colour = PALETTE[series.colour % len(PALETTE)]
    x = series.x
    said = [short(v) for v in x]
    if panel.categories:
        x = [at + DODGE * (series.colour - (len(panel.series) - 1) / 2) for at in x]
        said = [panel.categories[round(at)] for at in series.x]
    said_y = [short(v) for v in series.y]
    data = ColumnDataSource({"x": x, "y": series.y, "name": series.names, "said_x": said, "said_y": said_y})
    if series.joined:
        dash = DASHES[series.colour // len(PALETTE) % len(DASHES)]
        plot.line("x", "y", source=data, color=colour, line_width=2, line_dash=dash, legend_label=plain(series.label))
    return plot.scatter(
        "x",
        "y",
        source=data,
        marker=MARKERS[series.colour % len(MARKERS)],
        size=5 if series.joined else 10,
        line_color=colour,
        line_width=1.6,
        fill_color=None if series.hollow else colour,
        fill_alpha=0.75,
        legend_label=plain(series.label),
    )


def _draw_band(plot: Any, panel: Panel) -> None:
    band = panel.band
    assert band is not None
    plot.varea(band.x, band.low, band.high, fill_color=GREY, fill_alpha=0.25, legend_label="fitted law")
    plot.line(band.x, band.mid, color=GREY, line_width=2.5, legend_label="fitted law")


def _legend(plot: Any, panel: Panel) -> None:
    """Below the plot, where it hides no point; a click hides or shows its series."""
    legend = plot.legend[0] if panel.series else None
    if legend is None:
        return
    plot.add_layout(legend, "below")
    legend.click_policy = "hide"
    legend.orientation = "horizontal"
    legend.ncols = 2  # three do not fit on a telephone
    legend.border_line_color = legend.background_fill_color = None
    legend.label_text_font_size = "12px"
    legend.padding, legend.margin, legend.spacing = 2, 4, 6
