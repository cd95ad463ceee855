"""Images of every kind are read right, against pixels that were put together by hand; the rest is refused, in bounds.

The policy that these tests hold is the table "Odd and hostile input" of docs/data.md.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from livt_scale.data.image.decode import MAX_PIXELS, BadImage, decode, open_image
from livt_scale.data.image.transforms import EvalTransform
from livt_scale.data.settings import ImageSettings
from tests.data.build.hostile import (
    PNG_SIGNATURE,
    adam7,
    bmp,
    chunk,
    endless_jpeg,
    flat_jpeg,
    ihdr,
    png,
    png_of,
    sample,
    saved,
    segment,
    tar,
    webp,
)
from tests.data.tiny_sets import encoded, photo, tiny_recipe

PHOTO = photo(40, 56)
GREY = PHOTO[:, :, 0]
JPEG, PNG = encoded(PHOTO), encoded(PHOTO, "PNG")
PIXELS = np.array(Image.open(io.BytesIO(JPEG)))  # Pillow's own decoding of the whole JPEG
DEEP = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29  # 0 … 64,931
CMYK = saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95)
PALETTE = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
FOUR_BITS = np.random.default_rng(1).integers(0, 16, (40, 56), dtype=np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def big_endian(array: np.ndarray) -> bytes:
    return array.astype(">u2").tobytes()


def packed(values: np.ndarray, bits: int) -> bytes:
    """[H, W] of small numbers, `bits` each, as rows of a PNG."""
    spread = np.unpackbits(values[:, :, None], axis=2)[:, :, 8 - bits :]
    return np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()


def after_sos(data: bytes) -> int:
    return data.index(b"\xff\xda") + 14


def with_segments(data: bytes, *added: bytes) -> bytes:
    return data[:2] + b"".join(added) + data[2:]


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def moving(kind: str, **options) -> bytes:
    frames = [Image.fromarray(photo(40, 56, seed=seed)) for seed in (1, 2)]
    return saved(Image.fromarray(PHOTO), kind, save_all=True, append_images=frames, **options)


APP0 = JPEG[2:20]
ZEROS = zlib.compress(bytes(200 << 20))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
YCCK = CMYK.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
DEEP_RGB = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=2)
ALPHA = np.full((40, 56, 1), 7, dtype=np.uint16)

READ = {
    "16-bit grey": (png_of(big_endian(DEEP), 40, ihdr(56, 40, depth=16, colour=0)), rgb(DEEP >> 8)),
    "16-bit RGB": (png_of(big_endian(DEEP_RGB), 40, ihdr(56, 40, depth=16)), DEEP_RGB >> 8),
    "16-bit grey and alpha": (
        png_of(big_endian(np.concatenate([DEEP[:, :, None], ALPHA], 2)), 40, ihdr(56, 40, depth=16, colour=4)),
        rgb(DEEP >> 8),
    ),
    "16-bit RGBA": (
        png_of(big_endian(np.concatenate([DEEP_RGB, ALPHA], 2)), 40, ihdr(56, 40, depth=16, colour=6)),
        DEEP_RGB >> 8,
    ),
    "1-bit": (png_of(packed(FOUR_BITS & 1, 1), 40, ihdr(56, 40, depth=1, colour=0)), rgb((FOUR_BITS & 1) * 255)),
    "2-bit grey": (png_of(packed(FOUR_BITS & 3, 2), 40, ihdr(56, 40, depth=2, colour=0)), rgb((FOUR_BITS & 3) * 85)),
    "4-bit grey": (png_of(packed(FOUR_BITS, 4), 40, ihdr(56, 40, depth=4, colour=0)), rgb(FOUR_BITS * 17)),
    "palette": (
        png_of(packed(FOUR_BITS, 4), 40, ihdr(56, 40, depth=4, colour=3), chunk(b"PLTE", PALETTE.tobytes())),
        PALETTE[FOUR_BITS],
    ),
    "palette with transparency": (
        png_of(
            packed(FOUR_BITS, 4),
            40,
            ihdr(56, 40, depth=4, colour=3),
            chunk(b"PLTE", PALETTE.tobytes()),
            chunk(b"tRNS", bytes(range(0, 256, 16))),
        ),
        PALETTE[FOUR_BITS],
    ),
    "a transparent colour": (
        png_of(PHOTO.tobytes(), 40, ihdr(56, 40), chunk(b"tRNS", struct.pack(">HHH", *PHOTO[0, 0].tolist()))),
        PHOTO,
    ),
    "RGBA": (png_of(np.dstack([PHOTO, GREY]).tobytes(), 40, ihdr(56, 40, colour=6)), PHOTO),
    "LA": (png_of(np.dstack([GREY, GREY]).tobytes(), 40, ihdr(56, 40, colour=4)), rgb(GREY)),
    "interlaced": (adam7(PHOTO), PHOTO),
    "pixels in one-byte chunks": (
        png(ihdr(56, 40), *(chunk(b"IDAT", bytes([b])) for b in zlib.compress(b"\0" * (56 * 3 + 1) * 40))),
        np.zeros_like(PHOTO),
    ),
    "surplus pixels": (png(ihdr(4, 4), chunk(b"IDAT", ZEROS)), np.zeros((4, 4, 3), np.uint8)),
    "an animated PNG": (moving("PNG"), PHOTO),
    "a PNG with something behind its end": (PNG + b"<script>", PHOTO),
    "an ICC profile in a PNG": (saved(Image.fromarray(PHOTO), "PNG", icc_profile=SRGB), PHOTO),
    "a BMP": (encoded(PHOTO, "BMP"), PHOTO),
    "a WebP": (saved(Image.fromarray(PHOTO), "WEBP", lossless=True), PHOTO),
    "an animated WebP": (moving("WEBP", lossless=True), PHOTO),
    "an ICC profile in a JPEG": (encoded(PHOTO, icc_profile=SRGB), PIXELS),
    "CMYK": (CMYK, pillow_rgb(CMYK)),
    "YCCK": (YCCK, pillow_rgb(YCCK)),
    "CMYK that no Adobe program wrote": (
        flat_jpeg(30, 20, sampling=[(1, 1)] * 4),
        pillow_rgb(flat_jpeg(30, 20, sampling=[(1, 1)] * 4)),
    ),
    "a JPEG of one component": (flat_jpeg(30, 20, sampling=[(1, 1)]), np.full((20, 30, 3), 170, np.uint8)),
    "4:1:0 sampling": (flat_jpeg(60, 20, sampling=[(4, 1), (1, 1), (1, 1)]), np.full((20, 60, 3), 170, np.uint8)),
    "a progressive JPEG": (encoded(PHOTO, progressive=True), pillow_rgb(encoded(PHOTO, progressive=True))),
    "restart marks": (encoded(PHOTO, restart_marker_blocks=2), PIXELS),
    "bytes between the segments of a JPEG": (b"\xff\xd8" + APP0 + b"ab" + JPEG[2 + len(APP0) :], PIXELS),
    "surplus bytes before the end of a JPEG": (JPEG[:-2] + b"\0\0\0\0\0\0\0\0" + JPEG[-2:], PIXELS),
    "a JPEG with something behind its end": (JPEG + JPEG[: len(JPEG) // 2] + b"PK\3\4", PIXELS),
    "an unknown JFIF version": (JPEG.replace(b"JFIF\0\1", b"JFIF\0\7", 1), PIXELS),
    "a scan that says it held a part": (JPEG[: after_sos(JPEG) - 3] + b"\0\0\0" + JPEG[after_sos(JPEG) :], PIXELS),
    "a JPEG of two pictures": (moving("MPO", quality=90), PIXELS),
    "a JPEG with a broken EXIF": (with_segments(JPEG, segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")), PIXELS),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("channels", [3, 1])
def test_an_odd_image_is_read_right(case, channels):
    data, expected = READ[case]
    pixels = decode(data, channels=channels)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (*expected.shape[:2], channels))
    if channels == 3:
        np.testing.assert_array_equal(pixels, expected)
    else:  # a JPEG's own luma, and luma from inks, differ from luma reckoned from RGB by rounding
        grey = np.array(Image.fromarray(expected.astype(np.uint8)).convert("L"), dtype=int)
        assert np.abs(pixels[:, :, 0] - grey).max() <= 3


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As a camera stores what is seen as `pixels`: the EXIF standard's table of where row 0 and column 0 are."""
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: np.rot90(p, -1),
    }
    return np.ascontiguousarray(stored[orientation](pixels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "a late JPEG", "CMYK"])
