"""Encoded images to pixels: uint8, upright, of the channels that the model wants, and as few as will do.

    image = open_image(jpeg_bytes, channels=3)      # reads the header alone
    image.height, image.width                       # as seen: EXIF rotation is applied
    image.pixels()                                  # uint8 [H, W, 3]
    image.pixels(shrink=4)                          # a quarter of each side, decoded so (JPEG alone, see `shrinks`)

JPEG goes to libjpeg-turbo through simplejpeg; what that does not know (CMYK, odd subsampling) and every other format
to Pillow. The contents decide, never the file's name: ImageNet has a PNG called .JPEG. An image that does not decode
to its end is an error, never a half-grey picture; one of gigapixels is refused by its header, before any allocation.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

Pixels = NDArray[np.uint8]

MOST_PIXELS = 1 << 26  # 67 million (8192 x 8192), 200 MB as RGB; Pillow itself warns from 89 million on
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # of Pillow's many: no interpreter (EPS), no stranger
SHRINKS = (8, 4, 2)  # DCT scalings for which libjpeg-turbo has fast code; 7/8 … 5/8 are slower than a full decode

_PNG = b"\x89PNG\r\n\x1a\n"
_LOST_DATA = ("remature end", "bad Huffman code")  # what libjpeg-turbo only warns of, and Pillow accepts in silence


class BadImage(ValueError):
    """These bytes are no image that can be used; the message says why. The caller knows shard and key."""


class EncodedImage(Protocol):
    """An image whose header was read."""

    height: int
    width: int
    shrinks: bool  # does `shrink` save work and keep the geometry?

    def pixels(self, *, shrink: int = 1) -> Pixels:
        """uint8 [ceil(height / shrink), ceil(width / shrink), channels]. Raises BadImage."""
        ...


def open_image(data: bytes, *, channels: int) -> EncodedImage:
    """Read the header. `channels`: 1 (grey, luma of ITU-R 601) or 3 (RGB). Raises BadImage."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return _PillowImage(data, channels)
        _check_size(height, width)
        if colours in ("RGB", "YCbCr", "Gray"):
            return _JpegImage(data, channels, height, width)
    return _PillowImage(data, channels)


def decode(data: bytes, *, channels: int = 3) -> Pixels:
    """The whole image, upright: uint8 [H, W, channels]. Raises BadImage."""
    return open_image(data, channels=channels).pixels()


class _JpegImage:
    def __init__(self, data: bytes, channels: int, height: int, width: int) -> None:
        self._data = data
        self._channels = channels
        self._stored = height, width
        self._orientation = _jpeg_orientation(data)
        self.shrinks = self._orientation == 1  # a turned one would count the cut-off edge from the other side
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def pixels(self, *, shrink: int = 1) -> Pixels:
        height, width = self._stored
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(
                self._data,
                colorspace="RGB" if self._channels == 3 else "GRAY",
                min_height=-(-height // shrink) if shrink > 1 else 0,
                min_width=-(-width // shrink) if shrink > 1 else 0,
                min_factor=shrink,
            )
        except ValueError as error:
            if any(sign in str(error) for sign in _LOST_DATA):
                raise BadImage(f"the JPEG is cut or damaged: {error}") from error
            # Harmless oddities (bytes between markers, of which ImageNet has some) and rare kinds of JPEG.
            return _PillowImage(self._data, self._channels).pixels()
        return pixels if self._orientation == 1 else _upright(pixels, self._orientation)


class _PillowImage:
    shrinks = False

    def __init__(self, data: bytes, channels: int) -> None:
        if data[:8] == _PNG and len(data) >= 24:
            _check_size(*reversed(struct.unpack(">II", data[16:24])))
        self._channels = channels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self._image = Image.open(io.BytesIO(data), formats=FORMATS)
            self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1) if _has_exif(data) else 1
        except Exception as error:  # damaged headers make Pillow's readers fail in many ways
            raise BadImage(f"not an image that can be read: {_said(error)}") from error
        _check_size(self._image.height, self._image.width)
        width, height = self._image.size
        self.height, self.width = (width, height) if self._orientation in (5, 6, 7, 8) else (height, width)

    def pixels(self, *, shrink: int = 1) -> Pixels:
        assert shrink == 1, "shrinks is False"
        try:
            self._image.load()
            image = ImageOps.exif_transpose(self._image) if self._orientation != 1 else self._image
            pixels = np.array(_in_mode(image, "RGB" if self._channels == 3 else "L"))
        except Exception as error:
            raise BadImage(f"the {self._image.format} is cut or damaged: {_said(error)}") from error
        return pixels if self._channels == 3 else pixels[:, :, None]


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255 instead of scaling
        high_byte = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # over RGBA: with transparency in the palette Pillow asks for that detour
        image = image.convert("RGBA")
    return image.convert(mode)


def _check_size(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise BadImage(f"its header promises {width} x {height} pixels, more than {MOST_PIXELS:,}")


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8. Most images have none: one search in their first bytes tells."""
    if not _has_exif(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: the pixels stand as they are, as in every viewer
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_exif(data: bytes) -> bool:
    """Near the beginning, where cameras write it: an EXIF block after other blocks of 4 KB counts as none."""
    return data.find(b"Exif\x00\x00", 0, 4096) >= 0 or data.find(b"eXIf", 0, 4096) >= 0 or data[8:12] == b"WEBP"


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """EXIF 2: mirrored, 3: turned by 180°, 4: upside down, 5: transposed, 6 and 8: turned by 90°, 7: both."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _said(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if text.isprintable() else repr(text)
