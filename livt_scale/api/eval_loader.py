"""`livt.EvalLoader` and `livt.evaluate`: accuracy of any classifier by many, medium and few-shot classes.

    loader = EvalLoader(ShardSet.open("val"), image_px=28, channels=1, mean=[0.286], std=[0.353])
    evaluate(model, loader, train_shards)["top1"]          # {"all": 0.71, "many": 0.78, "medium": 0.58, "few": 0.75, …}

The evaluation is that of `livt train` and `livt eval` (`livt_scale.evaluation.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from livt_scale.api.arguments import ImageShape, checked, device_of, open_shards, pixel_data
from livt_scale.config.data import Data
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.loader import evaluation_batches, normalise
from livt_scale.data.order.instance import eval_positions
from livt_scale.data.settings import ImageSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.precision import LOW
from livt_scale.distributed.world import joined
from livt_scale.evaluation.evaluate import evaluate_images
from livt_scale.util.errors import UsageError


class EvalLoader:
    """The images of `shards`, each exactly once, as they are evaluated: resized, centre crop, normalised.

    Iterating yields (images float32 [B, C, H, W], labels int64 [B]) in the order of the set; the last batch is smaller.
    Under torch.distributed each rank gets its share, without padding, so ranks may have different numbers of batches.

    shards: or their folder or URL.
    batch: images at a time on one rank. image_px, channels: of the model. mean, std: of pixels in [0, 1], one per
    channel. workers: loader processes. prefetch: batches that each keeps ready. device: where batches are normalised.
    Raises UsageError, which names the argument; iterating raises SampleError (a corrupt image: shard, offset and key).
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        *,
        batch: int = 64,
        image_px: int = 224,
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        workers: int | Literal["auto"] = 2,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        shards = open_shards(shards)
        shape = checked(ImageShape, {"image_px": image_px, "channels": channels, "batch": batch})
        data = pixel_data(shards, channels=channels, mean=mean, std=std, workers=workers, prefetch=prefetch)
        self.shards, self.batch = shards, shape.batch
        self._settings = ImageSettings(image_px=shape.image_px, channels=shape.channels, data=data)
        self._device = device_of(device)

    def __len__(self) -> int:
        """Batches of this rank."""
        world = joined()
        images = len(eval_positions(self.shards.num_samples, rank=world.rank, world_size=world.world_size))
        return -(-images // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float32 [B, C, H, W], labels int64 [B])."""
        world, data = joined(), self._settings.data
        with evaluation_batches(self.shards, self._settings, **world.for_loader, batch=self.batch) as batches:
            for batch in batches:
                on_device = batch.to(self._device)
                yield normalise(on_device.images, data.mean, data.std, torch.float32), on_device.labels

    def settings(self, *, many_over: int, few_under: int) -> ImageSettings:
        """What `livt_scale.evaluation` reads the images by, with these bounds of the groups. Raises UsageError."""
        values = self._settings.data.model_dump() | {"many_over": many_over, "few_under": few_under}
        shape = self._settings
        return ImageSettings(image_px=shape.image_px, channels=shape.channels, data=checked(Data, values))


def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    shards: ShardSet | str | Path,
    *,
    many_over: int = 100,
    few_under: int = 20,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> dict[str, Any]:
    """The report of `model` on the images of `loader`, as plain JSON values; accuracies are fractions of 1.

    {"num_samples", "top1": {"all", "many", "medium", "few", "mean_class"}, "top5": {…}, "per_class": […],
    "calibration": {"pdc", "ece", "bins"}, "confusion": [C][C] or None above 1000 classes, "precision", "views",
    "data"}; an accuracy of no image is None.

    model: images float32 [B, C, H, W] to logits [B, classes], on the device of its parameters; it is evaluated in
    eval() and left in the mode it was in. shards: the training set, or its folder or URL, whose class counts decide the
    groups: many-shot classes have more than `many_over` images, few-shot ones fewer than `few_under`. precision: of
    matrix products.

    Under torch.distributed a collective call of all ranks, the model wrapped or not: each image counts once, and every
    rank returns the same report. Raises UsageError, which names the argument, and DataError where the two sets do not
    have the same classes.
    """
    if precision != "fp32" and precision not in LOW:
        raise UsageError(f"precision is {precision!r}", remedy=f"give fp32, {' or '.join(LOW)}")
    for name, value, kind, what in (
        ("model", model, nn.Module, "torch.nn.Module"), ("loader", loader, EvalLoader, "livt.EvalLoader"),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise UsageError(f"{name} is of the type {type(value).__name__}", remedy=f"give a {what}")
    parameter = next(model.parameters(), None)
    return evaluate_images(
        model, loader.shards, loader.settings(many_over=many_over, few_under=few_under), precision=precision,
        device=torch.device("cpu") if parameter is None else parameter.device, world=joined(),
        classes=TrainingClasses.of(open_shards(shards)), batch=loader.batch, in_step=True,
    )  # fmt: skip