def test_all_eight_orientations_are_seen_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(turned(PHOTO, orientation))
    if kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        np.testing.assert_array_equal(decode(saved(image, kind, exif=exif, **options)), PHOTO)
        return
    data = saved(image.convert("CMYK") if kind == "CMYK" else image, "JPEG", exif=exif, quality=98, subsampling=0)
    if kind == "a late JPEG":  # behind 180 KB of other things
        data = with_segments(data, *[segment(0xEC, bytes(60000))] * 3)
    assert np.abs(decode(data).astype(int) - PHOTO).mean() < 3


def cut(data: bytes, share: float) -> bytes:
    """The first part, and behind it the mark that says all is there."""
    start = after_sos(data)
    return data[: start + int((len(data) - start) * share)] + b"\xff\xd9"


FOUR_INK_DAMAGE = cut(CMYK, 0.5)
ODDITY = READ["bytes between the segments of a JPEG"][0]
RESTARTS = READ["restart marks"][0]
ONE_BLOCK = flat_jpeg(8, 8, sampling=[(1, 1)])
FOUR_BY_FOUR = chunk(b"IDAT", zlib.compress(bytes(52)))
MEGABYTE = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))
ODD_SAMPLING = flat_jpeg(30, 20, sampling=[(3, 1), (1, 1), (1, 1)])

