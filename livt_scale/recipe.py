"""What a run is: one recipe, made of typed, frozen parts. The names here are the names in the YAML.

A default stands here and nowhere else. Unless a description says otherwise it is the paper's (LiVT, arXiv
2212.02015, table of hyper-parameters for ImageNet-LT; MAE, arXiv 2111.06377, table 8). `None` means "derived",
and the description says from what. What the recipe alone decides is checked here; what needs the world size is
checked by `livt_scale.train.batches`. How the work is done (`parallel`, `checkpoint`, `faults`, `log`) is
`livt_scale.recipe_work`'s, reading YAML, `extends:` and `--set` is `livt_scale.recipe_file`'s.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from livt_scale.location import is_url, url_problem
from livt_scale.recipe_slurm import Slurm
from livt_scale.recipe_work import Checkpoint, Faults, Log, Parallel, RecipePart

Fraction = Annotated[float, Field(ge=0, le=1)]
Stage = Literal["pretrain", "finetune"]
Policy = Literal["instance", "class_balanced", "sqrt"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")

# width, depth, heads, patch size in px. vit_micro is ours, for images of 28 to 32 px; the rest: ViT, DeiT, MAE.
MODEL_SIZES: dict[str, tuple[int, int, int, int]] = {
    "vit_micro": (96, 4, 3, 4),
    "vit_ti": (192, 12, 3, 16),
    "vit_s": (384, 12, 6, 16),
    "vit_b": (768, 12, 12, 16),
    "vit_l": (1024, 24, 16, 16),
    "vit_h": (1280, 32, 16, 14),
}
LOSS_NAMES = ("ce", "bce", "bal_ce", "bal_bce")


class Cache(RecipePart):
    """Where shards from a URL are kept on each node, and how much of them. Local folders are read in place."""

    dir: str | None = Field(
        None, min_length=1, description="on the node's own disk; None: LIVT_CACHE_DIR, else livt-cache-UID in $TMPDIR"
    )
    limit_gib: PositiveFloat = Field(64, description="GiB a node, over all its processes; what was used last stays")
    ahead: PositiveInt = Field(4, description="shards that each loader process has fetched before it needs them")


class Remote(RecipePart):
    """How a file is fetched from a URL."""

    tries: PositiveInt = Field(8, description="of a time-out, reset, wrong body, 429 or 5xx; 404 and 403 end at once")
    connect_timeout_s: PositiveFloat = Field(10, description="for the connection to be made")
    stall_timeout_s: PositiveFloat = Field(30, description="a connection that says nothing for so long is cut")
    deadline_s: PositiveFloat = Field(900, description="for one file, all tries and waits together")


class Data(RecipePart):
    """Which shards, and how they are read."""

    train: str = Field(min_length=1, description="folder or URL of the training shards (the one with manifest.json)")
    val: str | None = Field(None, min_length=1, description="the same of the evaluation shards; None: no evaluation")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="of the pixels in [0, 1], one a channel")
    std: tuple[PositiveFloat, ...] = Field((0.229, 0.224, 0.225), description="of the pixels, one a channel")
    many_over: PositiveInt = Field(100, description="many-shot: classes with more training images than this")
    few_under: PositiveInt = Field(20, description="few-shot: classes with fewer training images than this")
    workers: NonNegativeInt | Literal["auto"] = Field(
        2, description="loader processes a rank; 0 decodes in the training process; auto: measured at the start"
    )
    prefetch: PositiveInt = Field(4, description="micro-batches each loader process keeps ready; with auto, at most")
    decode: Literal["cpu", "gpu"] = Field(
        "cpu", description="who decodes training JPEGs; gpu: nvJPEG, but for fine-tuning with RandAugment or erasing"
    )
    lane_groups: PositiveInt | None = Field(
        None, description="groups of slots with shards of their own; None: the most that leave each 12 shards"
    )
    shuffle_window: PositiveInt = Field(65536, description="samples among which a lane group shuffles")
    cache: Cache = Cache()
    remote: Remote = Remote()

    @model_validator(mode="after")
    def _urls_hold_no_secret(self) -> Self:
        for name in ("train", "val"):
            location = getattr(self, name)
            problem = url_problem(location) if location and is_url(location) else None
            if problem:  # the URL itself is not repeated: it may hold a password
                raise ValueError(f"{name} is a URL that cannot be: {problem}")
        return self

    @model_validator(mode="after")
    def _thresholds_leave_a_middle(self) -> Self:
        if self.few_under > self.many_over + 1:
            raise ValueError(f"few_under is {self.few_under}, above many_over = {self.many_over}: groups overlap")
        return self


class Decoder(RecipePart):
    """The MAE's decoder, thrown away after pretraining."""

    width: PositiveInt = 512
    depth: PositiveInt = 8
    heads: PositiveInt = 16


