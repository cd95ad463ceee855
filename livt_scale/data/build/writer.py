"""Images made smaller once, when the shards are built, so that each epoch decodes less.

    prepared(data, Prepare(resize_shorter=256, quality=92))    -> JPEG whose shorter side has 256 px, upright

What ffcv's users do: a crop of 224 px seldom needs the pixels of a camera. An image whose shorter side is not longer
than that stays as it is, byte for byte; none is made larger. Pillow's bicubic with antialias, then a JPEG by
libjpeg-turbo with its exact DCT: the same bytes whenever these libraries are the same, whoever writes them.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, PositiveInt

from livt_scale.config.runtime import RecipePart
from livt_scale.data.build.sources import Source
from livt_scale.data.build.stored import jpeg_bytes
from livt_scale.data.build.tar import BLOCK, IMAGE_TYPES, read_tar
from livt_scale.data.image.decode import BadImage, decode, open_image
from livt_scale.data.manifest import INDEX, INDEX_DTYPE, KEYS, MANIFEST, FileInfo, ShardInfo, ShardManifest
from livt_scale.util.atomic import new_file, plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, ShardError, SourceError
from livt_scale.util.outside import open_checked


class Prepare(RecipePart):
    """How images are stored. Part of a set in a spec, and recorded with it in the manifest."""

    resize_shorter: PositiveInt = Field(description="px of the shorter side, where it is longer")
    quality: Annotated[int, Field(ge=50, le=100)] = Field(92, description="of the JPEGs that are written")


def prepared(image_type: str, data: bytes, prepare: Prepare) -> tuple[str, bytes]:
    """("jpg", a smaller image) or what was given, where it is small enough. Raises BadImage."""
    image = open_image(data, channels=3)
    shorter = min(image.height, image.width)
    if shorter <= prepare.resize_shorter:
        decode(data)  # an image that does not decode to its end must not come into a shard as a good one
        return image_type, data
    width, height = (round(side * prepare.resize_shorter / shorter) for side in (image.width, image.height))
    pixels = np.asarray(Image.fromarray(image.pixels()).resize((width, height), Image.Resampling.BICUBIC))
    return "jpg", jpeg_bytes(pixels, quality=prepare.quality, subsampling="420")


@dataclass(frozen=True)
class Shard:
    """The entries of one shard in the manifest and the index. In `rows`, key_end counts from this shard's first key."""

    info: ShardInfo
    rows: np.ndarray  # [samples] of INDEX_DTYPE; image_type: which of tar.IMAGE_TYPES
    keys: bytes
    was_there: bool


@dataclass(frozen=True)
class ShardJob:
    """Write the images of `source`, in their order, to `path`."""

    path: Path
    source: Source
    sha256: str | None  # of the shard, where a manifest knows it already
    prepare: Prepare | None = None


def make_shard(job: ShardJob) -> Shard:
    """Write a shard, or keep an existing one with the same keys and labels and the bytes in the manifest."""
    if job.path.exists():
        try:
            found = scan_shard(job.path)
        except DataError:
            found = None  # cut or changed since: it is written again
        if found and job.sha256 in (None, found.info.sha256) and _same_samples(found, job.source):
            return found
    _write(job)
    shard = scan_shard(job.path)
    assert _same_samples(shard, job.source), job.path  # sources check their keys
    return replace(shard, was_there=False)


def scan_shard(path: Path) -> Shard:
    """Read a shard from its beginning to its end. Raises ShardError and SampleError."""
    samples = list(read_tar(path))
    rows = np.zeros(len(samples), dtype=INDEX_DTYPE)
    digest = hashlib.sha256()
    key_end = position = 0
    try:
        with open_checked(path, "shard") as file:
            for k, s in enumerate(samples):
                while position < s.start:  # a file that is not a sample may be large
                    skipped = file.read(min(1 << 20, s.start - position))
                    digest.update(skipped)
                    if not skipped:
                        raise ShardError(f"{path}, offset {position}: it was cut while it was read")
                    position += len(skipped)
                data = file.read(s.nbytes)
                digest.update(data)
                position = s.start + s.nbytes
                key_end += len(s.key.encode())
                image_type = IMAGE_TYPES.index(s.image_type)
                data_offset = s.data_start - s.start
                rows[k] = (s.start, s.nbytes, data_offset, s.data_size, s.label, zlib.crc32(data), image_type, key_end)
            while rest := file.read(1 << 20):
                digest.update(rest)
            num_bytes = file.tell()
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    info = ShardInfo(name=path.name, bytes=num_bytes, sha256=digest.hexdigest(), samples=len(samples))
    return Shard(info, rows, "".join(s.key for s in samples).encode(), was_there=True)


def publish(folder: Path, shards: Sequence[Shard], **facts: Any) -> ShardManifest:
    """Write index, keys and, last, the manifest. `facts`: its name, seed, class_names, class_counts and source."""
    rows = np.concatenate([s.rows for s in shards]) if shards else np.zeros(0, dtype=INDEX_DTYPE)
    lengths = [len(s.keys) for s in shards]
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if shards else np.zeros(0)
    rows["key_end"] += np.repeat(before, [len(s.rows) for s in shards]).astype(np.uint64)
    used = np.unique(rows["image_type"])
    rows["image_type"] = np.searchsorted(used, rows["image_type"])
    files = {INDEX: _npy(rows), KEYS: b"".join(s.keys for s in shards)}
    infos = {n: FileInfo(name=n, bytes=len(b), sha256=hashlib.sha256(b).hexdigest()) for n, b in files.items()}
    manifest = ShardManifest(
        num_samples=len(rows),
        image_types=[IMAGE_TYPES[t] for t in used],
        shards=[s.info for s in shards],
        index=infos[INDEX],
        keys=infos[KEYS],
        **facts,
    )
    for name, contents in [*files.items(), (MANIFEST, manifest.to_bytes())]:
        with plain_disk_errors(folder / name, needed=len(contents)):
            write_atomic(folder / name, contents)
    return manifest


def _same_samples(shard: Shard, source: Source) -> bool:
    keys = "".join(source.key(i) for i in range(len(source))).encode()
    return keys == shard.keys and np.array_equal(shard.rows["label"], source.labels)


def _write(job: ShardJob) -> None:
    from webdataset.writer import TarWriter

    source = job.source
    with plain_disk_errors(job.path), new_file(job.path) as file:
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
            # TarWriter has no encoding and (1.0.2) ignores its format: tarfile's defaults depend on the locale
            tar = writer.tarstream
            tar.format, tar.encoding, tar.errors = tarfile.USTAR_FORMAT, "utf-8", "strict"
            for k in range(len(source)):
                image_type, image = _image(job, k)
                # one call per member: one call for both would sort them, and the image comes first in our shards
                writer.write({"__key__": source.key(k), image_type: image})
                writer.write({"__key__": source.key(k), "cls": b"%d" % source.label(k)})
            end = tar.offset
        file.truncate(end + 2 * BLOCK)  # tarfile pads to a tape's record of 10,240 bytes


def _image(job: ShardJob, k: int) -> tuple[str, bytes]:
    image_type, image = job.source.image(k)
    if job.prepare is None:
        return image_type, image
    try:
        return prepared(image_type, image, job.prepare)
    except BadImage as error:
        raise SourceError(
            f"source {job.source.name}, {job.source.key(k)!r}: {error}", remedy="repair the image, or remove it"
        ) from error


def _npy(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return file.getvalue()
