"""Reconstructions of a study's runs as a table of images, each small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from livt_scale.evaluation.pictures import reconstruction_left
from livt_scale.study.report.series import values_of, varied
from livt_scale.util.outside import open_checked

TOTAL_BYTES = 2_200_000  # of all reconstructions in one page, as data URIs
WIDEST_PX, NARROWEST_PX = 640, 160
MAX_PIXELS = 50_000_000  # a picture beyond that is not one of ours


class Cell(NamedTuple):
    """One picture of the table sizes x lengths. `uri` is empty without a picture; `why` then has the reason."""

    name: str
    uri: str
    alt: str
    why: str = ""


class Grid(NamedTuple):
    """Rows of cells with their heads. originals: the images and what the models saw of them, where all cells are of the
    same; the cells then have the reconstructions alone."""

    row_axis: str
    column_axis: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    originals: Cell | None = None


def reconstructions(collected: Mapping[str, Any]) -> Grid | None:
    """The pictures side by side, the first seed's of each; None where no run has one."""
    row_axis, column_axis = [*varied(collected), "", ""][:2]
    rows, columns = (values_of(collected, axis) or [None] for axis in (row_axis, column_axis))
    chosen = {(r, c): _first(collected, {row_axis: rows[r], column_axis: columns[c]})
              for r in range(len(rows)) for c in range(len(columns))}  # fmt: skip
    paths = [Path(run["picture"]) for run in chosen.values() if run and run.get("picture")]
    if not paths:
        return None
    shared, whose = _shared_columns(paths)
    budget = TOTAL_BYTES * 3 // 4 // (len(paths) + bool(shared))  # base64 takes a third more
    cells = [[_cell(chosen[r, c], budget, left=shared) for c in range(len(columns))] for r in range(len(rows))]
    heads = [f"{row_axis} {at}".strip() if row_axis else "all runs" for at in rows]
    across = [f"{column_axis} {at}".strip() if column_axis else "picture" for at in columns]
    originals = None
    if whose is not None:
        uri = small_uri(whose, max_bytes=budget, columns=(0, shared))
        originals = Cell("", uri, "The images, and what the models saw of them")
    return Grid(row_axis, column_axis, across, list(zip(heads, cells, strict=True)), originals)


def _shared_columns(paths: Sequence[Path]) -> tuple[int, Path | None]:
    """The width (px) of the columns "original" and "masked" if all pictures have them alike, and one that has them.

    Else 0 and None.
    """
    first: tuple[Image.Image, Path] | None = None
    for path in paths if len(paths) > 1 else ():
        try:
            image = _opened(path)
        except (OSError, ValueError):
            continue  # its cell says so
        width = reconstruction_left(image.width)
        if width is None:
            return 0, None
        left = image.crop((0, 0, width, image.height))
        if first is None:
            first = left, path
        elif left.size != first[0].size or left.tobytes() != first[0].tobytes():
            return 0, None
    return (first[0].width, first[1]) if first else (0, None)


def _first(collected: Mapping[str, Any], at: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first run at this place, one with a picture if there is any."""
    here = [r for r in collected["runs"] if all(not a or r["axes"].get(a) == v for a, v in at.items())]
    return next((r for r in here if r.get("picture")), here[0] if here else None)


def _cell(run: Mapping[str, Any] | None, budget: int, *, left: int) -> Cell:
    """left: where the part begins that is this run's own, px."""
    if run is None:
        return Cell("", "", "", "not in the study")
    name = str(run["name"])
    if not run.get("picture"):
        return Cell(name, "", "", "no picture" if run["state"] == "done" else str(run["state"]))
    try:
        uri = small_uri(Path(run["picture"]), max_bytes=budget, columns=(left, None))
    except (OSError, ValueError):
        return Cell(name, "", "", "its picture cannot be read")
    what = "Reconstructions" if left else "Masked images and their reconstructions"
    return Cell(name, uri, f"{what} by the run {name}")


def small_uri(path: Path, *, max_bytes: int, columns: tuple[int, int | None] = (0, None)) -> str:
    """The picture as a data URI (WebP) of at most `max_bytes` bytes before base64, or of the narrowest width.

    columns: from and to, px, what to show of it.
    """
    image = _opened(path)
    if columns != (0, None):
        image = image.crop((columns[0], 0, columns[1] or image.width, image.height))
    width = min(WIDEST_PX, image.width)
    while True:
        height = max(1, round(image.height * width / image.width))
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, format="webp", quality=80)
        if buffer.tell() <= max_bytes or width <= NARROWEST_PX:
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        width = max(NARROWEST_PX, int(width * 0.8))


def _opened(path: Path) -> Image.Image:
    """Raises OSError and ValueError."""
    try:
        with open_checked(path, "image") as file, Image.open(file) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{path} has {opened.width} x {opened.height} pixels")
            return opened.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
