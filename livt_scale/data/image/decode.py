"""Decodes images to pixels: uint8, upright, with the model's channels, and no more pixels than needed.

    image = open_image(jpeg_bytes, channels=3)      # reads the header alone
    image.height, image.width                       # as seen: EXIF rotation is applied
    image.pixels()                                  # uint8 [H, W, 3]
    image.pixels(shrink=4)                          # a quarter of each side, decoded so (JPEG alone, see `shrinks`)
    image.pixels(bottom=200)                        # its first 200 rows or more: most JPEGs are not read further

JPEG goes to libjpeg-turbo through simplejpeg, PNG, BMP and WebP to Pillow. The contents decide, never the file's name:
ImageNet has a PNG called .JPEG. An image that does not decode to its end is an error, never a half-grey picture; what
cannot be decoded strictly (odd chroma subsampling) is refused. Gigapixel images are refused by their header, before any
allocation. docs/data.md has the table of what is read how.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from livt_scale.data.image.jpeg import exif_orientation, has_restarts, num_scans, outline, repaired, shortened
from livt_scale.data.image.png import SIGNATURE, size_and_exif

Pixels = NDArray[np.uint8]

MAX_SIDE_PX = 1 << 16  # as JPEG has it; of 67 million x 1 pixels resizing makes gigabytes
MAX_PIXELS = 1 << 26  # 67 million (8192 x 8192), 200 MB as RGB; Pillow itself warns from 89 million on
MAX_SCANS = 100  # of a large progressive JPEG: each is one pass over all pixels; ten are usual
MAX_KEPT_BYTES = 1 << 24  # by a workspace; larger images (5.6 million pixels) get separate memory
FORMATS = ("PNG", "BMP", "WEBP")  # of Pillow's many: no interpreters (EPS), no rare formats
SHRINKS = (8, 4, 2)  # DCT scalings for which libjpeg-turbo has fast code; 7/8 … 5/8 are slower than a full decode

_READ_TO_THE_END = "before marker 0xd9"  # surplus bytes between the last pixel and the end: nothing is lost
_ONLY_SURPLUS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")  # the first warning, in full
_BUFFER = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # Pillow's name for the bytes: another each time


DOES_NOT_DECODE = "does not decode: cut, damaged, or of a rare kind"
TOO_LARGE = "more pixels than are read"


class BadImage(ValueError):
    """The bytes are not a usable image; the message gives the reason. The caller adds shard and key."""

    def __init__(self, message: str, *, reason: str = DOES_NOT_DECODE) -> None:
        super().__init__(message)
        self.reason = reason  # one of few: images are counted by it


class EncodedImage(Protocol):
    """An image whose header was read."""

    height: int
    width: int
    shrinks: bool  # does `shrink` save work and keep the geometry?

    def pixels(self, *, shrink: int = 1, workspace: Workspace | None = None, bottom: int | None = None) -> Pixels:
        """uint8 [ceil(height / shrink), ceil(width / shrink), channels]. Raises BadImage.

        With a workspace they are valid until the next image is decoded there. `bottom`: rows of the image
        from there on may be missing, which spares their decoding; those before it are the same to the bit.
        """
        ...


class Workspace:
    """Memory that one image after another is decoded into.

    Fresh memory for each is half as dear again as the decoding: 500 x 375 px in 555 µs instead of 820, since the system
    clears 137 pages for it. Not for two threads.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def room(self, nbytes: int) -> NDArray[np.uint8] | None:
        """uint8 [nbytes] or more; None if that is more than is kept."""
        if nbytes > MAX_KEPT_BYTES:
            return None
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, dtype=np.uint8)
        return self._memory


def open_image(data: bytes, *, channels: int, formats: tuple[str, ...] = FORMATS) -> EncodedImage:
    """Read the header. `channels`: 1 (grey, luma of ITU-R 601) or 3 (RGB). Raises BadImage.

    formats: what Pillow may read, beside JPEG.
    """
    return _JpegImage(data, channels) if data[:2] == b"\xff\xd8" else _PillowImage(data, channels, formats)


def decode(data: bytes, *, channels: int = 3) -> Pixels:
    """The full image, upright: uint8 [H, W, channels]. Raises BadImage."""
    return open_image(data, channels=channels).pixels()


