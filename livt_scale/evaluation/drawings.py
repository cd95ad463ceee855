"""The two pictures of a report, as PNG: reliability diagrams, and accuracy of the classes sorted by their frequency.

Drawn with Pillow like the other pictures of a run (`train.pictures` says why). The same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from livt_scale.evaluation.per_class import ClassRow
from livt_scale.evaluation.pictures import NUMBERED_CLASSES, font_of, paste_turned, save_png, spelt

PLOT_PX = 320  # side of a reliability diagram, height of the class picture
WIDTH_PX = 1000  # of the class picture, whatever the number of classes
MEAN_OVER = 40  # the line is a running mean over a fortieth of the classes
BLUE, RED, GREY, PALE = (33, 102, 172), (178, 24, 43), (90, 90, 90), (225, 225, 225)
BAND = {"many": (255, 255, 255), "medium": (244, 244, 248), "few": (232, 234, 244)}
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def reliability(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against confidence by bin, a panel for each name of `panels`.

    A panel holds `ece` and `bins` as `Tally.report()["calibration"]`. A bar is the bin's accuracy, the red mark its
    mean confidence: on the diagonal they are one. Below: the share of the images in each bin.
    """
    margin, below = 56, 90
    step = PLOT_PX + margin
    picture = Image.new("RGB", (len(panels) * step + 24, PLOT_PX + below + 76), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, panel) in enumerate(panels.items()):
        left, top = margin + number * step, 40
        images = sum(b["images"] for b in panel["bins"])
        ece = "no images" if panel["ece"] is None else f"ECE {100 * panel['ece']:.2f} %, {images:,} images"
        draw.text((left, 4), spelt(name), fill="black", font=font_of(13))
        draw.text((left, 20), ece, fill=GREY, font=font_of(12))
        _axes(picture, draw, left, top, PLOT_PX, "accuracy")
        draw.line((left, top + PLOT_PX, left + PLOT_PX, top), fill=GREY)
        for b in panel["bins"]:
            _bin(draw, b, left, top, images)
        centre = left + PLOT_PX // 2
        for tick in (0, 1):
            x = left + tick * PLOT_PX
            draw.text((x, top + PLOT_PX + below + 4), f"{100 * tick} %", fill="black", font=font_of(11), anchor="ma")
        draw.text((centre, top + PLOT_PX + below + 12), "confidence", fill="black", font=font_of(12), anchor="ma")
        draw.text((left, top + PLOT_PX + 14), "share of images", fill=GREY, font=font_of(11))
    save_png(picture, path)


