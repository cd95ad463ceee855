"""Checks that a PNG is complete by its own checksums; Pillow skips those of the pixels and the end.

signature | length "IHDR" 13 bytes crc | length "IDAT" … crc | … | 0 "IEND" crc        (PNG specification, clause 5)
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000  # usual pixels come in pieces of 8 KB or more; empty ones would take minutes to pass
_PALETTE = 3  # the colour type
_HEADER = struct.Struct(">I4s")


class BadPng(ValueError):
    """What is wrong with it."""


def size_and_exif(data: bytes) -> tuple[int, int, bytes]:
    """(height, width, EXIF block or nothing) of a PNG with every chunk intact, from IHDR to IEND. Raises BadPng."""
    position, exif = len(SIGNATURE), b""
    height = width = 0
    needs_palette = False
    view = memoryview(data)
    for _ in range(MAX_CHUNKS):
        if position + 12 > len(data):
            raise BadPng("it is cut: its end is missing")
        length, kind = _HEADER.unpack_from(data, position)
        end = position + 12 + length
        if end > len(data):
            raise BadPng(f"it is cut in a chunk {kind!r} of {length:,} bytes")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise BadPng(f"a chunk {kind!r} is not what its checksum says")
        if (kind == b"IHDR") != (position == len(SIGNATURE)) or (kind == b"IHDR" and length != 13):
            raise BadPng("it does not begin with its header")
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, position + 8)
            needs_palette = data[position + 17] == _PALETTE
        elif kind == b"PLTE":
            needs_palette = False
        elif kind == b"IDAT" and needs_palette:
            raise BadPng("its palette is missing")
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        elif kind == b"IEND":
            return height, width, exif
        position = end
    raise BadPng(f"more than {MAX_CHUNKS:,} chunks")
