"""timm's colour operations on arrays: bit for bit the results of Pillow, without conversion to an image and back.

    COLOURS["SolarizeIncreasing"](pixels, 100)      # uint8 [H, W, C] in, a new one out

That conversion alone takes 50 µs at 224 px, and most operations need no more than one pass over the bytes. Each
function here follows Pillow's C code: its integers, its float32, and its truncation of fractions. Colour, equalizing
and the automatic contrast are still done by Pillow (augment.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image


def _invert(pixels: np.ndarray) -> np.ndarray:
    return ~pixels


def _posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """With strength 10 timm requests 0 bits: black, until Pillow 13 made it an error (timm 1.0.31)."""
    return pixels & np.uint8(0xFF << (8 - max(bits, 0)) & 0xFF if bits < 8 else 0xFF)


def _solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
    return pixels ^ _ones(pixels >= threshold)


def _solarize_add(pixels: np.ndarray, add: int, threshold: int = 128) -> np.ndarray:
    assert add + threshold <= 256, "timm adds 128 at most"
    return pixels + (_ones(pixels < threshold) & np.uint8(add))


def _brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(0, pixels, factor)


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = np.asarray(Image.fromarray(pixels).convert("L")) if pixels.shape[2] == 3 else pixels
    return _blend(int(int(grey.sum(dtype=np.int64)) / grey.size + 0.5), pixels, factor)


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(_smooth(pixels), pixels, factor)


def _blend(start: np.ndarray | int, end: np.ndarray, share: float) -> np.ndarray:
    """start + share · (end − start) in float32, beyond both where `share` is more than 1; Pillow's Image.blend."""
    blended = end.astype(np.float32)
    begin = np.float32(start) if isinstance(start, int) else start.astype(np.float32)
    blended -= begin
    blended *= np.float32(share)
    blended += begin
    return blended.clip(0, 255, out=blended).astype(np.uint8)


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """ImageFilter.SMOOTH: the eight neighbours and five times the pixel, over 13, rounded; the border stays.

    Pillow sums in float32; 13 is odd, so that no sum comes nearer than 1/26 to where rounding turns.
    """
    if min(pixels.shape[:2]) < 3:
        return pixels
    wide = pixels.astype(np.uint16)
    lines = wide[:, :-2] + wide[:, 2:]
    lines += wide[:, 1:-1]
    total = lines[:-2] + lines[2:]
    total += lines[1:-1]
    total += 4 * wide[1:-1, 1:-1]
    total *= 2
    total += 13
    total //= 26
    smooth = pixels.copy(order="K")
    smooth[1:-1, 1:-1] = total
    return smooth


def _ones(where: np.ndarray) -> np.ndarray:
    """255 where true, else 0."""
    return where.view(np.uint8) * np.uint8(255)


COLOURS: dict[str, Callable[..., np.ndarray]] = {
    "Invert": _invert,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "PosterizeOriginal": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
}