REFUSED = {
    "nothing": (b"", "not an image"),
    "a JPEG cut in its pixels": (JPEG[: len(JPEG) // 2], "cut or damaged"),
    "a JPEG cut in its pixels, with an end mark": (cut(JPEG, 0.5), "cut or damaged"),
    "a CMYK JPEG cut, with an end mark": (FOUR_INK_DAMAGE, "cut or damaged"),
    "a JPEG with a harmless oddity cut, with an end mark": (cut(ODDITY, 0.5), "cut or damaged"),
    "a progressive JPEG cut, with an end mark": (cut(READ["a progressive JPEG"][0], 0.9), "cut or damaged"),
    "a JPEG whose restart marks are out of order": (RESTARTS.replace(b"\xff\xd3", b"\xff\xd6", 1), "cut or damaged"),
    "a JPEG with pixels struck out": (JPEG[:-400] + b"\xff\xd9" * 200, "cut or damaged"),
    "odd chroma sampling": (ODD_SAMPLING, "subsampling"),
    "a JPEG of two components": (flat_jpeg(30, 20, sampling=[(1, 1)] * 2), "not an image"),
    "a lossless JPEG": (flat_jpeg(30, 20, sampling=[(1, 1)], frame=0xC3), "JPEG"),
    "a JPEG without height": (flat_jpeg(30, 0, sampling=[(1, 1)]), "not an image"),
    "a JPEG of 65,500 x 65,500": (ONE_BLOCK.replace(b"\0\x08\0\x08", b"\xff\xdc\xff\xdc", 1), "67,108,864"),
    "a JPEG of endless scans": (endless_jpeg(8192, scans=5000), "5,001 scans"),
    "a PNG of 65,500 x 65,500": (png(ihdr(65500, 65500), chunk(b"IDAT", zlib.compress(bytes(100)))), "67,108,864"),
    "a PNG of 2^31 x 1": (png(ihdr(2**31 - 1, 1), chunk(b"IDAT", zlib.compress(bytes(100)))), "65,536"),
    "a PNG of no pixels": (png(ihdr(0, 0), chunk(b"IDAT", zlib.compress(b""))), "none"),
    "a PNG whose profile unpacks to 200 MB": (png(ihdr(4, 4), chunk(b"iCCP", b"x\0\0" + ZEROS), FOUR_BY_FOUR), "large"),
    "a PNG whose text unpacks to 200 MB": (png(ihdr(4, 4), chunk(b"zTXt", b"x\0\0" + ZEROS), FOUR_BY_FOUR), "large"),
    "a PNG of a thousand texts of 1 MB": (png(ihdr(4, 4), *[MEGABYTE] * 1000, FOUR_BY_FOUR), "Too much memory"),
    "a PNG of a million chunks": (PNG_SIGNATURE + ihdr(4, 4) + chunk(b"IDAT", b"") * 1_000_000, "chunks"),
    "a PNG with too few pixels": (png(ihdr(4, 4), chunk(b"IDAT", zlib.compress(bytes(20)))), "cut or damaged"),
    "a PNG without pixels": (png(ihdr(4, 4)), "cut or damaged"),
    "a PNG without its palette": (png_of(packed(FOUR_BITS, 4), 40, ihdr(56, 40, depth=4, colour=3)), "palette is"),
    "a PNG without a header": (png(chunk(b"IDAT", b"")), "does not begin with its header"),
    "a PNG with a changed pixel byte": (PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:], "checksum"),
    "a PNG that claims a chunk of 2 GB": (PNG[:33] + struct.pack(">I", 2**31 - 1) + PNG[37:], "cut in a chunk"),
    "a WebP canvas of 2^24 x 16": (webp(b"VP8X", 2**24, 16), "65,536"),
    "a lossless WebP of 16,384 x 16,384": (webp(b"VP8L", 16384, 16384), "67,108,864"),
    "a WebP of 16,383 x 16,383": (webp(b"VP8 ", 16383, 16383), "67,108,864"),
    "a WebP of nothing": (webp(b"VP8X", 30, 20), "not an image"),
    "a GIF": (saved(Image.fromarray(PHOTO), "GIF"), "not an image"),
    "an animated GIF": (moving("GIF"), "not an image"),
    "a TIFF": (saved(Image.fromarray(PHOTO), "TIFF"), "not an image"),
    "a PostScript program": (saved(Image.fromarray(PHOTO), "EPS"), "not an image"),
    "an icon": (saved(Image.fromarray(PHOTO), "ICO"), "not an image"),
    "a PSD": (b"8BPS\0\1" + bytes(200), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "a pickle": (b"\x80\x04\x95", "not an image"),
    "a tar": (tar(sample("a", PNG)), "not an image"),
    "a zip": (b"PK\3\4" + bytes(100), "not an image"),
    "a BMP of 65,500 x 65,500": (bmp(65500, 65500), "not an image"),
    "a BMP of 9,000 x 9,000": (bmp(9000, 9000), "67,108,864"),
    "a BMP of less than no width": (bmp(-4, 4), "not an image"),
    "a packed BMP of 64 million pixels with 2,000 bytes": (bmp(8000, 8000, packed=b"\xff\0" * 1000), "cut or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_image_is_refused_in_one_clear_line(case):
    data, said = REFUSED[case]
    with pytest.raises(BadImage, match=said) as error:
        decode(data)
    assert "\n" not in str(error.value)
    with pytest.raises(BadImage):
        decode(data, channels=1)


IN_BOUNDS = """
import json, pickle, resource, sys, time
from pathlib import Path
from livt_scale.data.image.decode import BadImage, decode
decode(Path(sys.argv[1]).joinpath("warm.png").read_bytes())
def peak_mib():  # ru_maxrss would begin with what the parent had
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak_mib()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
slow = {}
for path in sorted(Path(sys.argv[1]).glob("*.bad")):
    data, start = path.read_bytes(), time.process_time()
    try:
        decode(data)
    except BadImage:
        pass
    slow[path.name] = time.process_time() - start
print(json.dumps({"grown_mib": peak_mib() - before, "slowest_s": max(slow.values()), "cases": len(slow)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux alone")
def test_refusing_takes_little_memory_and_time(tmp_path):
    (tmp_path / "warm.png").write_bytes(PNG)
    for number, (data, _) in enumerate([*REFUSED.values(), *READ.values()]):
        (tmp_path / f"{number}.bad").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", IN_BOUNDS, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["cases"] == len(REFUSED) + len(READ)
    assert seen["grown_mib"] < 100  # the largest image among them has 12 MB


ANY = [
    JPEG,
    PNG,
    CMYK,
    ODDITY,
    RESTARTS,
    adam7(PHOTO[:16, :16]),
    *(READ[name][0] for name in ("16-bit RGB", "palette with transparency", "a progressive JPEG", "a WebP", "a BMP")),
    encoded(PHOTO, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
]


@settings(max_examples=300)
@given(
    data=st.sampled_from(ANY),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    end=st.floats(0, 1),
    swap=st.tuples(*[st.floats(0, 1)] * 3),
    again=st.booleans(),
)
def test_any_mutation_of_an_image_gives_pixels_or_bad_image_and_nothing_else(data, places, end, swap, again):
    mutated = bytearray(data)
    for where, byte in places:
        mutated[int(where * len(mutated))] = byte
    if again:  # a piece comes twice
        a, b, c = (int(x * len(mutated)) for x in sorted(swap))
        mutated = mutated[:b] + mutated[a:b] + mutated[c:]
    mutated = mutated[: max(1, int(end * len(mutated)))]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for channels in (1, 3):
            try:
                image = open_image(bytes(mutated), channels=channels)
                assert image.pixels().shape == (image.height, image.width, channels)
            except BadImage as error:
                told += [] if str(error).isprintable() else [error]
    assert not told  # a weeks-long run would fill its log


@settings(max_examples=150)
@given(data=st.sampled_from([JPEG, PNG, CMYK, ODDITY, RESTARTS]), share=st.floats(0, 1, exclude_max=True))
def test_what_is_cut_is_never_half_a_picture_even_with_its_end_put_back(data, share):
    end = chunk(b"IEND", b"") if data is PNG else b"\xff\xd9"
    for shortened in (data[: int(share * len(data))], data[: int(share * len(data))] + end):
        try:
            pixels = decode(shortened)
        except BadImage:
            continue
        np.testing.assert_array_equal(pixels, decode(data))  # only what follows the last pixel is gone


def test_what_pillow_is_set_to_elsewhere_does_not_matter(monkeypatch):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # nothing that we import turns it on
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for case in ("a PNG of 65,500 x 65,500", "a WebP canvas of 2^24 x 16", "a CMYK JPEG cut, with an end mark"):
        with pytest.raises(BadImage, match=REFUSED[case][1]):
            decode(REFUSED[case][0])
    for data in (PNG[:-600], PNG[:-600] + chunk(b"IEND", b"")):
        with pytest.raises(BadImage):
            decode(data)


def test_a_bomb_below_pillows_limit_and_above_ours_is_an_error_with_warnings_off():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImage, match="67,108,864"):
            decode(png(ihdr(MAX_PIXELS // 8192 + 1, 8192), chunk(b"IDAT", zlib.compress(bytes(100)))))


@pytest.mark.parametrize(("height", "width"), [(1, 60000), (60000, 1), (3, 5000)])
def test_a_strip_is_evaluated_without_resizing_all_of_it(height, width, tmp_path, monkeypatch):
    import torch

    made: list[int] = []
    empty = torch.empty

    def watched(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        made.append(tensor.numel())
        return tensor

    strip = np.zeros((height, width, 3), np.uint8)
    strip[height // 2 :, width // 2 :] = 255
    slot = torch.zeros((3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", watched)
    EvalTransform(ImageSettings.of_recipe(tiny_recipe(tmp_path)))(encoded(strip, "PNG"), slot)
    assert max(made) < 40 * 40 * 3 * 20
    assert (slot[:, -1, -1].int() - slot[:, 0, 0].int()).min() > 100  # the edge is in the middle, where it was


def test_the_middle_of_a_strip_looks_as_if_all_of_it_were_resized(tmp_path):
    import torch
    from torchvision.transforms.v2 import functional as tv

    pixels = photo(20, 20 * 30)
    slot = torch.zeros((3, 32, 32), dtype=torch.uint8)
    EvalTransform(ImageSettings.of_recipe(tiny_recipe(tmp_path)))(encoded(pixels, "PNG"), slot)
    whole = tv.resize(torch.from_numpy(pixels).permute(2, 0, 1), [36], interpolation=tv.InterpolationMode.BICUBIC)
    reference = tv.center_crop(whole, [32, 32])
    assert (slot.int() - reference.int()).abs().float().mean() < 2
