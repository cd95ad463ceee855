"""What the pixels of a set are like, measured on a sample: the size of the images, colour or grey, mean and deviation.

The sample is of the training images alone, drawn by seed, and each image counts the same. Images that cannot be used
are passed over: the build has a table of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from livt_scale.data.build.sources import Indices, Source
from livt_scale.data.build.stored import is_grey
from livt_scale.data.image.decode import SHRINKS, BadImage, Pixels, open_image
from livt_scale.longtail import shuffled
from livt_scale.util.errors import SourceError

MAX_SAMPLE = 500  # of them the error of a mean is below 0.01 of the range; photographs of 12 megapixels take 10 s
ENOUGH_PX = 224  # shorter side that a large JPEG is decoded to


@dataclass(frozen=True)
class PixelFacts:
    """Of `sample` images. mean, std: of the pixels in [0, 1], one value for each channel."""

    sample: int
    shorter_px: int  # median of the shorter sides
    channels: int  # 1: every image is grey
    mean: tuple[float, ...]
    std: tuple[float, ...]


def measure(source: Source, images: Indices, *, seed: int = 0) -> PixelFacts:
    """Measure some of `images` of `source`. Raises SourceError where none of the sample can be decoded."""
    drawn = images[shuffled(len(images), seed=seed)[:MAX_SAMPLE]]
    sides: list[int] = []
    moments: list[np.ndarray] = []  # [2, 3] of each image: mean of x and of x²
    all_grey = True
    for i in drawn.tolist():
        try:
            side, pixels = _decoded(source.image(i)[1])
        except (SourceError, BadImage):
            continue
        sides.append(side)
        all_grey = all_grey and is_grey(pixels)
        values = pixels.reshape(-1, 3) / 255.0
        moments.append(np.stack([values.mean(axis=0), (values**2).mean(axis=0)]))
    if not sides:
        raise SourceError(f"none of {len(drawn)} images of a sample can be decoded", remedy="give a folder of images")
    channels = 1 if all_grey else 3
    mean, square = np.mean(moments, axis=0)[:, :channels]
    std = np.sqrt(np.maximum(square - mean**2, 1e-4))  # one colour everywhere: a deviation of 0 divides no pixel
    return PixelFacts(len(sides), int(np.median(sides)), channels, _rounded(mean), _rounded(std))


def _decoded(data: bytes) -> tuple[int, Pixels]:
    """(shorter side, pixels [h, w, 3]) of an image; of a large JPEG the pixels are decoded at a smaller size."""
    image = open_image(data, channels=3)
    side = min(image.height, image.width)
    shrink = next((s for s in SHRINKS if image.shrinks and side / s >= ENOUGH_PX), 1)
    return side, image.pixels(shrink=shrink)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 3) for value in values)
