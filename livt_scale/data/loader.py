"""Samples to batches on the device, through loader processes, the same whatever their number.

    batches = train_batches(shards, recipe, stage="pretrain", rank=0, world_size=8, micro_batch=64, epoch=3, step=0)
    for batch in batches:
        batch = batch.to(device)
        images = normalise(batch.images, mean, std, torch.float32)

One iterator serves an entire stage, so the processes persist across epochs (`loader_processes.py`). A batch is one
block of shared memory: images are decoded, cropped and written into their slots once and never copied on the way to the
main process; only its name and layout go through the pipe. An error in a loader process is raised in the caller as the
same LivtError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from livt_scale.config.recipe import Finetune, Recipe, Stage
from livt_scale.data import num_workers
from livt_scale.data.batch import Batch, Blocks, Packed, pack
from livt_scale.data.image.decode import BadImage
from livt_scale.data.image.transforms import TOGETHER, EvalTransform, TrainTransform
from livt_scale.data.loader_processes import Batches, Failed
from livt_scale.data.mixup import Mix, apply_mix, draw_mix
from livt_scale.data.normalise import images_and_targets, normalise
from livt_scale.data.num_workers import Loading, this_worker
from livt_scale.data.order.for_rank import MicroBatch, RankOrder
from livt_scale.data.order.for_stage import training_order
from livt_scale.data.order.instance import Ints, eval_positions
from livt_scale.data.reader import RawSample, SampleReader
from livt_scale.data.remote.prefetch import fetched_ahead, shards_in_view
from livt_scale.data.seeds import sample_rng
from livt_scale.data.settings import ImageSettings, TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import LivtError, UsageError

__all__ = [
    "Batch",
    "Batches",
    "Mix",
    "apply_mix",
    "eval_batches",
    "evaluation_batches",
    "images_and_targets",
    "normalise",
    "train_batches",
    "training_batches",
]


def train_batches(
    shards: ShardSet,
    recipe: Recipe,
    *,
    stage: Stage,
    rank: int,
    world_size: int,
    micro_batch: int,
    epoch: int,
    step: int,
    local_ranks: int = 1,
    demand: float | None = None,
) -> Batches:
    """The micro-batches of one rank from `step` of `epoch` to the end of the stage. Raises LivtError.

    For data.workers = auto: `local_ranks` share the cores of this node; `demand`: images/s that a step takes, if known.
    `step` counts within the epoch, or from the beginning of the stage with `epoch` = 0: both are the same position.
    """
    return training_batches(
        shards, TrainSettings.of_stage(recipe, stage), rank=rank, world_size=world_size, micro_batch=micro_batch,
        epoch=epoch, step=step, local_ranks=local_ranks, demand=demand,
    )  # fmt: skip


def training_batches(
    shards: ShardSet,
    settings: TrainSettings,
    *,
    rank: int,
    world_size: int,
    micro_batch: int | None,
    epoch: int,
    step: int,
    epochs: int | None = None,
    local_ranks: int = 1,
    demand: float | None = None,
) -> Batches:
    """As `train_batches`, for settings of any origin.

    micro_batch: None takes all slots of the rank. epochs: of the stage; None: as `settings.part` has it.
    """
    order, part = training_order(shards, settings), settings.part
    ranks = RankOrder(
        shards, order, epochs=epochs or part.epochs, rank=rank, world_size=world_size, micro_batch=micro_batch
    )
    micro_batch = ranks.micro_batch
    if part.mixes and micro_batch % 2:
        raise UsageError(
            f"micro_batch is {micro_batch}: mixup and cutmix pair neighbours, so it must be even",
            remedy="change micro_batch or the number of processes",
        )
    dataset = _TrainDataset(shards, settings, ranks, epoch=epoch, step=step)
    loading = _loading(dataset, micro_batch=micro_batch, local_ranks=local_ranks, demand=demand)
    if shards.remote:
        in_view = shards_in_view(order, shards.usable_per_shard, ranks=local_ranks, world_size=world_size)
        shards.remote.check_room(shards.manifest, in_view=in_view, processes=local_ranks * max(1, loading.workers))
    return Batches(dataset, loading)


def eval_batches(
    shards: ShardSet, recipe: Recipe, *, rank: int, world_size: int, batch: int, local_ranks: int = 1, crops: int = 1
) -> Batches:
    """The evaluation images of one rank, `batch` at a time, the last one smaller: over all ranks each exactly once.

    `crops` 5: of each image the centre and the four corners, neighbours in `images` [5 · B, C, T, T]. A rank without
    any image (more ranks than samples) gets no batch.
    """
    images = ImageSettings.of_recipe(recipe)
    return evaluation_batches(
        shards, images, rank=rank, world_size=world_size, batch=batch, local_ranks=local_ranks, crops=crops
    )


def evaluation_batches(
    shards: ShardSet,
    settings: ImageSettings,
    *,
    rank: int,
    world_size: int,
    batch: int,
    local_ranks: int = 1,
    crops: int = 1,
    kept: bool = False,
) -> Batches:
    """As `eval_batches`, for settings of any origin. kept: for `KeptBatches`."""
    positions = eval_positions(shards.num_samples, rank=rank, world_size=world_size)
    samples = shards.usable_to_sample(np.arange(positions.start, positions.stop, dtype=np.int64))
    dataset = _EvalDataset(shards, settings, samples, batch, crops=crops)
    data = settings.data
    workers = num_workers.max_workers(data, local_ranks=local_ranks)  # auto: too few images to measure
    size = num_workers.batch_bytes(settings, batch * crops)
    loading = Loading(min(workers, dataset.num_batches), data.prefetch, size, "evaluation")
    return Batches(dataset, loading, kept=kept)


def _loading(dataset: _TrainDataset, *, micro_batch: int, local_ranks: int, demand: float | None) -> Loading:
    """The number of processes and how far ahead they load. Raises LivtError if a sample is corrupt."""
    data, size = dataset.settings.data, num_workers.batch_bytes(dataset.settings, micro_batch)
    if data.workers != "auto":
        return num_workers.fixed_workers(data, micro_batch_bytes=size)
    first = next(dataset.micro_batches(0, 1), None)
    if first is None:  # the stage is at its end
        return Loading(0, data.prefetch, size, "nothing is left to load")
    rate, _ = _rate(dataset, first, seconds=num_workers.MEASURE_S)
    return num_workers.choose_workers(
        data,
        rate=rate,
        demand=demand,
        cores=num_workers.cores_for_rank(local_ranks),
        has_gpu=torch.cuda.is_available(),
        micro_batch_bytes=size,
        most_ready_bytes=num_workers.ready_bytes(local_ranks),
    )


def core_rate(shards: ShardSet, recipe: Recipe, stage: Stage, *, seconds: float) -> tuple[float, int]:
    """(images/s, images) that this process decodes and crops on one thread for `stage`. Raises LivtError."""
    settings = TrainSettings.of_stage(recipe, stage)
    ranks = RankOrder(shards, training_order(shards, settings), epochs=settings.part.epochs, rank=0, world_size=1)
    dataset = _TrainDataset(shards, settings, ranks, epoch=0, step=0)
    return _rate(dataset, next(dataset.micro_batches(0, 1)), seconds=seconds)


def _rate(dataset: _TrainDataset, batch: MicroBatch, *, seconds: float) -> tuple[float, int]:
    with closing(SampleReader(dataset.shards)) as reader:
        return num_workers.decode_rate(lambda part: dataset.load(part, reader), batch, seconds=seconds)


class _Dataset(IterableDataset[Any]):
    """Runs in a loader process: yields Packed; after an error, Failed is the last item."""

    def __init__(self, shards: ShardSet, settings: ImageSettings) -> None:
        super().__init__()
        self.shards = shards
        self.settings = settings
        self.blocks = Blocks(keep=0)
        self.crops = 1  # of each sample

    def __iter__(self) -> Iterator[Packed | Failed]:
        try:
            batches = fetched_ahead(self.micro_batches(*this_worker()), self.shards)
            with closing(SampleReader(self.shards)) as reader, closing(batches):
                for batch in batches:
                    yield self.load(batch, reader)
        except LivtError as error:
            yield Failed(error)
        finally:
            self.blocks.drop()  # kept processes hold no memory between two passes

    def micro_batches(self, worker: int, num_workers: int) -> Iterator[MicroBatch]:
        raise NotImplementedError

    def draw(self, batch: MicroBatch, keys: list[str]) -> dict[str, np.ndarray]:
        """What else the batch holds: random numbers, each from its own sample's seeds."""
        raise NotImplementedError

    def transform(self, images: list[bytes], slots: Tensor, *, epoch: int, keys: list[str]) -> None:
        """Fill `slots`, uint8 [images, crops, C, T, T]. Raises BadImage."""
        raise NotImplementedError

    def load(self, batch: MicroBatch, reader: SampleReader) -> Packed:
        keys = self.shards.keys(batch.samples)
        seed_keys = batch.seed_keys(keys)
        slots, sent = self._room(batch, keys, self.draw(batch, seed_keys))
        # [B · crops, C, T, T] -> [B, crops, C, T, T]
        places = slots.unflatten(0, (len(keys), self.crops))
        samples = reader.read(batch.samples, keys)
        for first in range(0, len(keys), TOGETHER):
            part = slice(first, first + TOGETHER)
            self._fill(places[part], list(islice(samples, TOGETHER)), epoch=batch.epoch, keys=seed_keys[part])
        return sent

    def _fill(self, places: Tensor, samples: list[RawSample], *, epoch: int, keys: list[str]) -> None:
        """Raises SampleError."""
        try:
            self.transform([raw.image for raw in samples], places, epoch=epoch, keys=keys)
        except BadImage as error:
            if len(samples) == 1:
                raise samples[0].error(str(error)) from error
            for k, raw in enumerate(samples):  # which one?
                self._fill(places[k : k + 1], [raw], epoch=epoch, keys=[keys[k]])
            raise

    def _room(self, batch: MicroBatch, keys: list[str], drawn: dict[str, np.ndarray]) -> tuple[Tensor, Packed]:
        """(the images' places in a block that also holds the rest: uint8 [B · crops, C, T, T]; the message to send)."""
        arrays: dict[str, np.ndarray] = {
            "labels": self.shards.labels(batch.samples),
            "keys": np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8),
            **drawn,
        }
        px = self.settings.image_px
        shape = (len(keys) * self.crops, px, px, self.settings.channels)
        blocks = self.blocks if get_worker_info() else None
        packed, sent = pack(arrays, images=shape, place=(batch.epoch, batch.step, batch.micro_index), blocks=blocks)
        return torch.from_numpy(packed.arrays()["images"]).permute(0, 3, 1, 2), sent


