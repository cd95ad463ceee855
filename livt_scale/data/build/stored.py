"""Raw images in the form that shards hold: JPEG and PNG byte for byte, what else Pillow reads converted by rule.

    image_kind(data)                -> "jpg", "png", "webp" …, by the contents, whatever the name says
    stored("jpg", data)             -> ("jpg", data)
    stored("tiff", data)            -> ("png", …), upright, 8 bits, grey where it is grey

The rule: what was compressed with loss (WebP, JPEG inside TIFF) becomes a JPEG of quality 95 with full colour
resolution, since a PNG of it would be many times larger; everything else becomes a PNG of the same pixels. Of several
pictures the first is taken. The loader reads every JPEG and PNG (16 bits, palettes, inks, EXIF rotation), so these keep
their bytes. The same bytes result whenever Pillow and libjpeg-turbo are the same.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

from livt_scale.data.image.decode import BadImage, EncodedImage, Pixels, Workspace, open_image
from livt_scale.util.errors import UnusableImage

KINDS = ("jpg", "png", "webp", "webp-lossless", "bmp", "tiff", "tiff-jpeg", "gif", "ppm")  # which are read
KEPT = ("jpg", "png")  # their bytes are shards' bytes
_LOSSY = ("webp", "tiff-jpeg")
_FORMATS = ("PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
_QUALITY = 95

_NOT_READ = (  # (where it begins, with what, name): not read, and named in the table
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypavi", "AVIF"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\x00\x00\x01\x00", "icon"),
)


def image_kind(data: bytes) -> str | None:
    """Which of KINDS begins with `data`, 64 bytes or more of it; None for everything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp-lossless" if _first_picture(data) == b"VP8L" else "webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "bmp"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "ppm"
    return None


_BMP_HEADERS = [struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)]


def check(data: bytes, *, decode: bool, workspace: Workspace | None = None) -> str:
    """The kind of the image `data`. Raises UnusableImage: empty, no image, of a kind that is not read, damaged.

    decode: down to the last pixel, as training will; else the header alone.
    """
    try:
        kind, image = _opened(data)
        if decode:
            _pixels(image, workspace)
    except BadImage as error:
        raise UnusableImage(str(error), reason=error.reason) from error
    return kind


def stored(data: bytes) -> tuple[str, bytes]:
    """("jpg" or "png", the bytes that a shard holds of the image `data`). Raises UnusableImage."""
    kept = image_kind(data)
    if kept is not None and kept in KEPT:
        return kept, data
    try:
        kind, image = _opened(data)
        pixels = _pixels(image)
    except BadImage as error:
        raise UnusableImage(str(error), reason=error.reason, remedy="repair the image, or remove it") from error
    if kind in _LOSSY:
        return "jpg", jpeg_bytes(pixels, quality=_QUALITY, subsampling="444")
    png = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if is_grey(pixels) else pixels).save(png, "png")
    return "png", png.getvalue()


def stored_type(kind: str) -> str:
    """What an image of `kind` becomes: "jpg" or "png"."""
    return kind if kind in KEPT else "jpg" if kind in _LOSSY else "png"


def is_grey(pixels: Pixels) -> bool:
    """Whether the colours of [H, W, 3] are all alike."""
    return bool((pixels[:, :, :1] == pixels[:, :, 1:]).all())


def jpeg_bytes(pixels: Pixels, *, quality: int, subsampling: str) -> bytes:
    """[H, W, 3] as a JPEG by libjpeg-turbo with its exact DCT, grey where the pixels are."""
    grey = is_grey(pixels)
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[:, :, :1] if grey else pixels),
        quality=quality,
        colorspace="GRAY" if grey else "RGB",
        colorsubsampling="Gray" if grey else subsampling,
        fastdct=False,
    )
    return data


def _opened(data: bytes) -> tuple[str, EncodedImage]:
    kind = image_kind(data)
    if kind is None:
        raise BadImage(_what_it_is(data), reason=_what_it_is(data))
    image = open_image(data, channels=3, formats=_FORMATS)
    if kind == "tiff" and _has_jpeg_inside(data):
        kind = "tiff-jpeg"
    return kind, image


def _pixels(image: EncodedImage, workspace: Workspace | None = None) -> Pixels:
    with warnings.catch_warnings():  # of metadata; what is wrong with pixels is an error
        warnings.simplefilter("ignore")
        return image.pixels(workspace=workspace)


def _what_it_is(data: bytes) -> str:
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return "nothing but zeros"
    for begin, mark, name in _NOT_READ:
        if data[begin : begin + len(mark)] == mark:
            return f"{name}: not read"
    return "SVG: not read" if b"<svg" in data[:1024].lower() else "not an image"


def _has_jpeg_inside(data: bytes) -> bool:
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        return str(image.info.get("compression", "")).endswith("jpeg")


def _first_picture(data: bytes) -> bytes:
    """The kind of a WebP's first picture, b"VP8 " or b"VP8L"; of what `data` holds of the file."""
    return next((name for name in _webp_chunks(data, 12) if name in (b"VP8 ", b"VP8L")), b"")


def _webp_chunks(data: bytes, position: int) -> Iterator[bytes]:
    """Chunk names of RIFF from `position` on, those inside the frames of an animation too (RFC 9649, section 2.7)."""
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        yield name
        position += 8 + (16 if name == b"ANMF" else size + size % 2)
