"""`livt.TrainLoader`: training batches from shards by plain values, for a loop of any kind.

    loader = TrainLoader(shards, global_batch=64, image_px=28, channels=1, mean=[0.286], std=[0.353], mixup=0.8)
    for epoch in range(5):
        for images, targets in loader.epoch(epoch):
            ...

The samples of a step are a pure function of seed, epoch, step, shards and global batch; they do not depend on ranks or
processes. `livt train` uses the same loader (`livt_scale.data.loader`) and gets, bit for bit, the same samples for the
same values, and the same random numbers for stochastic depth where `num_branches` is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from livt_scale.api.arguments import (
    NO_END,
    ImageShape,
    check_position,
    checked,
    device_of,
    open_shards,
    pixel_data,
    training_part,
)
from livt_scale.config.recipe import Finetune
from livt_scale.data.batch import Batch
from livt_scale.data.image.transforms import TrainTransform
from livt_scale.data.loader import Batches, images_and_targets, training_batches
from livt_scale.data.order.for_stage import training_order
from livt_scale.data.settings import TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World, joined
from livt_scale.util.errors import UsageError


class TrainLoader:
    """Training batches of `shards`: random crops, augmented, normalised, mixed, the same at any number of ranks.

    Under torch.distributed each rank gets its share of every global batch (rank and world size are read when an epoch
    starts), so the loader is used as it is: no DistributedSampler, no `accelerator.prepare`.

    shards: or their folder or URL.
    global_batch: images of an optimizer step, over all ranks. micro_batch: images at a time; None: all of this rank's.
    image_px, channels: of the model. mean, std: of pixels in [0, 1], one per channel. crop_scale: smallest and largest
    share of the image's area in a crop. crop_rule: whose random crops. flip: mirror half of the images. rand_augment:
    timm's notation; None: none. random_erasing: share of images. mixup, cutmix: a of Beta(a, a); 0: none; with both,
    half and half. smoothing: ε.
    sampling: "instance", "class_balanced", "sqrt", or a mapping with options. repeats: views of an image in a batch.
    epochs: of the training, for a sampling that changes over it. workers: loader processes; "auto": measured at the
    start. prefetch: micro-batches that each keeps ready. device: where batches are normalised and mixed.
    num_branches: of a model with stochastic depth (`model.num_branches`), whose random numbers then belong to the
    samples; 0: none.

    Raises UsageError, which names the argument, and DataError where the set does not fill a global batch. `epoch` also
    raises SampleError (a corrupt image: shard, offset and key) and DataError (a loader process was killed).
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        image_px: int = 224,
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_rule: Literal["torchvision", "mae"] = "torchvision",
        flip: bool = True,
        rand_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        sampling: str | Mapping[str, Any] = "instance",
        repeats: int = 1,
        epochs: int | None = None,
        seed: int = 0,
        workers: int | Literal["auto"] = 2,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
        num_branches: int = 0,
    ) -> None:
        self.shards = shards = open_shards(shards)
        self._part = training_part(
            global_batch=global_batch, micro_batch=micro_batch, sampling=sampling, repeats=repeats, epochs=epochs,
            crop_scale=crop_scale, crop_rule=crop_rule, flip=flip, rand_augment=rand_augment,
            random_erasing=random_erasing, mixup=mixup, cutmix=cutmix, smoothing=smoothing,
        )  # fmt: skip
        shape = checked(
            ImageShape, {"image_px": image_px, "channels": channels, "seed": seed, "num_branches": num_branches}
        )
        data = pixel_data(shards, channels=channels, mean=mean, std=std, workers=workers, prefetch=prefetch)
        self._settings = TrainSettings(
            image_px=shape.image_px, channels=shape.channels, data=data, part=self._part, seed=shape.seed,
            num_branches=shape.num_branches,
        )  # fmt: skip
        self._micro_batch = micro_batch
        self._epochs = self._part.epochs if epochs is not None else _endless(self._part, shards)
        self._device = device_of(device)
        TrainTransform(self._settings)  # what cannot be augmented so is an error now, not in a loader process

        self.steps_per_epoch = training_order(shards, self._settings).steps_per_epoch
        self._stream: Batches | None = None
        self._next: tuple[int, int, World] | None = None  # the stream's position, while it is not being read

    @property
    def micro_batches_per_step(self) -> int:
        """Batches that `epoch` yields for each optimizer step on this rank: 1 without `micro_batch`."""
        return 1 if self._micro_batch is None else self._part.global_batch // joined().world_size // self._micro_batch

    def epoch(self, epoch: int, *, step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """(images, targets) of this rank, from `step` to the end of `epoch`; with `num_branches`: and `drop`.

        images: float32 [B, C, H, W], normalised. targets: float32 [B, classes], smoothed and mixed, each row a
        distribution. drop: float32 [B, num_branches], uniform in [0, 1), for `model(images, drop)`. Starting in the
        middle costs nothing. Loader processes stay from one epoch to the next; an iteration that is left early, or
        another epoch out of turn, starts them again.
        """
        batches = self.batches(epoch, step=step)
        return (self._prepared(batch.to(self._device)) for batch in batches)

    def batches(self, epoch: int, *, step: int = 0) -> Iterator[Batch]:
        """As `epoch`, before the device's part: `images` uint8 [B, C, H, W], `labels` int64 [B], `keys`, `mix`."""
        check_position(epoch, step, epochs=self._epochs, steps_per_epoch=self.steps_per_epoch)
        world = joined()
        if self._stream is None or self._next != (epoch, step, world):
            self.close()
            self._stream = self._open(epoch, step, world)
        self._next = None
        return self._read(self._stream, epoch, step, world)

    def close(self) -> None:
        """End the loader processes; the next epoch starts new ones. They also end with the loader or the program."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._next = None

    def _open(self, epoch: int, step: int, world: World) -> Batches:
        return training_batches(
            self.shards, self._settings, rank=world.rank, world_size=world.world_size, micro_batch=self._micro_batch,
            epoch=epoch, step=step, epochs=self._epochs, local_ranks=world.local_size,
        )  # fmt: skip

    def _read(self, stream: Batches, epoch: int, step: int, world: World) -> Iterator[Batch]:
        for _ in range((self.steps_per_epoch - step) * self.micro_batches_per_step):
            if self._stream is not stream:
                raise UsageError(
                    f"epoch {epoch} cannot be read on: another epoch of this loader was started, or it was closed",
                    remedy="read one epoch of a loader at a time, or make a second loader",
                )
            yield next(stream)
        self._next = (epoch + 1, 0, world)

    def _prepared(self, batch: Batch) -> tuple[Tensor, ...]:
        prepared = images_and_targets(batch, self._part, self._settings.data, num_classes=self.shards.num_classes)
        return prepared if batch.drop is None else (*prepared, batch.drop)


def _endless(part: Finetune, shards: ShardSet) -> int:
    """NO_END. Raises UsageError where the sampling follows the progress of the training, which has none without end."""
    shares, counts = part.sampling.shares, shards.class_counts
    if not part.sampling.each_image_once and not np.array_equal(shares(counts, 0.0), shares(counts, 1.0)):
        raise UsageError(
            f"epochs is None, and the sampling {part.sampling.policy!r} changes from the first epoch to the last",
            remedy="give the number of epochs of the training",
        )
    return NO_END
