"""The loader's settings besides the shards, from a recipe or from the arguments of `livt.TrainLoader`.

    settings = TrainSettings.of_stage(recipe, "finetune")     # or TrainSettings(image_px=28, channels=1, data=…, …)
    training_batches(shards, settings, rank=0, world_size=8, micro_batch=64, epoch=3, step=0)

Samples depend on these values, the shards and nothing else, so the same values give the same pixels either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from livt_scale.config.data import Data
from livt_scale.config.recipe import Finetune, Model, Pretrain, Recipe, Stage
from livt_scale.util.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Which images a network takes, and how they are loaded. Raises UsageError for channels other than 1 and 3."""

    image_px: int
    channels: int  # 1 (grey) or 3 (colour)
    data: Data  # pixel statistics, loader processes, shuffle window; its paths are not read

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UsageError(
                f"channels is {self.channels}: images are read as grey (1) or colour (3)", remedy="give 1 or 3"
            )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> ImageSettings:
        model = recipe.model
        return ImageSettings(image_px=model.image_px, channels=model.channels, data=recipe.data)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ImageSettings):
    """Which training batches: the images of each, in which order, and what is drawn for them."""

    part: Pretrain | Finetune  # batch and order, crops, augmentation, mixing
    seed: int
    num_patches: int = 0  # uniforms an image for the masks of pretraining
    num_branches: int = 0  # uniforms an image for stochastic depth and the dropout of LoRA

    @classmethod
    def of_stage(cls, recipe: Recipe, stage: Stage) -> Self:
        model, part = recipe.model, recipe.stage(stage)
        return cls(
            image_px=model.image_px,
            channels=model.channels,
            data=recipe.data,
            part=part,
            seed=recipe.seed,
            num_patches=model.num_patches if isinstance(part, Pretrain) else 0,
            num_branches=_num_uniforms(recipe.model, part) if isinstance(part, Finetune) else 0,
        )


def _num_uniforms(model: Model, part: Finetune) -> int:
    return model.num_uniforms(drop_path=part.drop_path) + part.train.uniforms
