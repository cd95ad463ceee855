"""Sample images of a pretraining: original, masked and reconstructed side by side, as PNG.

A reconstruction shows pixels as an eye expects them: the decoder predicts each patch less its mean and over its
deviation, and that is undone first (left in, the picture looks broken: facebookresearch/mae#174). Patches that the
encoder saw are shown as they are, only masked ones are predicted. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from livt_scale.util.atomic import write_atomic

PANEL_PX = 112  # an image is enlarged by an integer factor to at least this width
GAP_PX = 4
MASKED_GREY = 0.35  # of a masked patch: between black and white, and rare enough in images to be seen


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
    picture = _rows({name: _to_uint8(column) for name, column in columns.items()})
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_atomic(path, data.getvalue())


def reconstruction_left(width: int) -> int | None:
    """Where the column "reconstruction" begins in a picture of `width` px; None where it is not one of ours."""
    panel, rest = divmod(width - GAP_PX, 3)
    return None if rest or panel <= GAP_PX else 2 * panel + GAP_PX


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
        draw.text((left, 2), name, fill="black", font=ImageFont.load_default(size=11))
        for row, panel in enumerate(panels):
            enlarged = panel.repeat(factor, axis=0).repeat(factor, axis=1)
            picture.paste(Image.fromarray(enlarged), (left, top + row * (panel_h + GAP_PX)))
    return picture