class Model(RecipePart):
    """The Vision Transformer. A size gives width, depth, heads and patch; each can be set on its own."""

    size: Literal["vit_micro", "vit_ti", "vit_s", "vit_b", "vit_l", "vit_h"] = "vit_b"
    width: PositiveInt | None = Field(None, description="None: from the size")
    depth: PositiveInt | None = Field(None, description="None: from the size")
    heads: PositiveInt | None = Field(None, description="None: from the size")
    patch_px: PositiveInt | None = Field(None, description="None: from the size")
    image_px: PositiveInt = 224
    channels: PositiveInt = 3
    decoder: Decoder = Decoder()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        width, _, heads, patch_px = self.dims
        if width % heads:
            raise ValueError(f"heads is {heads} and does not divide the width {width}")
        if self.decoder.width % self.decoder.heads:
            raise ValueError(f"decoder.heads is {self.decoder.heads} and does not divide {self.decoder.width}")
        if self.image_px % patch_px:
            lower = max(self.image_px // patch_px, 1) * patch_px
            raise ValueError(
                f"image_px is {self.image_px}, not a multiple of patch_px = {patch_px}: "
                f"the nearest are {lower} and {lower + patch_px}"
            )
        for name, dim in (("width", width), ("decoder.width", self.decoder.width)):
            if dim % 4:
                raise ValueError(f"{name} is {dim}: sine-cosine positions need a multiple of 4")
        return self

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """(width, depth, heads, patch_px), what is set over what the size gives."""
        width, depth, heads, patch_px = MODEL_SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads, self.patch_px or patch_px

    @property
    def num_patches(self) -> int:
        return (self.image_px // self.dims[3]) ** 2

    def num_kept(self, mask_ratio: float) -> int:
        """Patches that pretraining shows its encoder."""
        return int(self.num_patches * (1 - mask_ratio))


class _Policy(RecipePart):
    policy: Literal["instance", "class_balanced", "sqrt", "progressive"] = Field(
        "instance", description="instance: each image once an epoch; the others draw by class, see docs/order.md"
    )


# `from` is a word of Python's, so these two fields cannot be written as the others are
_FromTo: Any = create_model(  # type: ignore[call-overload]
    "_FromTo",
    __base__=_Policy,
    **{
        "from": (Policy | None, Field(None, description="progressive: the policy that the stage begins with")),
        "to": (Policy | None, Field(None, description="progressive: the policy that it moves towards")),
    },
)


class Sampling(_FromTo):
    """How likely each class is drawn: by images, evenly, by the root of its images, or moving between two of them."""

    @model_validator(mode="after")
    def _ends_go_with_progressive(self) -> Self:
        given = [name for name in ("from", "to") if getattr(self, name) is not None]
        if self.policy == "progressive" and len(given) < 2:
            raise ValueError("policy is 'progressive': give both from and to, as {from: instance, to: class_balanced}")
        if self.policy != "progressive" and given:
            raise ValueError(f"{' and '.join(given)} has no effect on policy {self.policy!r}: leave it out")
        return self

    @property
    def ends(self) -> tuple[Policy, Policy]:
        """The policies of the first epoch and towards the last: twice the same but for progressive."""
        if self.policy == "progressive":
            begin, end = (getattr(self, name) for name in ("from", "to"))
            return begin, end
        return self.policy, self.policy


class StagePart(RecipePart):
    """What both stages have."""

    epochs: PositiveInt
    global_batch: PositiveInt = Field(description="images an optimizer step, over all ranks")
    micro_batch: PositiveInt = Field(
        64, description="images a forward pass on one rank, at most: a rank with fewer slots takes them all"
    )
    base_lr: PositiveFloat = Field(description="learning rate for a global batch of 256; scaled linearly")
    min_lr: NonNegativeFloat = Field(description="where the cosine ends")
    warmup_epochs: NonNegativeFloat = Field(description="epochs of linear warm-up")
    weight_decay: NonNegativeFloat = Field(
        0.05, description="none on biases and norms; in fine-tuning none on tokens and positions either"
    )
    betas: tuple[Fraction, Fraction]
    clip_grad: PositiveFloat | None = Field(None, description="largest global gradient norm; None: not clipped")
    crop_scale: tuple[Fraction, Fraction] = Field(description="share of the image's area in a random resized crop")
    flip: bool = Field(True, description="mirror half of the images")
    sampling: Sampling = Sampling()
    repeats: PositiveInt = Field(
        1, description="views of an image in one batch, neighbours; an epoch keeps its steps and sees 1/repeats of them"
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g}, more than epochs = {self.epochs}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}: give 0 < smallest <= largest <= 1")
        if self.micro_batch > self.global_batch:
            raise ValueError(f"micro_batch is {self.micro_batch}, more than global_batch = {self.global_batch}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether neighbouring slots (2k, 2k + 1) are mixed with each other."""
        return False

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
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of patches left out")
    norm_pix: bool = Field(True, description="the target: each patch less its mean, over its deviation")


class Loss(RecipePart):
    """Which loss, from `livt_scale.losses`."""

    name: Literal["ce", "bce", "bal_ce", "bal_bce"] = "bal_bce"
    tau: NonNegativeFloat | None = Field(None, description="strength of the margin, bal_* only; None: 1")

    @model_validator(mode="after")
    def _tau_has_an_effect(self) -> Self:
        if self.tau is not None and not self.name.startswith("bal_"):
            raise ValueError(f"tau has no effect on the loss {self.name!r}: leave it out, or take bal_ce or bal_bce")
        return self


class Finetune(StagePart):
    """Stage 2, balanced fine-tuning. Defaults: the paper's table for ImageNet-LT."""

    epochs: PositiveInt = 100
    global_batch: PositiveInt = 1024
    base_lr: PositiveFloat = 1e-3
    min_lr: NonNegativeFloat = 1e-6
    warmup_epochs: NonNegativeFloat = 10
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    init: Literal["pretrain", "scratch"] = Field("pretrain", description="where the encoder's weights come from")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    rand_augment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's notation; None: none")
    random_erasing: Fraction = Field(0.25, description="share of images with a rectangle of noise")
    mixup: NonNegativeFloat = Field(0.8, description="a of Beta(a, a); 0: no mixup")
    cutmix: NonNegativeFloat = Field(1.0, description="a of Beta(a, a); 0: no cutmix. With mixup: half and half")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="ε: off = ε/C, on = 1 − ε + ε/C")
    loss: Loss = Loss()
    eval_every_epochs: PositiveInt | None = Field(None, description="None: at the end alone")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _pairs_stay_on_one_rank(self) -> Self:
        for name in ("micro_batch", "global_batch"):
            if self.mixes and getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}: mixup and cutmix pair neighbours, so make it even")
        return self


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
        return self


