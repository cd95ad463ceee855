"""The header of a JPEG, read without decoding: the EXIF orientation, and harmless defects.

`shortened` gives the same image with fewer rows: the decoder stops at a crop's lower edge. libjpeg only warns where
pixels are lost, so `decode` treats each warning as an error. Some are harmless: `repaired` returns the same image
without their cause, which is then decoded as strictly as any other.
Layout: ITU-T T.81, annex B.

    FFD8 | FFE1 length Exif… | FFDB length tables | FFC0 length height width … | FFDA length … pixels | FFD9
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import ExifTags, Image

_SOS, _RESTARTS, _APP0, _APP1 = 0xDA, 0xDD, 0xE0, 0xE1
_SEQUENTIAL = (0xC0, 0xC1)  # start of frame, baseline and extended
_EXIF = b"Exif\0\0"
_WHOLE_BLOCK = b"\x00\x3f\x00"  # what a sequential scan holds: coefficients 0 to 63, all their bits


@dataclass(frozen=True, slots=True)
class Outline:
    """What one walk over the segments finds."""

    orientation: int = 1  # of EXIF, 1 to 8; without EXIF, or where it is damaged, 1: as viewers do
    height_at: int = 0  # offset of the height; 0: not a JPEG that can be shortened
    block_px: int = 0  # rows of pixels in one row of blocks, 8 or 16, more in odd chroma subsampling


def outline(data: bytes) -> Outline:
    found, height_at, block_px, components, restarts = 1, 0, 0, 0, False
    for marker, start, end in _segments(data):
        if marker == _APP1 and found == 1 and data.startswith(_EXIF, start + 4):
            found = exif_orientation(data[start + 4 : end])
        elif marker == _RESTARTS:
            restarts = True
        elif marker in _SEQUENTIAL and end - start >= 10 + 3 * data[start + 9]:
            components = data[start + 9]
            height_at, block_px = start + 5, 8 * max((v & 15 for v in data[start + 11 : end : 3]), default=0)
        elif marker == _SOS and not restarts and components and data[start + 4] == components:
            return Outline(found, height_at, block_px)
    return Outline(found)


def shortened(data: bytes, known: Outline, rows: int) -> bytes:
    """The image cut to its first `rows` rows: the header has the new height, the data are the same.

    Only for one scan, from top to bottom: the decoder then stops there, and skips what follows.
    """
    assert known.height_at
    return data[: known.height_at] + rows.to_bytes(2, "big") + data[known.height_at + 2 :]


def exif_orientation(exif: bytes) -> int:
    """The same of an EXIF block, with or without its first six bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is damaged in it
            tags = Image.Exif()
            tags.load(exif)
            found = tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser fails in many ways
        return 1
    return found if found in range(1, 9) else 1


def repaired(data: bytes) -> bytes:
    """The image without defects that libjpeg warns about but that affect no pixel.

    Bytes between segments, an unknown JFIF version, and a sequential scan that claims to hold a part of its
    coefficients (written by phones).
    """
    out = bytearray(data[:2])
    sequential = False
    first_scan = 0
    for marker, start, end in _segments(data):
        segment = bytearray(data[start:end])
        sequential = sequential or marker in _SEQUENTIAL
        if marker == _APP0 and segment[4:9] == b"JFIF\0" and len(segment) > 10:
            segment[9:11] = b"\x01\x01"
        if marker == _SOS:
            first_scan = end
            if sequential and len(segment) >= 8:
                segment[-3:] = _WHOLE_BLOCK
        out += segment
    return bytes(out) + data[first_scan:] if first_scan else data


def num_scans(data: bytes) -> int:
    """At most how many passes over the pixels: 1 for most, ten for progressive ones, any number for a hostile file."""
    components = 0
    for marker, start, end in _segments(data):
        if marker in _SEQUENTIAL and end - start > 9:
            components = data[start + 9]
        elif marker == _SOS and data[start + 4] == components:
            return 1  # all there is: libjpeg looks for no second one
    return data.count(b"\xff\xda")


def has_restarts(data: bytes) -> bool:
    """Whether there are restart markers among the pixels: libjpeg may then take one for the end without a warning."""
    return any(marker == _RESTARTS for marker, _, _ in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, where it begins, where its segment ends) up to the first scan; bytes between two are passed over."""
    position, size = 2, len(data)
    while 0 <= (position := data.find(b"\xff", position)) < size - 3:
        marker = data[position + 1]
        if marker == 0xFF:  # filling
            position += 1
            continue
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD8:  # no marker, or one without a segment
            position += 2
            continue
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if marker == 0xD9 or end < position + 4 or end > size:
            return
        yield marker, position, end
        if marker == _SOS:
            return
        position = end
