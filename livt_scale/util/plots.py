"""Plots as PNG: one style for all, drawn by matplotlib without a display, the same figure giving the same bytes.

    with png_figure(path, width=5, height=3) as figure:      # inches; path appears when the block ends without an error
        axes = figure.subplots()
        axes.plot(x, y)

A BytesIO instead of the path takes the bytes, for a page.

Text is drawn as it is, never as a formula, so class names may hold a dollar sign. Nothing of matplotlib's global state
changes, and it is imported only when something is drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from livt_scale.util.atomic import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours without black and yellow: distinct for the colour-blind, visible on white and on near black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "h")
GREY = "#707880"  # what is not data: a law, a diagonal, a reference
DPI = 110
Target = Path | io.BytesIO
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,
}


@contextmanager
def png_figure(
    path: Target, *, width: float, height: float, dpi: int = DPI, made_by: str | None = None
) -> Iterator[Figure]:
    """A new figure of `width` x `height` inches, written to `path` at the end of the block.

    made_by: the command, kept in the file, by which it recognises what it wrote.
    """
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=PALETTE)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        data = io.BytesIO()
        with warnings.catch_warnings():  # a class name in a script that the font does not have is drawn as boxes
            warnings.filterwarnings("ignore", message=".*Glyph .* missing from")
            figure.savefig(data, format="png", dpi=dpi, metadata={"Software": made_by})
    if isinstance(path, Path):
        write_atomic(path, data.getvalue())
    else:
        path.write(data.getvalue())


def log_scale(axes: Any, which: Literal["x", "y"], *, ticks: Sequence[float] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers as labels. ticks: where they are; None: at the powers of 10."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    if ticks is not None:
        axis.set_ticks(ticks)
        axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def one_line(text: str, *, max_chars: int = 24) -> str:
    """Untrusted text as one line of a plot: control characters and line ends become spaces, cut at `max_chars`."""
    plain = "".join(c if c.isprintable() else " " for c in text).strip() or "?"
    return plain if len(plain) <= max_chars else plain[: max_chars - 1] + "…"
