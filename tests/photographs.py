"""A folder of photographs as people have them: crops of those that scikit-image and scikit-learn bring along.

    photograph_folder(tmp_path / "photos", images=600, seed=0)     # root/CLASS/NUMBER.ending, in eight formats
    photograph_folder(tmp_path / "photos", counts=LONG_TAIL)       # 600 of 12 classes, 200 to 3 images
    add_bad_files(tmp_path / "photos")                             # twenty files of twelve kinds beside them

Formats: JPEG (also .jfif, CMYK, turned by EXIF), MPO, PNG (also with a palette, of 16 bits), WebP, BMP, TIFF (also of
16 bits, with JPEG inside), GIF and PPM. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.build.hostile import ihdr, png

CLASSES = ("astronaut", "cat", "china", "coffee", "flower", "rocket")
SHARES = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)  # of the images: a long tail
LONG_TAIL = {
    "astronaut": 200, "cat": 132, "china": 88, "coffee": 60, "flower": 41, "rocket": 28, "galaxies": 19, "tissue": 12,
    "retina": 8, "brick": 5, "camera": 4, "grass": 3,
}  # fmt: skip


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """uint8 [H, W, 3] for each of CLASSES."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    return data.astronaut(), data.chelsea(), china, data.coffee(), flower, data.rocket()


@cache
def photograph_of(name: str) -> np.ndarray:
    """uint8 [H, W, 3] for each class of LONG_TAIL."""
    from skimage import data

    if name in CLASSES:
        return photographs()[CLASSES.index(name)]
    loaders = {"galaxies": data.hubble_deep_field, "tissue": data.immunohistochemistry}
    photo = (loaders.get(name) or getattr(data, name))()
    return photo if photo.ndim == 3 else np.stack([photo] * 3, axis=-1)


def photograph_folder(
    root: Path, images: int = 600, seed: int = 0, *, counts: dict[str, int] | None = None
) -> dict[str, int]:
    """Write `images` crops, no two alike, below `root`, or `counts` of each class; how many of each class."""
    rng = np.random.default_rng(seed)
    if counts is None:
        counts = {name: max(int(images * share), 1) for name, share in zip(CLASSES, SHARES, strict=True)}
        counts[CLASSES[0]] += images - sum(counts.values())
    writers = list(WRITERS.items())
    number = 0
    for name, count in counts.items():
        photo = photograph_of(name)
        (root / name).mkdir(parents=True)
        for k in range(count):
            ending, write = writers[number % len(writers)]
            height, width = rng.integers(40, 97, 2)
            top, left = (int(rng.integers(side - 97)) for side in photo.shape[:2])
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            write(crop, root / name / f"{k:04}{ending.partition(' ')[0]}")
            number += 1
    return counts


def _save(kind: str, **options: Any) -> Callable[[Image.Image, Path], None]:
    return lambda crop, path: crop.save(path, kind, **options)


def _save_as(mode: str, kind: str, **options: Any) -> Callable[[Image.Image, Path], None]:
    return lambda crop, path: crop.convert(mode).save(path, kind, **options)


def _save_deep(kind: str) -> Callable[[Image.Image, Path], None]:
    """Grey of 16 bits."""
    return lambda crop, path: Image.fromarray(np.asarray(crop.convert("L")).astype(np.uint16) * 257).save(path, kind)


def _save_turned(crop: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    crop.save(path, "JPEG", quality=92, exif=exif)


def _save_several(crop: Image.Image, path: Path) -> None:
    crop.save(path, "MPO", save_all=True, append_images=[crop.resize((40, 40))])


WRITERS: dict[str, Callable[[Image.Image, Path], None]] = {
    ".jpg": _save("JPEG", quality=92),
    ".png": _save("PNG"),
    ".webp": _save("WEBP", quality=85),
    ".bmp": _save("BMP"),
    ".tif": _save("TIFF", compression="tiff_lzw"),
    ".gif": _save("GIF"),
    ".ppm": _save("PPM"),
    ".JPG of several": _save_several,
    ".jfif": _save("JPEG", quality=80),
    ".jpeg of inks": _save_as("CMYK", "JPEG", quality=92),
    ".jpg turned": _save_turned,
    ".PNG of a palette": _save_as("P", "PNG"),
    ".png deep": _save_deep("PNG"),
    ".webp lossless": _save("WEBP", lossless=True),
    ".TIFF deep": _save_deep("TIFF"),
    ".tiff with a JPEG": _save("TIFF", compression="jpeg"),
}


def add_bad_files(root: Path) -> int:
    """Files beside the images of `photograph_folder` that cannot be used, of twelve kinds; how many."""
    jpeg = next((root / "astronaut").glob("*.jpg")).read_bytes()
    whole = next((root / "astronaut").glob("*.png")).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad = {
        **dict.fromkeys(("astronaut/empty.jpg", "cat/empty.png", "china/empty.webp"), b""),
        **dict.fromkeys(("astronaut/404.jpg", "cat/404.png", "coffee/404.gif"), b"<!doctype html><title>404</title>"),
        **dict.fromkeys(("astronaut/cut 1.jpg", "cat/cut 2.jpg", "rocket/cut 3.jpg"), jpeg[: len(jpeg) // 2]),
        **dict.fromkeys(("flower/cut.png", "rocket/cut.png"), whole[: len(whole) // 2]),
        "coffee/flipped.png": bytes(flipped),
        **dict.fromkeys(("china/power cut.jpg", "flower/power cut.bmp"), bytes(5000)),
        "cat/IMG_0001.HEIC": b"\0\0\0\x18ftypheic" + bytes(100),
        "cat/drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "coffee/bomb.png": png(ihdr(60_000, 60_000)),
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(root / "flower" / "depth.tiff")
    (root / "china" / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "rocket" / "pipe.jpg")
    return len(bad) + 3


def add_other_files(root: Path) -> int:
    """Files that are no images and that nobody means as such; how many."""
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "readme.txt"):
        (root / name).write_bytes(b"not an image")
    (root / "rocket" / "back").symlink_to("..")
    return 5
