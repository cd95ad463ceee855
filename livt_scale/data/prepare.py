"""Images made smaller once, when the shards are built, so that each epoch decodes less.

    prepared(data, Prepare(resize_shorter=256, quality=92))    -> JPEG whose shorter side has 256 px, upright

What ffcv's users do: a crop of 224 px seldom needs the pixels of a camera. An image whose shorter side is not longer
than that stays as it is, byte for byte; none is made larger. Pillow's bicubic with antialias, then a JPEG by
libjpeg-turbo with its exact DCT: the same bytes whenever these libraries are the same, whoever writes them.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from livt_scale.data.images import decode, open_image


class Prepare(BaseModel):
    """How images are stored. Part of a set in a spec, and recorded with it in the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize_shorter: PositiveInt = Field(description="px of the shorter side, where it is longer")
    quality: Annotated[int, Field(ge=50, le=100)] = Field(92, description="of the JPEGs that are written")


def prepared(image_type: str, data: bytes, prepare: Prepare) -> tuple[str, bytes]:
    """("jpg", a smaller image) or what was given, where it is small enough. Raises BadImage."""
    image = open_image(data, channels=3)
    shorter = min(image.height, image.width)
    if shorter <= prepare.resize_shorter:
        decode(data)  # an image that does not decode to its end must not come into a shard as a good one
        return image_type, data
    width, height = (round(side * prepare.resize_shorter / shorter) for side in (image.width, image.height))
    pixels = np.asarray(Image.fromarray(image.pixels()).resize((width, height), Image.Resampling.BICUBIC))
    is_grey = bool((pixels[:, :, :1] == pixels[:, :, 1:]).all())
    small: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[:, :, :1] if is_grey else pixels),
        quality=prepare.quality,
        colorspace="GRAY" if is_grey else "RGB",
        colorsubsampling="Gray" if is_grey else "420",
        fastdct=False,
    )
    return "jpg", small
