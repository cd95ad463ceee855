"""Grey images and labels in the IDX format, .gz or not, as MNIST and Fashion-MNIST publish them; images become PNGs.

    two zero bytes, type 8 (unsigned byte), number of dims, each dim as big-endian u4, data

Source: LeCun et al. 1998, http://yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from livt_scale.data.build.sources import Indices, Source, Stamps, checked, numbered_names, stamps_of
from livt_scale.util.errors import SourceError
from livt_scale.util.outside import read_checked

_MAX_IDX_BYTES = 1 << 31  # it is kept in memory; EMNIST, the largest known, has 640 MB


@dataclass(frozen=True)
class IdxSource(Source):
    """Grey images of one size in one file of the IDX format, labels in another."""

    images: Path
    numbers: Indices  # of the images, in the file
    made_from_arrays: ClassVar[bool] = True

    def key(self, i: int) -> str:
        return f"{self.name}-{self.numbers[i]:06d}"

    def image(self, i: int) -> tuple[str, bytes]:
        png = io.BytesIO()
        Image.fromarray(_read_idx(self.images)[self.numbers[i]]).save(png, "png", optimize=True)
        return "png", png.getvalue()

    def part(self, indices: Indices) -> Self:
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])

    def raw(self, i: int) -> bytes:
        return _read_idx(self.images)[self.numbers[i]].tobytes()

    def stamps(self) -> Stamps | None:
        return np.repeat(stamps_of([self.images]), len(self), axis=0)


def open_idx(name: str, images: Path, *, labels: Path, class_names: tuple[str, ...] | None = None) -> IdxSource:
    """IDX images [n, height, width] and labels [n], unsigned bytes, gzipped or not."""
    pixels, targets = _read_idx(images), _read_idx(labels)
    if pixels.ndim != 3 or targets.ndim != 1 or len(pixels) != len(targets):
        raise SourceError(
            f"{images} has the shape {list(pixels.shape)} and {labels} {list(targets.shape)}",
            remedy="give images [n, height, width] and as many labels [n]",
        )
    wide = targets.astype(np.int64)
    return checked(
        IdxSource(name, numbered_names(class_names, wide), wide, images, np.arange(len(wide), dtype=np.int64))
    )


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file, kept between calls for as long as the file is the same."""
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}", remedy="install or copy the data set, or give its folder: --source NAME=FOLDER"
        ) from error
    return _parse_idx(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _parse_idx(path: Path, _mtime_ns: int, _size: int) -> NDArray[np.uint8]:
    """The array in an IDX file: two zero bytes, type 8 (unsigned byte), number of dims, dims as big-endian u4, data."""
    remedy = "get it again from where it came"
    try:
        data = read_checked(path, "IDX file")
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_IDX_BYTES + 1)  # a gigabyte of zeros takes a megabyte
        if len(data) > _MAX_IDX_BYTES:
            raise SourceError(f"{path}: more than {_MAX_IDX_BYTES:,} bytes", remedy="make a folder of images of it")
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be read: {error}", remedy=remedy) from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise SourceError(f"{path} is not an IDX file of unsigned bytes", remedy=remedy)
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=data[3], offset=4))
    begin, size = 4 + 4 * data[3], int(np.prod([int(n) for n in shape], dtype=object))
    if len(data) - begin != size:
        raise SourceError(
            f"{path}: {len(data) - begin:,} bytes of data, its header {shape} says {size:,}", remedy=remedy
        )
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