def classes_by_frequency(rows: Sequence[ClassRow], path: Path) -> None:
    """Draw each class's accuracy (blue) and training images (grey line, logarithmic) over its rank, the largest first.

    Up to 20 classes are bars with names; more are points with a running mean, any number on one width.
    """
    ranked = sorted(rows, key=lambda row: (-row.train_images, row.number))
    names = [spelt(row.name) for row in ranked] if len(ranked) <= NUMBERED_CLASSES else []
    below = 40 + max((int(font_of(12).getlength(name)) for name in names), default=0)
    left, top = 56, 40
    picture = Image.new("RGB", (left + WIDTH_PX + 64, top + PLOT_PX + below), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 4), "top-1 accuracy of each class (blue)", fill=BLUE, font=font_of(13))
    _bands(draw, ranked, left, top)
    _axes(picture, draw, left, top, WIDTH_PX, "top-1 accuracy")
    _accuracies(draw, ranked, left, top)
    _counts(draw, ranked, left, top)
    for k, name in enumerate(names):
        height = int(font_of(12).getlength(name))
        paste_turned(picture, name, font_of(12), right=_x(k, names, left) + 8, bottom=top + PLOT_PX + 10 + height)
    label = f"classes by training images, 1 to {len(ranked):,}"
    draw.text((left + WIDTH_PX // 2, top + PLOT_PX + below - 20), label, fill="black", font=font_of(12), anchor="ma")
    save_png(picture, path)


def _axes(picture: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, width: int, label: str) -> None:
    for tick in TICKS:
        y = top + round((1 - tick) * PLOT_PX)
        draw.line((left - 4, y, left, y), fill="black")
        draw.text((left - 7, y), f"{100 * tick:.0f} %", fill="black", font=font_of(11), anchor="rm")
    draw.rectangle((left, top, left + width, top + PLOT_PX), outline="black")
    paste_turned(picture, label, font_of(12), right=left - 38, bottom=top + PLOT_PX // 2 + 40)


def _bin(draw: ImageDraw.ImageDraw, b: Mapping[str, Any], left: int, top: int, images: int) -> None:
    if not b["images"]:
        return
    x0, x1 = left + round(b["from"] * PLOT_PX) + 1, left + round(b["to"] * PLOT_PX) - 1
    foot, base = top + PLOT_PX, top + PLOT_PX + 90
    draw.rectangle((x0, foot - round(b["accuracy"] * PLOT_PX), x1, foot), fill=BLUE)
    y = foot - round(b["confidence"] * PLOT_PX)
    draw.line((x0, y, x1, y), fill=RED, width=3)
    draw.rectangle((x0, base - max(1, round(b["images"] / images * 60)), x1, base), fill=GREY)


def _x(rank: float, ranked: Sequence[Any], left: int) -> int:
    """The middle of a class's place."""
    return left + round((rank + 0.5) / len(ranked) * WIDTH_PX)


def _bands(draw: ImageDraw.ImageDraw, ranked: Sequence[ClassRow], left: int, top: int) -> None:
    """The groups as shades; they lie side by side, for the classes are sorted by what decides their group."""
    for name, shade in BAND.items():
        ranks = [k for k, row in enumerate(ranked) if row.group == name]
        if ranks:
            x0, x1 = (left + round(k / len(ranked) * WIDTH_PX) for k in (ranks[0], ranks[-1] + 1))
            draw.rectangle((x0, top, x1, top + PLOT_PX), fill=shade)
            text = f"{name} ({len(ranks):,})" if x1 - x0 > 90 else name
            if x1 - x0 > 40:
                draw.text(((x0 + x1) // 2, top + 4), text, fill=GREY, font=font_of(12), anchor="ma")


def _counts(draw: ImageDraw.ImageDraw, ranked: Sequence[ClassRow], left: int, top: int) -> None:
    """Training images on a logarithmic axis at the right, from 1 to the largest class."""
    largest = max(2, max((row.train_images for row in ranked), default=2))
    heights = np.log([max(row.train_images, 1) for row in ranked]) / np.log(largest)
    points = [(_x(k, ranked, left), top + round((1 - h) * PLOT_PX)) for k, h in enumerate(heights)]
    draw.line(points, fill=GREY, width=2)
    right = left + WIDTH_PX
    for value in (1, *(10**k for k in range(1, 9) if 10**k < 0.7 * largest), largest):
        y = top + round((1 - np.log(value) / np.log(largest)) * PLOT_PX)
        draw.text((right + 6, y), f"{value:,}", fill=GREY, font=font_of(11), anchor="lm")
    draw.text((right, 4), "training images (grey, log)", fill=GREY, font=font_of(12), anchor="ra")


def _accuracies(draw: ImageDraw.ImageDraw, ranked: Sequence[ClassRow], left: int, top: int) -> None:
    seen = [(k, row.top1) for k, row in enumerate(ranked) if row.top1 is not None]
    foot, half = top + PLOT_PX, max(1, round(WIDTH_PX / max(1, len(ranked)) * 0.35))
    few = len(ranked) <= NUMBERED_CLASSES
    for k, value in seen:
        x, y = _x(k, ranked, left), foot - round(value * PLOT_PX)
        if few:
            draw.rectangle((x - half, y, x + half, foot), outline=BLUE, fill=(146, 197, 222))
            draw.text((x, y - 3), f"{100 * value:.0f}", fill=BLUE, font=font_of(11), anchor="mb")
        else:
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(146, 197, 222))
    if few or not seen:
        return
    window = max(1, len(seen) // MEAN_OVER)
    ranks, values = np.array([k for k, _ in seen], dtype=float), np.array([value for _, value in seen])
    smooth = [np.convolve(v, np.full(window, 1 / window), mode="valid") for v in (ranks, values)]
    line = [(_x(k, ranked, left), foot - round(v * PLOT_PX)) for k, v in zip(*smooth, strict=True)]
    draw.line(line, fill=BLUE, width=3)
