"""What a run is: one recipe, made of typed, frozen parts. The names here are the names in the YAML.

A default is defined in its part and nowhere else. Unless a description says otherwise it is the paper's (LiVT, arXiv
2212.02015, table of hyper-parameters for ImageNet-LT; MAE, arXiv 2111.06377, table 8). `None` means "derived",
and the description says from what. Checks that need only the recipe are here; those that need data, disk or the world
size are in `livt_scale.train.preflight`. The parts are in `livt_scale.config.data`, `model` and `stages`; how the work
is done (`parallel`, `checkpoint`, `faults`, `log`) is in `livt_scale.config.runtime`, `slurm` in
`livt_scale.config.slurm`; `livt_scale.config.load` reads YAML, `extends:` and `--set`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from livt_scale.config.capabilities import choices, supports
from livt_scale.config.data import Cache, Data, Remote
from livt_scale.config.model import MODEL_SIZES, Decoder, Model, check_masking, check_patches
from livt_scale.config.resume import FREE, Change, changes, resume_of
from livt_scale.config.runtime import Checkpoint, Faults, Log, Parallel, RecipePart
from livt_scale.config.slurm import Slurm
from livt_scale.config.stages import (
    DOWNLOAD,
    Ema,
    Finetune,
    Pretrain,
    StagePart,
)

__all__ = [  # the parts are found here too
    "MODEL_SIZES",
    "STAGES",
    "Cache",
    "Checkpoint",
    "Data",
    "Decoder",
    "Ema",
    "Faults",
    "Finetune",
    "Log",
    "Model",
    "Parallel",
    "Pretrain",
    "Recipe",
    "RecipePart",
    "Remote",
    "Slurm",
    "Stage",
    "StagePart",
    "Stages",
    "digest",
    "learnt_from",
]

Stage = Literal["pretrain", "finetune"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")


class Stages(RecipePart):
    """A stage that is absent is not run."""

    pretrain: Pretrain | None = None
    finetune: Finetune | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not (self.pretrain or self.finetune):
            raise ValueError("stages is empty: give pretrain, finetune or both")
        if self.finetune and self.finetune.init == "pretrain" and not self.pretrain:
            raise ValueError("finetune.init is 'pretrain' but there is no stage pretrain: add it, or set 'scratch'")
        if self.finetune and self.finetune.init == "weights" and self.pretrain:
            raise ValueError(
                "finetune.init is 'weights', so the stage pretrain would be of no use: "
                "take it away (pretrain: null), or set init: pretrain"
            )
        return self


class Recipe(RecipePart):
    """One run: data, model, stages, parallelism, checkpoints."""

    name: Annotated[str, Field(min_length=1, max_length=100), FREE] = Field(description="names the folder below runs/")
    run_dir: Annotated[str | None, FREE] = Field(None, description="None: runs/NAME")
    seed: NonNegativeInt = 0
    data: Data
    model: Model = Model()
    stages: Stages
    parallel: Annotated[Parallel, FREE] = Parallel()
    checkpoint: Annotated[Checkpoint, FREE] = Checkpoint()
    faults: Annotated[Faults, FREE] = Faults()
    log: Annotated[Log, FREE] = Log()
    slurm: Annotated[Slurm, FREE] = Slurm()

    @model_validator(mode="after")
    def _name_is_one_folder(self) -> Self:
        if self.name in (".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"name is {self.name!r}: it names the folder runs/NAME, so it cannot hold a slash")
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self.data, name)) != self.model.channels:
                raise ValueError(
                    f"data.{name} has {len(getattr(self.data, name))} values for model.channels = {self.model.channels}"
                )
        return self

    @model_validator(mode="after")
    def _only_a_vit_is_pretrained(self) -> Self:
        """Masked pretraining leaves out patches of our own ViTs."""
        if self.stages.pretrain and not self.model.is_vit:
            how = "init: weights" if self.model.timm else "init: scratch"
            raise ValueError(
                f"stages.pretrain masks patches of our own ViTs, and the model is {self.model.name}: set "
                f"stages.pretrain: null and stages.finetune.{how}, or take a vit_* as model.size"
            )
        return self

    @model_validator(mode="after")
    def _a_resnet_is_trained_from_scratch(self) -> Self:
        """A ResNet has no layers of decaying rates."""
        part, size = self.stages.finetune, self.model.size
        if not self.model.is_resnet or part is None:
            return self
        if part.init != "scratch":
            raise ValueError(
                f"stages.finetune.init is {part.init!r}: {size} begins from scratch alone, set init: scratch"
            )
        if part.layer_decay != 1:
            raise ValueError(f"stages.finetune.layer_decay has no effect on {size}: set layer_decay: 1.0")
        return self

    @model_validator(mode="after")
    def _timm_takes_these_options(self) -> Self:
        part, name = self.stages.finetune, self.model.timm
        if name is None or part is None:
            return self
        if part.head_norm != "none":
            raise ValueError(f"stages.finetune.head_norm is for our own ViTs, not for {name}: leave it out")
        if part.drop_path and "drop_path_rate" not in self.model.timm_facts.takes:
            raise ValueError(f"stages.finetune.drop_path has no effect on {name}, which takes none: set drop_path: 0")
        return self

    @model_validator(mode="after")
    def _only_timm_has_weights_to_download(self) -> Self:
        part = self.stages.finetune
        if part is not None and part.weights == DOWNLOAD and self.model.timm is None:
            raise ValueError(
                "stages.finetune.weights is 'download', which is for model.timm: give a file, or ./download for one "
                "of that name"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_allows_it(self) -> Self:
        """Batch norm keeps statistics of the batches that it has seen."""
        part, name = self.stages.finetune, self.model.name
        if part is None or not self.model.has_batchnorm:
            return self
        if part.micro_batch < 2:
            raise ValueError(f"stages.finetune.micro_batch is 1, and {name}'s batch norm needs at least 2 images")
        if self.parallel.activation_checkpointing:
            raise ValueError(
                f"parallel.activation_checkpointing computes blocks twice, and {name}'s batch norm would count each "
                "batch twice: leave it out"
            )
        if part.ema:
            raise ValueError(
                f"stages.finetune.ema averages weights, and {name}'s batch norm keeps the statistics of the others: "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _two_heads_are_plain(self) -> Self:
        part = self.stages.finetune
        if part is None or (part.distill is None and not self.model.distillation_token):
            return self
        if not self.model.distillation_token:
            raise ValueError("stages.finetune.distill trains a second head: set model.distillation_token: true")
        given = {
            "train": part.train.name, "head": part.head, "head_init": part.head_init, "head_norm": part.head_norm,
            "keep_head": part.keep_head,
        }  # fmt: skip
        plain = {"train": "all", "head": "linear", "head_init": "random", "head_norm": "none", "keep_head": False}
        for name, value in given.items():
            if value != plain[name]:
                raise ValueError(
                    f"stages.finetune.{name} is {value!r}, and a model with a distillation token has two plain heads, "
                    "trained with all else: leave it out, or stages.finetune.distill and model.distillation_token"
                )
        return self

    @model_validator(mode="after")
    def _layer_groups_can_be_seen(self) -> Self:
        if self.log.layer_groups and not supports(self.parallel.strategy, "layer_groups"):
            raise ValueError(
                f"log.layer_groups has no effect on parallel.strategy {self.parallel.strategy!r}, whose engine keeps "
                f"the gradients to itself: set strategy to {choices('layer_groups')}, or remove layer_groups"
            )
        return self

    @model_validator(mode="after")
    def _both_stages_cut_whole_patches(self) -> Self:
        part = self.stages.pretrain
        if part is None:
            return self
        if part.image_px:
            check_patches("stages.pretrain.image_px", part.image_px, patch_px=self.model.dims.patch_px)
        try:
            check_masking(self.at("pretrain").model, mask_ratio=part.mask_ratio, norm_pix=part.norm_pix)
        except ValueError as error:
            raise ValueError(f"stages.pretrain.{error}") from None
        return self

    def at(self, name: Stage) -> Self:
        """The recipe with the model as stage `name` sees it: `model.image_px` is that stage's, tokens likewise."""
        if name == "finetune" or self.stages.pretrain is None:
            return self
        px = self.stages.pretrain.image_px or self.model.image_px
        model = self.model.model_copy(update={"image_px": px, "distillation_token": False})
        return self if model == self.model else self.model_copy(update={"model": model})

    @model_validator(mode="after")
    def _an_average_can_be_kept(self) -> Self:
        strategy = self.parallel.strategy
        if self.stages.finetune and self.stages.finetune.ema and not supports(strategy, "ema"):
            raise ValueError(
                f"stages.finetune.ema is not supported by parallel.strategy {strategy!r}, which keeps no parameter "
                f"complete or as torch's shards: set strategy to {choices('ema')}, or remove ema"
            )
        return self

    @model_validator(mode="after")
    def _the_model_has_what_is_tuned(self) -> Self:
        part = self.stages.finetune
        if part is not None and part.train.freezes and not self.model.is_resnet:
            shapes, head = self.model.tunable_shapes
            try:
                part.train.adapted(shapes, head=head)
            except ValueError as error:
                raise ValueError(f"stages.finetune.train: {error}") from None
        return self

    @model_validator(mode="after")
    def _a_probe_can_be_spread(self) -> Self:
        part, strategy = self.stages.finetune, self.parallel.strategy
        if part is None:
            return self
        if part.optimizer.name != "adamw" and not supports(strategy, "other_optimizer"):
            raise ValueError(
                f"stages.finetune.optimizer {part.optimizer.name!r} is given complete parameters or torch's shards, "
                f"not the flat partitions of parallel.strategy {strategy!r}: set strategy to "
                f"{choices('other_optimizer')}, or optimizer: adamw"
            )
        if part.train.freezes and not supports(strategy, "frozen_parameters"):
            raise ValueError(
                f"stages.finetune.train {part.train.name!r} leaves parallel.strategy {strategy!r} almost no gradients "
                f"and moments to shard: set strategy to {choices('frozen_parameters')}"
            )
        if part.backbone_frozen and self.parallel.activation_checkpointing and self.stages.pretrain is None:
            raise ValueError(
                "parallel.activation_checkpointing has no effect on stages.finetune.train 'head': nothing of a frozen "
                "backbone is kept for a backward pass; leave it out"
            )
        name = part.optimizer.name
        if name != "adamw" and self.parallel.adamw == "foreach" and self.stages.pretrain is None:
            raise ValueError(f"parallel.adamw has no effect on stages.finetune.optimizer {name!r}: leave it out")
        return self

    def stage(self, name: Stage) -> Pretrain | Finetune:
        part = self.stages.pretrain if name == "pretrain" else self.stages.finetune
        if part is None:
            raise KeyError(name)
        return part

    @property
    def stage_names(self) -> tuple[Stage, ...]:
        return tuple(s for s in STAGES if getattr(self.stages, s) is not None)


def learnt_from(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The recipe's fields, dotted, that decide what `stage` learns: all that may not change freely in a run."""
    flat = _flatten(recipe.at(stage).model_dump(mode="json"))
    return {
        path: value
        for path, value in flat.items()
        if (not path.startswith("stages.") or path.startswith(f"stages.{stage}."))
        and resume_of(path, Recipe).of(batchnorm=recipe.model.has_batchnorm) != "free"
    }


def differences(old: Recipe, new: Recipe) -> list[Change]:
    """All fields in which two recipes differ, also those that may change freely."""
    before, after = (_flatten(recipe.model_dump(mode="json")) for recipe in (old, new))
    return changes(before, after, Recipe, batchnorm=new.model.has_batchnorm)


def digest(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields in one spelling, as hex."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
