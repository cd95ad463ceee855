"""Decoding: every mode and orientation as Pillow sees it; damage and bombs are refused, never half-decoded."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from livt_scale.data.image.decode import MAX_PIXELS, BadImage, Workspace, decode, open_image, pillow_pixels
from tests.data.tiny_sets import encoded, photo

PHOTO = photo(48, 65)
JPEG, PNG = encoded(PHOTO), encoded(PHOTO, "PNG")


def pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    pixels = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels if mode == "RGB" else pixels[:, :, None]


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 10}])
def test_a_jpeg_has_the_pixels_that_pillow_gives(options):
    data = encoded(PHOTO, "JPEG", **options)
    np.testing.assert_array_equal(decode(data), pillow(data))


def test_colour_is_read_as_grey_and_grey_as_colour():
    grey = encoded(PHOTO[:, :, 0], "PNG"), encoded(PHOTO[:, :, 0])
    for data in grey:
        np.testing.assert_array_equal(decode(data, channels=3), pillow(data))
        np.testing.assert_array_equal(decode(data, channels=1), pillow(data, "L"))
    np.testing.assert_array_equal(decode(PNG, channels=1), pillow(PNG, "L"))
    luma, converted = decode(JPEG, channels=1).astype(int), pillow(JPEG, "L").astype(int)
    assert np.abs(luma - converted).max() <= 2  # the JPEG's own luma, not one reckoned back from RGB


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "PA with bytes"])
def test_every_mode_of_png_becomes_rgb(mode):
    if mode == "PA with bytes":
        image = Image.fromarray(PHOTO).quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
    elif mode == "I;16":
        image = Image.fromarray(PHOTO[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(PHOTO).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    pixels = decode(file.getvalue())
    assert pixels.shape == (48, 65, 3)
    assert pixels.dtype == np.uint8
    if mode == "I;16":
        np.testing.assert_array_equal(pixels[:, :, 1], PHOTO[:, :, 0])
    elif mode != "PA with bytes":
        np.testing.assert_array_equal(pixels, pillow(file.getvalue()))


def test_cmyk_jpegs_become_rgb():
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(file, "JPEG", quality=95)
    pixels = decode(file.getvalue())
    np.testing.assert_array_equal(pixels, pillow(file.getvalue()))
    assert pixels.flags.writeable  # else torch warns of each epoch's first one


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, kind, exif=exif)
    image = open_image(data, channels=3)
    assert (image.height, image.width) == ((65, 48) if orientation >= 5 else (48, 65))
    np.testing.assert_array_equal(image.pixels(), pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_loaded", [False, True])
def test_an_image_that_pillow_holds_is_turned_once(orientation, kind, is_loaded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(photo(21, 33)).save(data, kind, exif=exif)
    image = Image.open(data)
    if is_loaded:
        image.load()
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data.getvalue())))
    assert np.array_equal(pillow_pixels(image, channels=3), np.asarray(upright))


def test_the_contents_decide_what_an_image_is():
    np.testing.assert_array_equal(decode(PNG), PHOTO)  # whatever the member of the tar was called


@settings(max_examples=60)
@given(cut=st.integers(0, max(len(JPEG), len(PNG)) - 1), data=st.sampled_from([JPEG, PNG]))
def test_a_truncated_image_is_an_error_or_complete(cut, data):
    cut %= len(data)
    try:
        pixels = decode(data[:cut])
    except BadImage:
        return
    np.testing.assert_array_equal(pixels, pillow(data))  # only the end mark was cut off
    assert cut >= len(data) - 16


@settings(max_examples=150)
@given(data=st.sampled_from([JPEG, PNG]), where=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
def test_a_damaged_image_raises_nothing_but_bad_image(data, where, byte):
    damaged = bytearray(data)
    damaged[int(where * len(damaged))] ^= byte
    with contextlib.suppress(BadImage):
        assert decode(bytes(damaged)).ndim == 3


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_said_to_be_none(data):
    with pytest.raises(BadImage, match="not an image that can be read"):
        decode(data)


def png_bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(JPEG)
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb, bmp_bomb])
@pytest.mark.parametrize("size", [(50000, 50000), (8193, 8192)])
def test_a_gigapixel_header_is_refused_before_any_pixel(bomb, size, monkeypatch):
    data = bomb(*size)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"more than 67,108,864|exceeds limit|not an image"):
        open_image(data, channels=3)
    assert size[0] * size[1] > MAX_PIXELS


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_shrunken_jpeg_is_the_picture_made_smaller(shrink):
    data = encoded(photo(256, 336, seed=3))
    small = open_image(data, channels=3).pixels(shrink=shrink)
    reference = np.array(Image.fromarray(decode(data)).resize((336 // shrink, 256 // shrink), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - reference).mean() < 1.5
    odd = open_image(encoded(photo(250, 331)), channels=3).pixels(shrink=shrink)
    assert odd.shape == (-(-250 // shrink), -(-331 // shrink), 3)


WAYS = ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_rows": 1})


@settings(max_examples=120)
@given(
    size=st.tuples(st.integers(17, 90), st.integers(8, 60)),
    way=st.sampled_from(WAYS),
    channels=st.sampled_from([1, 3]),
    shrink=st.sampled_from([1, 2, 4, 8]),
    share=st.floats(0.01, 1),
    keeps=st.booleans(),
)
def test_the_rows_above_a_crop_s_bottom_are_those_of_the_whole_image(size, way, channels, shrink, share, keeps):
    image = open_image(encoded(photo(*size), **way), channels=channels)
    bottom = max(1, round(share * size[0]))
    upper = image.pixels(shrink=shrink, workspace=Workspace() if keeps else None, bottom=bottom)
    rows = -(-bottom // shrink)
    assert len(upper) >= rows
    np.testing.assert_array_equal(upper[:rows], image.pixels(shrink=shrink)[:rows])


def test_what_lies_below_a_crop_is_not_decoded():
    assert len(open_image(encoded(photo(200, 120)), channels=3).pixels(bottom=31)) == 32
    assert len(open_image(encoded(photo(200, 120)), channels=3).pixels(bottom=32)) == 48  # its chroma reaches across
    assert len(open_image(encoded(photo(200, 120)), channels=3).pixels(bottom=60, shrink=2)) == 32
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the crop's bottom is the top of what is stored
    assert len(open_image(encoded(photo(200, 120), exif=exif), channels=3).pixels(bottom=31)) == 200


@pytest.mark.parametrize("bottom", [20, 180])
def test_a_file_cut_below_the_crop_is_an_error_all_the_same(bottom):
    whole = encoded(photo(200, 120))
    with pytest.raises(BadImage, match="cut or damaged"):
        open_image(whole[: len(whole) // 2], channels=3).pixels(bottom=bottom)
    ended = open_image(whole[: len(whole) // 2] + b"\xff\xd9", channels=3)  # an end mark where it was cut
    if bottom == 180:
        with pytest.raises(BadImage, match="cut or damaged"):
            ended.pixels(bottom=bottom)
    else:  # nothing that is used was lost
        np.testing.assert_array_equal(ended.pixels(bottom=bottom)[:bottom], decode(whole)[:bottom])


@settings(max_examples=150)
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), bottom=st.integers(1, 60))
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
def test_damage_is_met_as_in_the_whole_image_or_lies_below(where, byte, bottom):
    damaged = bytearray(encoded(photo(64, 48)))
    damaged[int(where * len(damaged))] ^= byte
    try:
        upper = open_image(bytes(damaged), channels=3).pixels(bottom=bottom)
    except BadImage:
        with pytest.raises(BadImage):
            decode(bytes(damaged))
        return
    with contextlib.suppress(BadImage):
        whole = decode(bytes(damaged))
        np.testing.assert_array_equal(upper[:bottom], whole[:bottom])
