"""Small raw data sets and shards for tests: noise images, so that equal bytes mean the same image."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec


def encoded(seed: int, *, kind: str = "png", px: int = 6) -> bytes:
    """A noise image as PNG or JPEG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_idx(path: Path, array: np.ndarray, *, packed: bool = True) -> Path:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return path


def write_idx_set(folder: Path, labels: list[int], *, px: int = 4) -> Path:
    """images.gz and labels.gz in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), px, px), dtype=np.uint8)
    write_idx(folder / "images.gz", pixels)
    write_idx(folder / "labels.gz", np.array(labels, dtype=np.uint8))
    return folder


def write_image_folder(root: Path, counts: dict[str, int], *, kind: str = "png") -> Path:
    """root/CLASS/NUMBER.png; every image is another one."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k:04d}.{kind}").write_bytes(encoded(seed, kind=kind))
            seed += 1
    return root


def write_idx_spec(folder: Path, labels: list[int], *, sets: str, name: str = "small") -> Path:
    """A spec with one IDX source, "raw", beside it; `sets`: what stands below `sets:`, as YAML in one line."""
    write_idx_set(folder / "raw", labels)
    path = folder / "small.yaml"
    path.write_text(
        f"name: {name}\nseed: 3\nsources:\n  raw: {{idx: {{root: raw, images: images.gz, labels: labels.gz}}}}\n"
        f"sets: {sets}\n"
    )
    return path


def small_set(folder: Path, *, labels: list[int] | None = None, shard_samples: int = 8) -> Path:
    """The folder of one built set, "all"; by default 20 images of 3 classes in 3 shards."""
    labels = labels or [0] * 12 + [1] * 6 + [2] * 2
    folder.mkdir(parents=True, exist_ok=True)
    spec = write_idx_spec(folder, labels, sets=f"{{all: {{source: raw, shard_samples: {shard_samples}}}}}")
    build(load_spec(spec), folder / "out", workers=1)
    return folder / "out" / "all"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
