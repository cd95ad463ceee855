"""The loaders that people would pick instead, each set up as its own documents show for ImageNet.

webdataset      WebDataset over our own shards, Pillow, torchvision's transforms: the usual, as in MAE's code
image_folder    torchvision.datasets.ImageFolder on the JPEG files, a shuffling DataLoader
mosaicml        MDS files with the JPEGs' bytes, StreamingImageNet, a DataLoader; images come as Pillow's
litdata         litdata.optimize, StreamingDataset and StreamingDataLoader; images come as uint8 tensors, and
                torchvision's v2 transforms work on those

A peer that is not installed is None in `available()`. mosaicml-streaming wants an older NumPy than ours is tested with,
so both have a separate environment (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
ERASING = 0.25
BICUBIC = transforms.InterpolationMode.BICUBIC
Sizes = Iterator[int]


@dataclass(frozen=True)
class Place:
    """The same JPEGs for all: files in raw/CLASS/, our shards in shards/train, each peer's own form beside them."""

    folder: Path
    tars: list[str]
    workers: int
    batch: int
    prefetch: int

    def loader_options(self) -> dict[str, Any]:
        processes = {"prefetch_factor": self.prefetch, "persistent_workers": True} if self.workers else {}
        return {"batch_size": self.batch, "num_workers": self.workers, **processes}


def on_pillow(stage: str) -> Callable[[Image.Image], torch.Tensor]:
    """MAE's code: torchvision's transforms for pretraining, timm's create_transform for fine-tuning."""
    if stage == "pretrain":
        crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC)
        flip = transforms.RandomHorizontalFlip()
        return transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    from timm.data import create_transform

    made = create_transform(
        224,
        is_training=True,
        color_jitter=None,
        auto_augment=RAND_AUGMENT,
        interpolation="bicubic",
        re_prob=ERASING,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
    for one in made.transforms:
        if hasattr(one, "ops"):
            allow_zero_bits(one)
    return made


def allow_zero_bits(operations: Any) -> None:
    """With strength 10, timm 1.0 posterizes to 0 bits: black, until Pillow 13 made it an error."""
    for operation in operations.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point([0] * 256 * len(image.getbands()))


def on_tensors(stage: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """litdata's documents: torchvision's v2 transforms on the uint8 tensor that comes; RandAugment needs Pillow."""
    scale = (0.2, 1.0) if stage == "pretrain" else (0.08, 1.0)
    first = [v2.RandomResizedCrop(224, scale=scale, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if stage == "pretrain":
        return v2.Compose([*first, *last])
    from timm.data.random_erasing import RandomErasing

    from livt_scale.data.image.augment import make_augment

    operations = make_augment(RAND_AUGMENT, image_px=224, mean=MEAN)
    allow_zero_bits(operations)
    augment = [v2.ToPILImage(), operations, v2.PILToTensor()]
    erasing = RandomErasing(ERASING, mode="pixel", max_count=1, num_splits=0, device="cpu")
    return v2.Compose([*first, *augment, *last, erasing])


@contextlib.contextmanager
def webdataset(place: Place, stage: str) -> Iterator[Sizes]:
    dataset = (
        wds.WebDataset(place.tars, shardshuffle=len(place.tars), empty_check=False)
        .repeat()
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(on_pillow(stage), int)
    )
    yield (len(images) for images, _ in DataLoader(dataset, **place.loader_options()))


@contextlib.contextmanager
def image_folder(place: Place, stage: str) -> Iterator[Sizes]:
    dataset = ImageFolder(str(place.folder / "raw"), transform=on_pillow(stage))
    yield _for_ever(DataLoader(dataset, shuffle=True, drop_last=True, **place.loader_options()))


@contextlib.contextmanager
def mosaicml(place: Place, stage: str) -> Iterator[Sizes]:
    from streaming.vision import StreamingImageNet

    transform = on_pillow(stage)
    dataset = StreamingImageNet(
        local=str(place.folder / "mds"), shuffle=True, batch_size=place.batch, transform=transform
    )
    yield _for_ever(DataLoader(dataset, drop_last=True, **place.loader_options()))


@contextlib.contextmanager
def litdata(place: Place, stage: str) -> Iterator[Sizes]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(
        input_dir=str(place.folder / "litdata"),
        shuffle=True,
        drop_last=True,
        transform=_OfImage(on_tensors(stage)),
    )
    yield _for_ever(StreamingDataLoader(dataset, drop_last=True, **place.loader_options()))


@dataclass(frozen=True)
class _OfImage:
    transform: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, sample: Any) -> tuple[torch.Tensor, int]:
        return self.transform(sample[0]), int(sample[1])


def _for_ever(loader: Any) -> Sizes:
    while True:
        for images, _ in loader:
            yield len(images)


def _labelled(folder: Path) -> list[tuple[str, int]]:
    return ImageFolder(str(folder / "raw")).samples


def make_mds(folder: Path) -> None:
    """As streaming.vision.convert.imagenet does: the JPEGs' bytes as they are, read back as images."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"i": "int", "x": "jpeg", "y": "int"}) as out:
        for number, (path, label) in enumerate(_labelled(folder)):
            with Image.open(path) as image:  # a JPEG that lies in a file is written as it is
                out.write({"i": number, "x": image, "y": label})


def _litdata_sample(labelled: tuple[str, int]) -> tuple[Image.Image, int]:
    return Image.open(labelled[0]), labelled[1]


def make_litdata(folder: Path) -> None:
    from litdata import optimize

    optimize(
        fn=_litdata_sample,
        inputs=_labelled(folder),
        output_dir=str(folder / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
    )
    multiprocessing.set_start_method("fork", force=True)  # it has set "spawn", for all


@dataclass(frozen=True)
class Peer:
    package: str  # as installed
    module: str
    pipeline: Callable[[Place, str], contextlib.AbstractContextManager[Sizes]]
    prepare: Callable[[Path], None] | None = None

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


PEERS = {
    "usual": Peer("webdataset", "webdataset", webdataset),
    "image_folder": Peer("torchvision", "torchvision", image_folder),
    "mosaicml": Peer("mosaicml-streaming", "streaming", mosaicml, make_mds),
    "litdata": Peer("litdata", "litdata", litdata, make_litdata),
}
