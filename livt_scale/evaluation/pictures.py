"""The pictures a run leaves behind: reconstructions (pretraining) and the confusion matrix (evaluation), as PNG.

A reconstruction shows pixels as an eye expects them: the decoder predicts each patch less its mean and over its
deviation, and that is undone first (left in, the picture looks broken: facebookresearch/mae#174). Patches that the
encoder saw are shown as they are, only masked ones are predicted. The same input gives the same bytes.

Drawn with Pillow: matplotlib would write a font cache into the home folder, and warn about names it cannot spell.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from livt_scale.util.atomic import write_atomic

PANEL_PX = 112  # an image is enlarged by a whole factor until it is at least so wide
GAP_PX = 4
MASKED_GREY = 0.35  # of a masked patch, between black and white and rare enough in images to be told apart
NUMBERED_CLASSES = 20  # up to so many classes the confusion matrix has names and numbers
MATRIX_PX = 1000  # a larger matrix is averaged down to about this size


def reconstructions(
    images: torch.Tensor,
    made: torch.Tensor,
    is_masked: torch.Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """Draw what a masked autoencoder made of `images`: a row an image, original | masked | reconstruction.

    images uint8 [n, C, H, W] on any device. made [n, C, H, W], is_masked bool [n, num_patches]: what
    `MaskedAutoencoder.reconstruct` gave for them. mean, std: of the pixels in [0, 1], one a channel.
    """
    assert images.dtype == torch.uint8, images.dtype
    shape = (1, -1, 1, 1)
    offset = torch.tensor(mean, dtype=torch.float32, device=made.device).view(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=made.device).view(shape)
    original = images.to(made.device).float() / 255
    masked = _pixels_masked(is_masked, original.shape[-2:])  # [n, 1, H, W]
    made = torch.where(masked, made.float() * scale + offset, original)
    hidden = torch.where(masked, torch.full_like(original, MASKED_GREY), original)
    columns = {"original": original, "masked": hidden, "reconstruction": made}
    save_png(_rows({name: _to_uint8(column) for name, column in columns.items()}), path)


def confusion(report: dict[str, Any], class_names: Sequence[str], path: Path) -> None:
    """Draw `report["confusion"]` ([C, C] counts, row: true class, column: predicted) as shares of each row.

    Up to 20 classes are named and numbered; above, a cell is a few pixels; above 1000, an average of cells. Draws
    nothing where the report has no matrix (it has none above `metrics.MAX_CONFUSION_CLASSES`).
    """
    if report["confusion"] is None:
        return
    counts = np.asarray(report["confusion"], dtype=np.float64)
    assert counts.shape == (len(class_names), len(class_names)), counts.shape
    # a class without samples has an empty row
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    is_named = len(class_names) <= NUMBERED_CLASSES
    save_png(_named_matrix(shares, class_names) if is_named else _plain_matrix(shares), path)


def _pixels_masked(is_masked: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """[n, num_patches] -> [n, 1, H, W]: each patch's flag on each of its pixels."""
    side = math.isqrt(is_masked.shape[1])
    assert side * side == is_masked.shape[1], is_masked.shape
    grid = is_masked.bool().reshape(-1, 1, side, side)
    return grid.repeat_interleave(size[0] // side, dim=2).repeat_interleave(size[1] // side, dim=3)


def _to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[n, C, H, W] in [0, 1] -> uint8 [n, H, W, 3]; one or two channels as grey, more than three as the first three."""
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _rows(columns: dict[str, np.ndarray]) -> Image.Image:
    num, height, width, _ = next(iter(columns.values())).shape
    factor = max(1, -(-PANEL_PX // width))
    panel_w, panel_h = width * factor, height * factor
    top = 16
    picture = Image.new("RGB", (len(columns) * (panel_w + GAP_PX) + GAP_PX, top + num * (panel_h + GAP_PX)), "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, panels) in enumerate(columns.items()):
        left = GAP_PX + column * (panel_w + GAP_PX)
        draw.text((left, 2), name, fill="black", font=font_of(11))
        for row, panel in enumerate(panels):
            enlarged = panel.repeat(factor, axis=0).repeat(factor, axis=1)
            picture.paste(Image.fromarray(enlarged), (left, top + row * (panel_h + GAP_PX)))
    return picture


def _named_matrix(shares: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    font, cell = font_of(12), 34
    names = [spelt(name) for name in class_names]
    margin = 12 + max(int(font.getlength(name)) for name in names)
    left, top, side = margin + 18, margin + 18, cell * len(names)
    picture = Image.new("RGB", (left + side + 8, top + side + 8), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), "% of the true class", fill="black", font=font)
    draw.text((left + side // 2, 4), "predicted", fill="black", font=font, anchor="ma")
    paste_turned(picture, "true", font, right=16, bottom=top + side // 2 + 12)
    for k, name in enumerate(names):
        draw.text((left - 6, top + k * cell + cell // 2), name, fill="black", font=font, anchor="rm")
        paste_turned(picture, name, font, right=left + k * cell + cell // 2 + 8, bottom=top - 6)
        for j, share in enumerate(shares[k]):
            box = (left + j * cell, top + k * cell, left + (j + 1) * cell - 1, top + (k + 1) * cell - 1)
            draw.rectangle(box, fill=_blue(share))
            if share > 0:
                ink = "white" if share > 0.5 else "black"
                centre = (left + j * cell + cell // 2, top + k * cell + cell // 2)
                draw.text(centre, f"{100 * share:.0f}", fill=ink, font=font, anchor="mm")
    return picture


def _plain_matrix(shares: np.ndarray) -> Image.Image:
    fold = -(-len(shares) // MATRIX_PX)
    if fold > 1:
        pad = -len(shares) % fold
        padded = np.pad(shares, ((0, pad), (0, pad)))
        side = len(padded) // fold
        # [side * fold, side * fold] -> [side, fold, side, fold] -> [side, side]
        shares = padded.reshape(side, fold, side, fold).sum(axis=(1, 3)) / fold
    factor = max(1, MATRIX_PX // 2 // len(shares))
    ramp = np.array([_blue(level / 255) for level in range(256)], dtype=np.uint8)
    pixels = ramp[(shares.clip(0, 1) * 255).round().astype(np.uint8)].repeat(factor, axis=0).repeat(factor, axis=1)
    picture = Image.new("RGB", (pixels.shape[1] + 24, pixels.shape[0] + 24), "white")
    picture.paste(Image.fromarray(pixels), (20, 20))
    font = font_of(12)
    ImageDraw.Draw(picture).text((20, 3), "predicted, share of the true class", fill="black", font=font)
    paste_turned(picture, "true", font, right=17, bottom=20 + pixels.shape[0] // 2)
    return picture


def paste_turned(picture: Image.Image, text: str, font: Any, *, right: int, bottom: int) -> None:
    """Text that reads upwards, its lower right corner there."""
    left, top, width, height = font.getbbox(text)
    box = Image.new("RGB", (int(width - left) + 2, int(height - top) + 2), "white")
    ImageDraw.Draw(box).text((-left, -top), text, fill="black", font=font)
    turned = box.transpose(Image.Transpose.ROTATE_90)
    picture.paste(turned, (right - turned.width, bottom - turned.height))


def _blue(share: float) -> tuple[int, int, int]:
    """White for 0 to a dark blue for 1; the square root lifts the small shares, where the mistakes are."""
    t = math.sqrt(min(max(share, 0.0), 1.0))
    white, dark = (255, 255, 255), (8, 48, 107)
    return tuple(round(w + (d - w) * t) for w, d in zip(white, dark, strict=True))  # type: ignore[return-value]


def spelt(name: str) -> str:
    """A class name fit for one line of a picture: control characters and line ends shown as spaces, cut at 24."""
    plain = "".join(c if c.isprintable() else " " for c in name).strip() or "?"
    return plain if len(plain) <= 24 else plain[:23] + "…"


def font_of(size_px: int) -> Any:
    return ImageFont.load_default(size=size_px)


def save_png(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
