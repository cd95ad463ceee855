"""CIFAR-10 and CIFAR-100 in their binary version, which needs no unpickling; images become colour PNGs.

    CIFAR-10   data_batch_1.bin … data_batch_5.bin, test_batch.bin     records of 1 + 3072 bytes: label, pixels
    CIFAR-100  train.bin, test.bin                                     2 + 3072: coarse label, fine label, pixels

Pixels are planes of red, green and blue, 32 rows each. The Python version holds pickles and is not read.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from livt_scale.data.build.sources import Indices, Source, Stamps, checked, stamps_of
from livt_scale.util.errors import SourceError
from livt_scale.util.outside import read_checked

SIDE_PX = 32
PIXELS = 3 * SIDE_PX**2
LABEL_BYTES = {10: 1, 100: 2}  # by the number of classes; the last one is the class
MAX_BYTES = 1 << 30  # it is kept in memory; CIFAR's own have 154 MB


@dataclass(frozen=True)
class CifarSource(Source):
    """Colour images of 32 px, in records of one or more files."""

    files: tuple[Path, ...]
    record_bytes: int
    numbers: Indices  # of the images, over all files in their order
    made_from_arrays: ClassVar[bool] = True

    def key(self, i: int) -> str:
        return f"{self.name}-{self.numbers[i]:06d}"

    def image(self, i: int) -> tuple[str, bytes]:
        # [3, 32, 32] -> [32, 32, 3]
        pixels = np.frombuffer(self.raw(i), np.uint8).reshape(3, SIDE_PX, SIDE_PX).transpose(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, "png", optimize=True)
        return "png", png.getvalue()

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])

    def raw(self, i: int) -> bytes:
        number = int(self.numbers[i])
        for file in self.files:
            records = _records(file, self.record_bytes)
            if number < len(records):
                break
            number -= len(records)
        return records[number, -PIXELS:].tobytes()

    def stamps(self) -> Stamps | None:
        files = stamps_of(self.files)
        return np.repeat([[files[:, 0].sum(), files[:, 1].max()]], len(self), axis=0)  # one that changed is all


def open_cifar(
    name: str,
    root: Path,
    *,
    files: Sequence[str],
    classes: Literal[10, 100],
    class_names: tuple[str, ...] | None = None,
) -> CifarSource:
    """The images of `files` below `root`, one file after the other. Raises SourceError."""
    paths = tuple(root / file for file in files)
    label_bytes = LABEL_BYTES[classes]
    records = [_records(path, label_bytes + PIXELS) for path in paths]
    labels = np.concatenate([block[:, label_bytes - 1] for block in records]).astype(np.int64)
    names = class_names or tuple(str(c) for c in range(classes))
    return checked(
        CifarSource(name, names, labels, paths, label_bytes + PIXELS, np.arange(len(labels), dtype=np.int64))
    )


def _records(path: Path, record_bytes: int) -> NDArray[np.uint8]:
    """[n, record_bytes], kept between calls for as long as the file is the same."""
    try:
        found = path.stat()
    except OSError as error:
        python = path.with_suffix("")
        if python.is_file():
            raise SourceError(
                f"{python} is of the Python version, which holds pickles and could run code: it is not read",
                remedy="get the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)",
            ) from None
        raise SourceError(
            f"{path}: {error.strerror}", remedy="unpack the binary version, or give its folder: --source NAME=FOLDER"
        ) from error
    try:
        return _read(path, record_bytes, found.st_mtime_ns)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", remedy="give the files of CIFAR's binary version") from error


@lru_cache(maxsize=8)
def _read(path: Path, record_bytes: int, _mtime_ns: int) -> NDArray[np.uint8]:
    data = read_checked(path, "IDX file", max_bytes=MAX_BYTES)
    if not data or len(data) % record_bytes:
        raise SourceError(
            f"{path} has {len(data):,} bytes, no multiple of a record's {record_bytes:,}: cut, or another set's",
            remedy="get it again from where it came; CIFAR-10 has records of 3,073 bytes, CIFAR-100 of 3,074",
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, record_bytes)
