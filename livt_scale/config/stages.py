"""What each stage learns from and how: the recipe's parts `stages.pretrain` and `stages.finetune`.

Defaults are the paper's, as `livt_scale.config.recipe` says.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from livt_scale.config.optimizers import AdamW, AnyOptimizer, OptimizerOptions
from livt_scale.config.resume import ALLOW, FREE, Resume
from livt_scale.config.runtime import RecipePart
from livt_scale.config.sampling import Instance, Sampling
from livt_scale.config.tuning import AnyTuning, TrainAll, Tuning
from livt_scale.losses import LOSSES, LossOptions
from livt_scale.losses.builtin import BalancedBinaryCrossEntropy
from livt_scale.util.choices import Chosen

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
# timm.data.auto_augment.rand_augment_transform, which leaves out in silence what it does not know
RAND_AUGMENT = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|t[a-z0-9]+))*")


def _micro_batch() -> Any:
    return Field(64, description="images a forward pass on one rank, at most: a rank with fewer slots takes them all")


class StagePart(RecipePart):
    """What both stages have."""

    epochs: Annotated[PositiveInt, ALLOW]
    global_batch: PositiveInt = Field(description="images an optimizer step, over all ranks")
    micro_batch: Annotated[PositiveInt, FREE] = _micro_batch()
    base_lr: Annotated[PositiveFloat, ALLOW] = Field(
        description="learning rate for a global batch of 256; scaled linearly"
    )
    min_lr: Annotated[NonNegativeFloat, ALLOW] = Field(description="where the cosine ends")
    warmup_epochs: Annotated[NonNegativeFloat, ALLOW] = Field(description="epochs of linear warm-up")
    weight_decay: Annotated[NonNegativeFloat, ALLOW] = Field(
        0.05, description="none on biases and norms; in fine-tuning none on tokens and positions either"
    )
    betas: tuple[BelowOne, BelowOne]
    clip_grad: Annotated[PositiveFloat | None, ALLOW] = Field(
        None, description="largest global gradient norm; None: not clipped"
    )
    crop_scale: Annotated[tuple[Fraction, Fraction], ALLOW] = Field(
        description="share of the image's area in a random resized crop"
    )
    crop_rule: Annotated[Literal["torchvision", "mae"], ALLOW] = Field(
        "torchvision",
        description="a crop larger than the image: torchvision draws again, ten times at most; mae cuts it off, as in "
        "MAE's linear probe",
    )
    flip: Annotated[bool, ALLOW] = Field(True, description="mirror half of the images")
    sampling: Sampling = Field(Instance(), description="how likely each class is drawn: see docs/loader.md")
    repeats: PositiveInt = Field(
        1, description="views of an image in one batch, neighbours; an epoch keeps its steps and sees 1/repeats of them"
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g}, more than epochs = {self.epochs}: set it too")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}: give 0 < smallest <= largest <= 1")
        if self.micro_batch > self.global_batch:
            raise ValueError(f"micro_batch is {self.micro_batch}, more than global_batch = {self.global_batch}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether neighbouring slots (2k, 2k + 1) are mixed with each other."""
        return False

    @property
    def lars_momentum(self) -> float | None:
        """None: the stage is not trained by LARS."""
        return None

    @property
    def trained_by(self) -> OptimizerOptions:
        """The optimizer."""
        return AdamW()

    @property
    def tuning(self) -> Tuning:
        """Which parameters are trained."""
        return TrainAll()

    @property
    def backbone_frozen(self) -> bool:
        """Whether the head alone is trained."""
        return self.tuning.head_alone

    @model_validator(mode="after")
    def _views_fill_the_batch(self) -> Self:
        unit = self.repeats * (2 if self.mixes and self.repeats > 1 else 1)
        if self.global_batch % unit:
            pairs = "; with mixup or cutmix the views of two images share 2 · repeats slots" if self.mixes else ""
            near = max(1, round(self.global_batch / unit)) * unit
            raise ValueError(
                f"repeats is {self.repeats}: global_batch must be a multiple of {unit}, not {self.global_batch}"
                f"{pairs}. The nearest is {near}"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """`base_lr` · `global_batch` / 256, the linear rule of both papers."""
        return self.base_lr * self.global_batch / 256


class Pretrain(StagePart):
    """Stage 1, masked generative pretraining (MAE, arXiv 2111.06377). No labels, so no imbalance."""

    epochs: PositiveInt = 800
    global_batch: PositiveInt = 4096
    base_lr: PositiveFloat = 1.5e-4
    min_lr: NonNegativeFloat = 0.0
    warmup_epochs: NonNegativeFloat = 40
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of patches left out")
    norm_pix: bool = Field(True, description="the target: each patch less its mean, over its deviation")
    image_px: PositiveInt | None = Field(
        None, description="side of the images of this stage, e.g. 128 before a fine-tuning at 224; None: model.image_px"
    )
    weights: Annotated[str | None, FREE] = Field(
        None, description="start from these: what `livt import` wrote, a file; None: from the seed"
    )


AnyLoss = Annotated[LossOptions, Chosen(LOSSES, default="bal_bce")]


class Ema(RecipePart):
    """An exponential moving average of the weights, kept beside them; what is learnt does not depend on it."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.9999, description="how much of the average stays at an update")
    warmup: bool = Field(True, description="at update k (from 0) no more than (1 + k) / (10 + k) stays")


class Distill(RecipePart):
    """Distillation from a CNN into a second token: DeiT-LT, arXiv 2404.02900. Defaults: its public code's."""

    teacher: Annotated[str, FREE] = Field(
        description="a trained classifier of the same classes and images: what `livt export` wrote, or a finished run"
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the distillation loss; the rest is of loss, on the class token"
    )
    reweight_after: Fraction = Field(
        11 / 12,
        description="share of the epochs after which the distillation loss weights classes by their effective number; "
        "1: never (default: 1100 of 1200 epochs, as for CIFAR)",
    )
    beta: BelowOne = Field(0.9999, description="of the effective number, as of loss cb_ce")


DOWNLOAD = "download"  # as stages.finetune.weights
ALLOW_DOWNLOAD = "LIVT_ALLOW_DOWNLOAD"  # in the environment of all ranks, set by `livt train --allow-download`
LARS_MOMENTUM = 0.9  # MAE, arXiv 2111.06377, table 10
COSINE_SCALE = 25.0  # LIFT, arXiv 2309.10019, in its public code


class Finetune(StagePart):
    """Stage 2, balanced fine-tuning. Defaults: the paper's table for ImageNet-LT."""

    epochs: PositiveInt = 100
    global_batch: PositiveInt = 1024
    micro_batch: Annotated[PositiveInt, Resume("free", with_batchnorm="allow")] = _micro_batch()
    base_lr: PositiveFloat = 1e-3
    min_lr: NonNegativeFloat = 1e-6
    warmup_epochs: NonNegativeFloat = 10
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    init: Literal["pretrain", "scratch", "weights"] = Field(
        "pretrain", description="where the encoder's weights come from"
    )
    weights: Annotated[str | None, FREE] = Field(
        None,
        description="with init: weights. What `livt import` or `livt export` wrote, a file, or another run; with "
        "model.timm also `download`: timm's own, with `livt train --allow-download`",
    )
    keep_head: Annotated[bool, FREE] = Field(
        False, description="with init: weights. Take the head too; its classes must be the same"
    )
    train: AnyTuning = Field(
        TrainAll(),
        description="all, or a few parameters: head (a linear probe), lora, adaptformer, vpt, bitfit, layernorm, with "
        "options as {name: lora, rank: 8}",
    )
    optimizer: AnyOptimizer = Field(
        AdamW(), description="adamw, lars, or with options {name: sgd, momentum: 0.9} or one that you registered"
    )
    momentum: BelowOne | None = Field(None, description="lars: how much of the last step's stays; None: 0.9")
    head_norm: Literal["none", "batch"] = Field(
        "none",
        description="with train: head. batch: BatchNorm without weights before the head, of all images of the steps "
        "before, on all ranks",
    )
    head: Literal["linear", "cosine"] = Field(
        "linear", description="cosine: head_scale times the cosine of features and class weights, without a bias"
    )
    head_scale: PositiveFloat | None = Field(None, description="with head: cosine; None: 25")
    head_init: Literal["random", "class_means", "file"] = Field(
        "random",
        description="what the head's weights are at the first step. class_means: the mean features of each class, over "
        "one pass of the training set; file: those in head_file. Both with norm 1",
    )
    head_file: Annotated[str | None, FREE] = Field(
        None, description="with head_init: file. A vector for each class, e.g. of a text encoder: see docs/features.md"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1), ALLOW] = 0.75
    drop_path: Annotated[float, Field(ge=0, lt=1), ALLOW] = 0.1
    rand_augment: Annotated[str | None, ALLOW] = Field(
        "rand-m9-mstd0.5-inc1", description="timm's notation; None: none"
    )
    random_erasing: Annotated[Fraction, ALLOW] = Field(0.25, description="share of images with a rectangle of noise")
    mixup: NonNegativeFloat = Field(0.8, description="a of Beta(a, a); 0: no mixup")
    cutmix: NonNegativeFloat = Field(1.0, description="a of Beta(a, a); 0: no cutmix. With mixup: half and half")
    smoothing: Annotated[float, Field(ge=0, lt=1), ALLOW] = Field(0.1, description="ε: off = ε/C, on = 1 − ε + ε/C")
    loss: AnyLoss = Field(BalancedBinaryCrossEntropy(), description="which loss, and its options: see docs/losses.md")
    distill: Distill | None = Field(
        None, description="a CNN teaches a second token, as {teacher: FOLDER}: see docs/distillation.md; None: none"
    )
    eval_every_epochs: Annotated[PositiveInt | None, FREE] = Field(None, description="None: at the end alone")
    ema: Ema | None = Field(None, description="also keep an average of the weights, as {decay: 0.9999}; None: none")

    @model_validator(mode="after")
    def _timm_reads_the_augmentation(self) -> Self:
        if self.rand_augment is not None and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment is {self.rand_augment!r}, not timm's notation: rand, then any of -m9, -n2, -p0.5, "
                "-mstd0.5, -mmax10, -inc1 and -t with the name of a list, e.g. rand-m9-mstd0.5-inc1"
            )
        return self

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def tuning(self) -> Tuning:
        return self.train

    @property
    def lars_momentum(self) -> float | None:
        if self.optimizer.name != "lars":
            return None
        return LARS_MOMENTUM if self.momentum is None else self.momentum

    @property
    def trained_by(self) -> OptimizerOptions:
        return self.optimizer

    @model_validator(mode="after")
    def _a_frozen_backbone_is_left_alone(self) -> Self:
        if self.head_norm != "none" and not self.backbone_frozen:
            raise ValueError(
                f"head_norm is {self.head_norm!r}, whose statistics are of a backbone that stays as it is: "
                "set train: head, or head_norm: none"
            )
        if self.train.freezes and self.init == "scratch":
            raise ValueError(
                f"train is {self.train.name!r}, so the backbone of init 'scratch' would stay random: take other weights"
            )
        if not self.backbone_frozen:
            return self
        for name, neutral in (("layer_decay", 1), ("drop_path", 0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name):g}, which has no effect on the frozen backbone of train 'head': "
                    f"set {name}: {neutral}"
                )
        if self.keep_head and self.head_norm != "none":
            raise ValueError("keep_head: that head was trained without head_norm: set head_norm: none, or leave it out")
        return self

    @property
    def cosine_scale(self) -> float | None:
        """None: the head is linear."""
        if self.head != "cosine":
            return None
        return COSINE_SCALE if self.head_scale is None else self.head_scale

    @model_validator(mode="after")
    def _the_head_takes_these_options(self) -> Self:
        if self.head_scale is not None and self.head != "cosine":
            raise ValueError(f"head_scale has no effect with head {self.head!r}: set head: cosine, or leave it out")
        if (self.head_init == "file") != (self.head_file is not None):
            raise ValueError(
                f"head_init is {self.head_init!r} and head_file is {self.head_file!r}: head_init: file needs a file, "
                "and nothing else reads one"
            )
        if self.keep_head and (self.head != "linear" or self.head_init != "random"):
            raise ValueError("keep_head takes a linear head along: set head: linear and head_init: random, or leave it")
        if self.head_init == "random":
            return self
        if self.init == "scratch":
            raise ValueError(
                f"head_init is {self.head_init!r}, and the backbone of init 'scratch' is random, and so are its "
                "features: set head_init: random"
            )
        if self.head_norm != "none":
            raise ValueError(
                f"head_init is {self.head_init!r}, but head_norm {self.head_norm!r} changes the features after the "
                "first step: set head_norm: none"
            )
        return self

    @model_validator(mode="after")
    def _the_optimizer_takes_these_options(self) -> Self:
        name = self.optimizer.name
        if name != "lars" and self.momentum is not None:
            raise ValueError(f"momentum has no effect on optimizer {name!r}: leave it out, or take lars")
        if name != "adamw" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError(f"betas has no effect on optimizer {name!r}: leave it out, or take adamw")
        return self

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> Self:
        if self.init == "weights" and self.weights is None:
            raise ValueError("init is 'weights', but weights names no file: give it, or set init: scratch")
        for name in ("weights", "keep_head"):
            if self.init != "weights" and getattr(self, name):
                raise ValueError(f"{name} has no effect with init {self.init!r}: set init: weights, or leave it out")
        return self

    @model_validator(mode="after")
    def _pairs_stay_on_one_rank(self) -> Self:
        for name in ("global_batch", "micro_batch"):
            if self.mixes and getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}: mixup and cutmix pair neighbours, so make it even")
        return self

    @model_validator(mode="after")
    def _both_heads_speak_alike(self) -> Self:
        loss = self.loss
        if self.distill is not None and (loss.link != "softmax" or loss.logit_scale != 1):
            raise ValueError(
                f"loss is {loss.name!r}, and distill averages the logits of its head with those of one trained by "
                "softmax cross entropy: take a loss of that kind, as ce or bal_ce"
            )
        return self

    @model_validator(mode="after")
    def _the_loss_takes_these_targets(self) -> Self:
        loss = self.loss
        given = {name: getattr(self, name) for name in loss.refuses if getattr(self, name)}
        if given:
            values = ", ".join(f"{name} is {value:g}" for name, value in given.items())
            zeros = ", ".join(f"{name}: 0" for name in given)
            raise ValueError(f"{values}, but the loss {loss.name!r} {loss.refuses_because}: set {zeros}")
        return self