class _TrainDataset(_Dataset):
    def __init__(
        self, shards: ShardSet, settings: TrainSettings, rank_order: RankOrder, *, epoch: int, step: int
    ) -> None:
        super().__init__(shards, settings)
        self._drawn = settings
        self._rank_order = rank_order
        self._start = {"epoch": epoch, "step": step}
        self._transform = TrainTransform(settings)  # here, not in the workers: each would import timm

    def micro_batches(self, worker: int, num_workers: int) -> Iterator[MicroBatch]:
        return self._rank_order.micro_batches(**self._start, worker=worker, num_workers=num_workers)

    def transform(self, images: list[bytes], slots: Tensor, *, epoch: int, keys: list[str]) -> None:
        self._transform.all(images, slots[:, 0], epoch=epoch, keys=keys)

    def draw(self, batch: MicroBatch, keys: list[str]) -> dict[str, np.ndarray]:
        settings, drawn = self._drawn, {}
        part = settings.part
        if settings.num_patches:
            drawn["noise"] = self._uniforms(batch.epoch, keys, settings.num_patches, "noise")
        if settings.num_branches:
            drawn["drop"] = self._uniforms(batch.epoch, keys, settings.num_branches, "drop")
        if isinstance(part, Finetune) and part.mixes:
            drawn["lam"], drawn["box"] = draw_mix(
                part, keys[0::2], seed=settings.seed, epoch=batch.epoch, image_px=settings.image_px
            )
        return drawn

    def _uniforms(self, epoch: int, keys: list[str], count: int, purpose: str) -> np.ndarray:
        """float32 [B, count] in [0, 1)."""
        uniforms = np.empty((len(keys), count), dtype=np.float32)
        for row, key in zip(uniforms, keys, strict=True):
            sample_rng(self._drawn.seed, epoch, key, purpose).random(out=row, dtype=np.float32)
        return uniforms


class _EvalDataset(_Dataset):
    def __init__(self, shards: ShardSet, settings: ImageSettings, samples: Ints, batch: int, *, crops: int) -> None:
        super().__init__(shards, settings)
        self.crops = crops
        self._samples = samples
        self._batch = batch
        self._transform = EvalTransform(settings)
        self.num_batches = -(-len(samples) // batch)

    def micro_batches(self, worker: int, num_workers: int) -> Iterator[MicroBatch]:
        for number in islice(range(self.num_batches), worker, None, num_workers):
            first = number * self._batch
            yield MicroBatch(0, number, 0, self._samples[first : first + self._batch])

    def transform(self, images: list[bytes], slots: Tensor, *, epoch: int, keys: list[str]) -> None:  # noqa: ARG002
        self._transform.all(images, slots)

    def draw(self, batch: MicroBatch, keys: list[str]) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {}
