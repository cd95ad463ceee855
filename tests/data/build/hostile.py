"""What no program wrote in good faith: tars, PNGs and JPEGs put together byte by byte, with right checksums.

tar(entry("a.png", PNG), entry("a.cls", b"3"))             # headers as they are asked for, then the end
entry("a.png", b"", type=b"2", linkname="/etc/passwd")     # any field; `claimed`: the size in the header
png(chunk(b"IHDR", …), …)   flat_jpeg(30, 20, sampling=[(3, 1), (1, 1), (1, 1)])
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def header(name: bytes, **fields: Any) -> bytes:
    """One tar header. `fields`: type, size (int, or the 12 bytes of the field), linkname, magic, prefix, checksum."""
    size = fields.get("size", 0)
    size = size if isinstance(size, bytes) else b"%011o\0" % size
    made = b"".join(
        [
            name.ljust(100, b"\0")[:100],
            b"0000644\0" + b"0000000\0" * 2,
            size.ljust(12, b"\0"),
            b"00000000000\0" + b" " * 8,
            fields.get("type", b"0"),
            fields.get("linkname", b"").ljust(100, b"\0"),
            fields.get("magic", b"ustar\x0000"),
            bytes(80),
            fields.get("prefix", b"").ljust(155, b"\0"),
            bytes(12),
        ]
    )
    assert len(made) == BLOCK
    checksum = fields.get("checksum", b"%06o\0 " % sum(made))
    return made[:148] + checksum + made[156:]


def entry(name: str | bytes, data: bytes = b"", *, before: bytes = b"", **fields: Any) -> bytes:
    """A member: `before` (extended headers), its header, its data padded. `claimed`: the size that it states."""
    raw = name.encode() if isinstance(name, str) else name
    size = fields.pop("claimed", len(data))
    return before + header(raw, size=size, **fields) + data + bytes(-len(data) % BLOCK)


def tar(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def sample_bytes(key: str, label: int, image: tuple[str, bytes]) -> bytes:
    """A sample as our builds write it: (image type, image), then the label."""
    return entry(f"{key}.{image[0]}", image[1]) + entry(f"{key}.cls", b"%d" % label)


def pax(records: dict[str, bytes], *, type: bytes = b"x") -> bytes:
    """A PAX extended header with these records."""
    lines = b"".join(pax_record(key.encode(), value) for key, value in records.items())
    return entry("PaxHeaders/x", lines, type=type)


def pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def gnu_long(name: bytes) -> bytes:
    return entry("././@LongLink", name + b"\0", type=b"L", magic=b"ustar  \0")


def sample(key: str, image: bytes, label: bytes = b"0", *, kind: str = "png") -> bytes:
    return entry(f"{key}.{kind}", image) + entry(f"{key}.cls", label)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def ihdr(width: int, height: int, *, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks: bytes) -> bytes:
    return PNG_SIGNATURE + b"".join(chunks) + chunk(b"IEND", b"")


def png_of(rows: bytes, height: int, header: bytes, *extra: bytes) -> bytes:
    """A PNG of packed rows, each unfiltered."""
    length = len(rows) // height
    filtered = b"".join(b"\0" + rows[k * length : (k + 1) * length] for k in range(height))
    return png(header, *extra, chunk(b"IDAT", zlib.compress(filtered)))


def adam7(pixels: np.ndarray) -> bytes:
    """An interlaced RGB PNG of uint8 [H, W, 3]."""
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    data = b""
    for y, dy, x, dx in passes:
        part = pixels[y::dy, x::dx]
        data += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    return png(ihdr(pixels.shape[1], pixels.shape[0], interlace=1), chunk(b"IDAT", zlib.compress(data)))


def bmp(width: int, height: int, *, packed: bytes = b"") -> bytes:
    """A BMP header, and nothing behind it; or 8-bit pixels run-length coded in `packed`."""
    depth, compression = (8, 1) if packed else (24, 0)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, compression, len(packed), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(packed), 0, 0, 54) + info + packed


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def flat_jpeg(width: int, height: int, *, sampling: list[tuple[int, int]], frame: int = 0xC0) -> bytes:
    """A baseline JPEG whose first component is 170 everywhere, the others 128; any sampling factors."""
    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([16] * 64))
    components = b"".join(bytes([k + 1, h << 4 | v, 0]) for k, (h, v) in enumerate(sampling))
    out += segment(frame, struct.pack(">BHHB", 8, height, width, len(sampling)) + components)
    out += segment(0xC4, b"\0" + bytes([1, 1] + [0] * 14) + b"\0\5")  # DC: 0 -> no change, 10 -> five bits
    out += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0")  # AC: 0 -> end of block
    out += segment(0xDA, bytes([len(sampling)]) + b"".join(bytes([k + 1, 0]) for k in range(len(sampling))) + b"\0?\0")
    most_h, most_v = (max(s[k] for s in sampling) for k in (0, 1))
    blocks = -(-width // (8 * most_h)) * -(-height // (8 * most_v)) * sum(h * v for h, v in sampling)
    return out + _packed("10" + "10101" + "0" + "00" * (blocks - 1)) + b"\xff\xd9"


def endless_jpeg(side: int, *, scans: int) -> bytes:
    """A progressive grey JPEG that passes over all its pixels `scans` times and changes nothing."""
    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([16] * 64))
    out += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    for table in (b"\0" + bytes([1] + [0] * 15) + b"\0", b"\x10" + bytes([1] + [0] * 15) + b"\xe0"):
        out += segment(0xC4, table)
    blocks = (side // 8) ** 2
    empty = _packed(("0" + "1" * 14) * -(-blocks // 32767))  # runs of 32,767 blocks without a coefficient
    out += segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8))
    for k in range(scans):
        out += segment(0xDA, bytes([1, 1, 0, k % 63 + 1, k % 63 + 1, 0])) + empty
    return out + b"\xff\xd9"


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def webp(kind: bytes, width: int, height: int) -> bytes:
    """The header of a WebP, and little behind it."""
    if kind == b"VP8X":
        body = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + bytes(8)
    else:
        body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(8)
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
