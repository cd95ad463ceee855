"""Stage 1 as a task of the loop: masked generative pretraining. Labels are never read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from livt_scale import optim
from livt_scale.config.recipe import Recipe
from livt_scale.data.loader import Batch, eval_batches, normalise
from livt_scale.data.seeds import sample_rng
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.evaluation import pictures
from livt_scale.models.mae import build_mae
from livt_scale.train.loop import StageTask
from livt_scale.weights.adapt import start_mae
from livt_scale.weights.importer import open_weights


def pretrain_task(recipe: Recipe, train: ShardSet, *, world: World) -> StageTask:
    """The masked autoencoder of `recipe`, initialised from its seed or from `weights`, and how it is trained."""
    part = recipe.stages.pretrain
    assert part is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_mae(recipe.model, norm_pix=part.norm_pix, mask_ratio=part.mask_ratio)

    origin = None
    if part.weights is not None:
        weights = open_weights(Path(part.weights))
        weights.check_heads(recipe.model)
        start_mae(model, weights.state, recipe.model)
        origin = weights.origin()

    def objective(call: Callable[..., Any], batch: Batch) -> Tensor:
        images = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
        loss: Tensor = call(images, batch.noise)
        return loss

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return optim.param_groups(model, lr=part.peak_lr, weight_decay=part.weight_decay, tokens_decay=True)

    return StageTask(part, model, groups, objective, draw=_painter(recipe, train, world), origin=origin)


def _painter(recipe: Recipe, train: ShardSet, world: World) -> Callable[[Strategy, Path], None] | None:
    """Draws reconstructions of the same few images each time: evaluation images, else training images."""
    count = recipe.log.num_reconstructions
    if not count:
        return None
    shown: list[tuple[Tensor, Tensor]] = []

    def draw(strategy: Strategy, path: Path) -> None:
        if not world.is_main and not strategy.lockstep:
            return
        if not shown:
            shown.append(_fixed_images(recipe, train, count))
        images, noise = shown[0]
        mean, std = recipe.data.mean, recipe.data.std
        pixels = normalise(images.to(world.device), mean, std, torch.float32)
        made, is_masked = strategy.infer(pixels, noise.to(world.device), predict=True)
        if world.is_main:
            pictures.reconstructions(images, made, is_masked, mean=mean, std=std, path=path)

    return draw


def _fixed_images(recipe: Recipe, train: ShardSet, count: int) -> tuple[Tensor, Tensor]:
    """uint8 [count, C, H, W] and float32 noise [count, num_patches], spread over the set, the same at every call."""
    shards = ShardSet.open(recipe.data.val, data=recipe.data) if recipe.data.val else train
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})
    stride = max(shards.num_samples // count, 1)
    images, keys = [], []
    for rank in range(0, min(count, shards.num_samples)):  # the first image of every count-th part of the set
        world_size = max(shards.num_samples // stride, 1)
        batch = next(iter(eval_batches(shards, plain, rank=rank, world_size=world_size, batch=1)))
        images.append(batch.images)
        keys += batch.keys
    num_patches = recipe.model.num_patches
    noise = [torch.from_numpy(sample_rng(0, 0, key, "picture").random(num_patches, dtype="float32")) for key in keys]
    return torch.cat(images), torch.stack(noise)