class Recipe(RecipePart):
    """One run: data, model, stages, parallelism, checkpoints."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(description="names the folder below runs/")
    run_dir: str | None = Field(None, description="None: runs/NAME")
    seed: NonNegativeInt = 0
    data: Data
    model: Model = Model()
    stages: Stages
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    log: Log = Log()
    slurm: Slurm = Slurm()

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
    def _a_gpu_has_something_to_decode(self) -> Self:
        if self.data.decode == "gpu" and not any(self.decodes_on_gpu(stage) for stage in self.stage_names):
            raise ValueError(
                "data.decode = gpu has no effect: RandAugment and erasing change pixels on the CPU, so fine-tuning "
                "with them decodes there; leave it out, or set stages.finetune.rand_augment: null, random_erasing: 0"
            )
        if self.data.decode == "gpu" and self.model.channels != 3:
            raise ValueError(f"data.decode = gpu reads colour alone, and model.channels is {self.model.channels}")
        return self

    def decodes_on_gpu(self, stage: Stage) -> bool:
        """Does `data.decode: gpu` reach this stage?"""
        part = self.stage(stage)
        augments = isinstance(part, Finetune) and bool(part.rand_augment or part.random_erasing)
        return self.data.decode == "gpu" and not augments

    @model_validator(mode="after")
    def _layer_groups_can_be_seen(self) -> Self:
        if self.log.layer_groups and self.parallel.strategy.startswith("zero"):
            raise ValueError(
                f"log.layer_groups has no effect on strategy {self.parallel.strategy!r}, whose engine keeps the "
                "gradients to itself: take ddp or fsdp, or leave it out"
            )
        return self

    def stage(self, name: Stage) -> Pretrain | Finetune:
        part = self.stages.pretrain if name == "pretrain" else self.stages.finetune
        if part is None:
            raise KeyError(name)
        return part

    @property
    def stage_names(self) -> tuple[Stage, ...]:
        return tuple(s for s in STAGES if getattr(self.stages, s) is not None)


# What may change between a run's start and its continuation: it moves files and work, not the numbers learnt.
HARMLESS = (
    "name",
    "run_dir",
    "data.train",
    "data.val",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.remote",
    "parallel",
    "checkpoint",
    "faults",
    "log",
    "slurm",
)
HARMLESS_IN_STAGE = ("micro_batch", "eval_every_epochs")


def learnt_from(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The recipe's fields, dotted, that decide what `stage` learns; a continued run must not change them."""
    flat = _flatten(recipe.model_dump(mode="json"))
    kept = {}
    for path, value in flat.items():
        if any(path == h or path.startswith(f"{h}.") for h in HARMLESS):
            continue
        if path.startswith("stages.") and (
            not path.startswith(f"stages.{stage}.") or path.removeprefix(f"stages.{stage}.") in HARMLESS_IN_STAGE
        ):
            continue
        kept[path] = value
    return kept


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
