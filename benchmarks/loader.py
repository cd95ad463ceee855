"""Images a second from shards to a normalised batch: ours against the usual pipeline, and the limit of decoding.

    python benchmarks/loader.py --json loader.json       # some minutes on two cores
    python benchmarks/loader.py --quick                  # half a minute: does it run?

Real JPEGs, about 500 x 375 px at quality 90, cut from photographs that scikit-image and scikit-learn ship; written as
shards by our own builder, read by both. MAE's transform at 224 px: random resized crop (scale 0.2 to 1, bicubic),
flip, normalise. The usual: `webdataset.WebDataset`, Pillow, torchvision's transforms, a DataLoader's own batching, as
in the documents of webdataset and in MAE's code. Both have the same number of loader processes and end with the same
thing, a normalised float32 batch in the main process; ours normalises there (on a GPU it would there, for free:
`ours_uint8` stops before). `decode_only` is simplejpeg in the same processes and nothing else. Rounds are taken in
turn, so that a busy machine slows all; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import transforms

from livt_scale.data.loader import normalise, train_batches
from livt_scale.data.manifest import ShardSet
from livt_scale.data.shard_spec import load_spec
from livt_scale.data.shards import build
from livt_scale.data.stream import read_sample
from livt_scale.recipe import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64
PREFETCH = 4
QUALITY = 90
PACKAGES = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy")

Pipeline = Callable[[ShardSet, int], contextlib.AbstractContextManager[Iterator[int]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="loader processes")
    parser.add_argument("--images", type=int, default=4096, help="images a round and pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images, one round: figures without meaning")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.rounds = min(options.images, 256), 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="livt-loader-") as folder:
        shards = make_shards(Path(folder), num_images=64 if options.quick else 512)
        rates = measure(shards, workers=options.workers, images=options.images, rounds=options.rounds)
        result = report(rates, conditions(shards, options))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3] each; all come with the packages, nothing is downloaded."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]


def make_shards(folder: Path, *, num_images: int) -> ShardSet:
    """Cuts of the photographs as JPEGs, one class a photograph, and the shards of them."""
    rng = np.random.default_rng(0)
    photos = photographs()
    for k in range(num_images):
        photo = Image.fromarray(photos[k % len(photos)])
        size = (500, 375) if k % 4 else (375, 500)  # as in ImageNet, most lie on their side
        share = rng.uniform(0.7, 1.0) * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * share, size[1] * share
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        cut = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        file = folder / "raw" / f"photo{k % len(photos)}" / f"{k:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cut.save(file, "JPEG", quality=QUALITY)
    spec = {
        "name": "photographs",
        "sources": {"cuts": {"folder": {"root": "raw"}}},
        "sets": {"train": {"source": "cuts", "shard_samples": num_images // 16}},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    build(load_spec(folder / "spec.yaml"), folder / "shards", workers=1)
    return ShardSet.open(folder / "shards" / "train")


@contextlib.contextmanager
def ours(shards: ShardSet, workers: int, *, to_floats: bool = True) -> Iterator[Iterator[int]]:
    recipe = Recipe.model_validate(
        {
            "name": "loader",
            "data": {"train": str(shards.folder), "workers": workers, "prefetch": PREFETCH, "mean": MEAN, "std": STD},
            "model": {"size": "vit_b", "image_px": 224},
            "stages": {"pretrain": {"global_batch": BATCH, "micro_batch": BATCH, "epochs": 10**6}},
        }
    )
    with train_batches(
        shards, recipe, stage="pretrain", rank=0, world_size=1, micro_batch=BATCH, epoch=0, step=0
    ) as batches:
        floats = torch.empty((BATCH, 3, 224, 224))

        def sizes() -> Iterator[int]:
            for batch in batches:
                if to_floats:
                    normalise(batch.images, MEAN, STD, torch.float32, out=floats)
                yield len(batch.images)

        yield sizes()


@contextlib.contextmanager
def ours_uint8(shards: ShardSet, workers: int) -> Iterator[Iterator[int]]:
    with ours(shards, workers, to_floats=False) as sizes:
        yield sizes


@contextlib.contextmanager
def usual(shards: ShardSet, workers: int) -> Iterator[Iterator[int]]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    names = [str(shards.folder / shard.name) for shard in shards.manifest.shards]
    dataset = (
        wds.WebDataset(names, shardshuffle=len(names), empty_check=False)
        .repeat()
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
    )
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, prefetch_factor=PREFETCH if workers else None)
    yield (len(images) for images, _ in loader)


class DecodeOnly(IterableDataset[int]):
    """simplejpeg on JPEGs that lie in memory, shared by all processes; yields a number for each batch."""

    def __init__(self, shards: ShardSet) -> None:
        super().__init__()
        self.images = [read_sample(shards, k)[0] for k in range(shards.num_samples)]

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        k = 0 if worker is None else worker.id * 17
        while True:
            for _ in range(BATCH):
                simplejpeg.decode_jpeg(self.images[k % len(self.images)])
                k += 1
            yield BATCH


@contextlib.contextmanager
def decode_only(shards: ShardSet, workers: int) -> Iterator[Iterator[int]]:
    loader = DataLoader(
        DecodeOnly(shards), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None
    )
    yield iter(loader)


PIPELINES: dict[str, Pipeline] = {
    "ours": ours,
    "usual": usual,
    "decode_only": decode_only,
    "ours_uint8": ours_uint8,
}


def measure(shards: ShardSet, *, workers: int, images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each pipeline, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in PIPELINES}
    for _ in range(rounds):
        for name, pipeline in PIPELINES.items():
            with pipeline(shards, workers) as sizes:
                for _ in range(workers * PREFETCH + 2):  # what was prepared while nobody took it is not counted
                    next(sizes)
                done, start = 0, time.perf_counter()
                while done < images:
                    done += next(sizes)
                rates[name].append(done / (time.perf_counter() - start))
                del sizes
    return rates


def conditions(shards: ShardSet, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "transform": "MAE, 224 px: random resized crop 0.2 to 1 bicubic, flip, normalise",
        "jpegs": shards.num_samples,
        "jpeg_px": [500, 375],
        "jpeg_quality": QUALITY,
        "jpeg_bytes_mean": round(float(shards.index["data_size"].mean())),
        "workers": options.workers,
        "batch": BATCH,
        "images_a_round": options.images,
        "rounds": options.rounds,
        "quick": options.quick,
        "storage": "page cache",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def report(rates: dict[str, list[float]], conditions: dict[str, Any]) -> dict[str, Any]:
    medians = {name: statistics.median(of_round) for name, of_round in rates.items()}
    return {
        "images_per_s": {name: round(rate, 1) for name, rate in medians.items()},
        "ratio": round(medians["ours"] / medians["usual"], 3),
        "of_limit": round(medians["ours"] / medians["decode_only"], 3),
        "rounds": {name: [round(rate, 1) for rate in of_round] for name, of_round in rates.items()},
        "conditions": conditions,
    }


def table(result: dict[str, Any]) -> str:
    facts = result["conditions"]
    out = io.StringIO()
    print(
        f"{facts['jpegs']} JPEGs of 500 x 375, {facts['jpeg_bytes_mean']:,} bytes each; {facts['workers']} processes, "
        f"{facts['cores']} cores; median of {facts['rounds']} rounds of {facts['images_a_round']} images",
        file=out,
    )
    print(f"{'pipeline':<14}{'images/s':>10}{'of usual':>10}", file=out)
    for name, rate in result["images_per_s"].items():
        print(f"{name:<14}{rate:>10.0f}{rate / result['images_per_s']['usual']:>10.2f}", file=out)
    return out.getvalue().rstrip()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    sys.exit(main())