class _JpegImage:
    def __init__(self, data: bytes, channels: int) -> None:
        self._data = data
        try:
            height, width, self._colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            self._data = repaired(data)
            height, width, self._colours = _jpeg_facts(self._data)
        _check_size(height, width)
        if height * width * len(data) > 1 << 40 and (scans := num_scans(data)) > MAX_SCANS:  # below: seconds at worst
            raise BadImage(f"{width} x {height} pixels in {scans:,} scans, more than {MAX_SCANS}")
        self._channels = channels
        self._stored = height, width
        self._outline = outline(data)
        self._orientation = self._outline.orientation
        self.shrinks = self._orientation == 1  # a turned one would count the cut-off edge from the other side
        has_end = data[-2:] == b"\xff\xd9"
        self._can_stop = self.shrinks and has_end and self._outline.height_at > 0 and self._colours not in _FOUR_INKS
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def pixels(self, *, shrink: int = 1, workspace: Workspace | None = None, bottom: int | None = None) -> Pixels:
        if bottom is not None and (upper := self._upper_part(bottom, shrink, workspace)) is not None:
            return upper
        try:
            pixels = self._decoded(self._data, shrink=shrink, workspace=workspace)
        except ValueError as error:
            pixels = self._decoded_leniently(shrink, error)
        if self._colours in _FOUR_INKS:
            inks = Image.frombuffer("CMYK", pixels.shape[1::-1], 255 - pixels)  # as Adobe writes them: inverted
            # a copy: Pillow's own memory is read-only, of which torch warns
            pixels = np.array(inks.convert("RGB" if self._channels == 3 else "L")).reshape(*pixels.shape[:2], -1)
        return pixels if self._orientation == 1 else _upright(pixels, self._orientation)

    def _upper_part(self, bottom: int, shrink: int, workspace: Workspace | None) -> Pixels | None:
        """The rows down to `bottom` and those that their colours need, decoded strictly; None if the full image costs
        no more, or if anything is wrong: decoding the full image then shows the error.

        Saves a seventh of the decoding of MAE's crops. libjpeg treats the data that follow as surplus, skips them to
        the end and then warns about them; a truncated file or a stray marker in them gives a different warning.
        """
        block_px, (height, width) = self._outline.block_px, self._stored
        needed = bottom + 2 * shrink - 1  # full rows of the small image, and one more: a row's colours reach across
        rows = -(-needed // block_px) * block_px if self._can_stop else height
        if rows >= height:
            return None
        shape = -(-rows // shrink), -(-width // shrink), self._channels
        num_bytes = shape[0] * shape[1] * shape[2]
        memory = workspace.room(num_bytes) if workspace else None
        if memory is None:
            memory = np.empty(num_bytes, dtype=np.uint8)
        part = shortened(self._data, self._outline, rows)
        try:
            return _simplejpeg(part, rows, width, shrink=shrink, inks=self._inks, buffer=memory)
        except ValueError as error:
            return memory[:num_bytes].reshape(shape) if _ONLY_SURPLUS.fullmatch(str(error)) else None

    def _decoded_leniently(self, shrink: int, error: ValueError) -> Pixels:
        """After `error`: the pixels if what libjpeg warned of costs none. Raises BadImage."""
        whole = repaired(self._data)
        try:
            if whole != self._data:
                return self._decoded(whole, shrink=shrink)
        except ValueError as second:
            error = second
        if _READ_TO_THE_END in str(error) and not has_restarts(whole):
            return self._decoded(whole, shrink=shrink, strict=False)
        raise BadImage(f"the JPEG is cut or damaged: {error}") from error

    def _decoded(self, data: bytes, *, shrink: int, strict: bool = True, workspace: Workspace | None = None) -> Pixels:
        height, width = self._stored
        num_bytes = -(-height // shrink) * -(-width // shrink) * 4  # at most four inks
        buffer = workspace.room(num_bytes) if workspace else None
        return _simplejpeg(data, height, width, shrink=shrink, inks=self._inks, buffer=buffer, strict=strict)

    @property
    def _inks(self) -> str:
        return "CMYK" if self._colours in _FOUR_INKS else "RGB" if self._channels == 3 else "GRAY"


def _simplejpeg(
    data: bytes, height: int, width: int, *, shrink: int, inks: str, buffer: Pixels | None, strict: bool = True
) -> Pixels:
    """uint8 [ceil(height / shrink), ceil(width / shrink), inks]. Raises ValueError."""
    pixels: Pixels = simplejpeg.decode_jpeg(
        data,
        colorspace=inks,
        min_height=-(-height // shrink) if shrink > 1 else 0,
        min_width=-(-width // shrink) if shrink > 1 else 0,
        min_factor=shrink,
        buffer=buffer,
        strict=strict,
    )
    return pixels


_FOUR_INKS = ("CMYK", "YCCK")


def _jpeg_facts(data: bytes) -> tuple[int, int, str]:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadImage(f"not an image that can be read: JPEG: {_said(error)}") from error
    return height, width, colours


class _PillowImage:
    shrinks = False

    def __init__(self, data: bytes, channels: int, formats: tuple[str, ...]) -> None:
        self._channels = channels
        self._orientation = 1
        try:
            if data.startswith(SIGNATURE):
                height, width, exif = size_and_exif(data)
                self._orientation = exif_orientation(exif) if exif else 1
                _check_size(height, width)
            elif data[8:12] == b"WEBP":
                _check_size(*_webp_size(data))  # Pillow's reader makes room for the picture when it is opened
            with warnings.catch_warnings():  # oddities of metadata are nothing, a bomb is an error, whatever is set
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self._image = Image.open(io.BytesIO(data), formats=formats)
                if self._image.format == "WEBP":
                    self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        except BadImage:
            raise
        except Exception as error:  # damaged headers make Pillow's readers fail in many ways
            raise BadImage(f"not an image that can be read: {_said(error)}") from error
        width, height = self._image.size
        _check_size(height, width)
        _check_values(self._image)
        self.height, self.width = (width, height) if self._orientation in (5, 6, 7, 8) else (height, width)

    def pixels(
        self,
        *,
        shrink: int = 1,
        workspace: Workspace | None = None,  # noqa: ARG002
        bottom: int | None = None,  # noqa: ARG002
    ) -> Pixels:
        assert shrink == 1, "shrinks is False"
        try:
            self._image.load()
            pixels = np.array(_in_mode(self._image, "RGB" if self._channels == 3 else "L"))
        except Exception as error:
            raise BadImage(f"the {self._image.format} is cut or damaged: {_said(error)}") from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return _upright(pixels, self._orientation) if self._orientation in range(2, 9) else pixels


def pillow_pixels(image: Image.Image, *, channels: int) -> Pixels:
    """An image that Pillow holds, upright: uint8 [H, W, channels]. Raises BadImage."""
    _check_values(image)
    try:
        image.load()  # turns a TIFF, which then has no orientation any more
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        pixels = np.array(_in_mode(image, "RGB" if channels == 3 else "L"))
    except Exception as error:  # an image that is opened is read only here
        raise BadImage(f"the {image.format or 'image'} is cut or damaged: {_said(error)}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return _upright(pixels, orientation) if orientation in range(2, 9) else pixels


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255 instead of scaling
        high_byte = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # over RGBA: Pillow requires that detour if the palette has transparency
        image = image.convert("RGBA")
    return image.convert(mode)


def _check_values(image: Image.Image) -> None:
    """16 bits have a rule (the upper eight); 32 bits, floats and colour spaces beyond inks have no rule."""
    is_wide = image.mode == "F" or (image.mode == "I" and image.format in ("TIFF", None))
    if is_wide or image.mode in ("LAB", "HSV"):
        what = "values of 32 bits" if is_wide else f"colours of the space {image.mode}"
        raise BadImage(f"{what} have no rule that makes them colours of 8 bits", reason=f"{what} are not read")


def _check_size(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE_PX:
        raise BadImage(
            f"its header promises {width} x {height} pixels, a side of more than {MAX_SIDE_PX:,}",
            reason=f"{TOO_LARGE} (a side of {MAX_SIDE_PX:,})",
        )
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"its header promises {width} x {height} pixels, more than {MAX_PIXELS:,}",
            reason=f"{TOO_LARGE} ({MAX_PIXELS:,})",
        )
    if not height * width:
        raise BadImage(f"its header promises {width} x {height} pixels: none")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) by the header of the first chunk (RFC 9649, sections 2.5 to 2.7); a canvas for animations."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return int.from_bytes(body[8:10], "little") & 0x3FFF, int.from_bytes(body[6:8], "little") & 0x3FFF


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """EXIF 2: mirrored, 3: turned by 180°, 4: upside down, 5: transposed, 6 and 8: turned by 90°, 7: both."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _said(error: Exception) -> str:
    text = _BUFFER.sub("", str(error)) or type(error).__name__
    return text if text.isprintable() else repr(text)
