"""The recipe's part `model`: the ViT that a run trains and the MAE's decoder, a ResNet, or a model of timm.

MODEL_SIZES.register("vit_tiny_mine", ViTDims(width=64, depth=4, heads=2, patch_px=4))      # a custom size
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from livt_scale.config import timm_models
from livt_scale.config.runtime import RecipePart
from livt_scale.config.timm_models import TimmFacts, TimmSpec
from livt_scale.util.choices import UNKNOWN_NAME, NameIn
from livt_scale.util.errors import UsageError
from livt_scale.util.registry import Registry


class ViTDims(NamedTuple):
    """The shape of a ViT's encoder."""

    width: int
    depth: int
    heads: int
    patch_px: int


# residual blocks of the four stages: ResNet, arXiv 1512.03385, table 1; from 50 on a block is a bottleneck.
# resnet_micro is ours, for images of 28 to 32 px: about as many weights as vit_micro has
RESNETS: dict[str, tuple[int, int, int, int]] = {
    "resnet_micro": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}
FIRST_WIDTH = {"resnet_micro": 20}  # channels of the first stage; each next one has twice as many
USUAL_FIRST_WIDTH = 64
SMALL_STEM_UP_TO_PX = 64
MLP_RATIO = 4  # hidden width of a ViT block's MLP over its width
OF_TIMM = {"timm": "what model.timm names"}

MODEL_SIZES: Registry[ViTDims] = Registry(
    "model size", reserved=dict.fromkeys((*RESNETS, *OF_TIMM), f"{__name__}.RESNETS")
)

# vit_micro is ours, for images of 28 to 32 px; the rest: ViT, DeiT, MAE
MODEL_SIZES.register("vit_micro", ViTDims(96, 4, 3, 4))
MODEL_SIZES.register("vit_ti", ViTDims(192, 12, 3, 16))
MODEL_SIZES.register("vit_s", ViTDims(384, 12, 6, 16))
MODEL_SIZES.register("vit_b", ViTDims(768, 12, 12, 16))
MODEL_SIZES.register("vit_l", ViTDims(1024, 24, 16, 16))
MODEL_SIZES.register("vit_h", ViTDims(1280, 32, 16, 14))


class Decoder(RecipePart):
    """The MAE's decoder, thrown away after pretraining."""

    width: PositiveInt = 512
    depth: PositiveInt = 8
    heads: PositiveInt = 16


class Model(RecipePart):
    """The Vision Transformer. A size gives width, depth, heads and patch; each can be set on its own.

    Or a ResNet, to be trained from scratch with labels: it has a size, and nothing else of these. Or any classification
    model of timm, to be fine-tuned: it has a name, arguments, and the images that it takes.
    """

    size: Annotated[str, NameIn(MODEL_SIZES, RESNETS, OF_TIMM)] = Field(
        "vit_b",
        description="resnet*: up to 64 px with CIFAR's stem, 3x3 of stride 1, no pooling; timm: the model that "
        "model.timm names, which sets this",
    )
    timm: str | None = Field(
        None, min_length=1, description="in place of size: a classification model of timm, as convnext_atto.d2_in1k"
    )
    args: dict[str, Any] = Field({}, description="with timm: further arguments of timm.create_model, as {depth: 2}")
    width: PositiveInt | None = Field(None, description="None: from the size")
    depth: PositiveInt | None = Field(None, description="None: from the size")
    heads: PositiveInt | None = Field(None, description="None: from the size")
    patch_px: PositiveInt | None = Field(None, description="None: from the size")
    image_px: PositiveInt = Field(224, description="side of the images; with timm, if not set, that of its weights")
    channels: PositiveInt = 3
    distillation_token: bool = Field(
        False, description="in fine-tuning, a second token with a head, as DeiT's; stages.finetune.distill sets it"
    )
    decoder: Decoder = Decoder()

    @model_validator(mode="before")
    @classmethod
    def _of_timm(cls, given: Any) -> Any:
        """The size that says so, and the images that timm's weights of that name take, where no others are set."""
        if not isinstance(given, Mapping) or given.get("timm") is None:
            return given
        return {"size": "timm", **timm_models.usual_image_px(given["timm"]), **given}

    @field_validator("timm")
    @classmethod
    def _timm_has_it(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                timm_models.check_name(name)
            except ValueError as error:
                raise PydanticCustomError(UNKNOWN_NAME, "{hint}", {"hint": str(error)}) from None
        return name

    @model_validator(mode="after")
    def _timm_can_build_it(self) -> Self:
        if self.timm is None:
            if self.size in OF_TIMM:
                raise ValueError("size is 'timm', and timm names no model: set model.timm, or take another size")
            if self.args:
                raise ValueError("args has no effect without timm: leave it out, or set model.timm")
            return self
        given = [name for name in ("width", "depth", "heads", "patch_px") if getattr(self, name) is not None]
        if self.size not in OF_TIMM:
            raise ValueError(f"size is {self.size!r}, and timm names another model: leave size out, or set it to timm")
        if given:
            raise ValueError(
                f"{' and '.join(given)} has no effect on {self.timm}: leave it out, or give timm's own argument in args"
            )
        timm_models.check_args(self.args)
        timm_models.facts_of(self.timm_spec)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.is_vit:
            return self
        width, _, heads, patch_px = self.dims
        if width % heads:
            raise ValueError(f"heads is {heads} and does not divide the width {width}")
        if self.decoder.width % self.decoder.heads:
            raise ValueError(f"decoder.heads is {self.decoder.heads} and does not divide {self.decoder.width}")
        check_patches("image_px", self.image_px, patch_px=patch_px)
        for name, dim in (("width", width), ("decoder.width", self.decoder.width)):
            if dim % 4:
                raise ValueError(f"{name} is {dim}: sine-cosine positions need a multiple of 4")
        return self

    @model_validator(mode="after")
    def _only_our_own_vits_have_a_second_token(self) -> Self:
        if self.distillation_token and not self.is_vit:
            raise ValueError(
                f"distillation_token, which stages.finetune.distill sets, is for our own ViTs, not for {self.name}: "
                "leave both out, or take a vit_*"
            )
        return self

    @model_validator(mode="after")
    def _a_resnet_has_a_size_alone(self) -> Self:
        if not self.is_resnet:
            return self
        given = [name for name in ("width", "depth", "heads", "patch_px") if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} has no effect on size {self.size!r}: leave it out, or take a vit_*"
            )
        if self.size in FIRST_WIDTH and not self.has_small_stem:
            raise ValueError(
                f"image_px is {self.image_px}, and {self.size} is for images up to {SMALL_STEM_UP_TO_PX} px: "
                "take resnet18, or smaller images"
            )
        return self

    @property
    def is_vit(self) -> bool:
        return self.size in MODEL_SIZES

    @property
    def is_resnet(self) -> bool:
        return self.size in RESNETS

    @property
    def name(self) -> str:
        """What the model is called: its name in timm, else its size."""
        return self.timm or self.size

    @property
    def timm_spec(self) -> TimmSpec:
        """UsageError: the model is not of timm."""
        if self.timm is None:
            raise UsageError(f"model.size is {self.size}, which is not a model of timm", remedy="set model.timm")
        return TimmSpec(self.timm, self.image_px, self.channels, json.dumps(self.args, sort_keys=True))

    @property
    def timm_facts(self) -> TimmFacts:
        """The parts of a model of timm, which is imported for it. UsageError: the model is not of timm."""
        return timm_models.facts_of(self.timm_spec)

    @property
    def has_batchnorm(self) -> bool:
        return self.is_resnet or (self.timm is not None and self.timm_facts.has_batchnorm)

    @property
    def stage_blocks(self) -> tuple[int, int, int, int]:
        """A ResNet's residual blocks, by stage."""
        return RESNETS[self.size]

    @property
    def stage_widths(self) -> tuple[int, int, int, int]:
        """A ResNet's channels by stage, inside of a block; a bottleneck gives out four times as many."""
        first = FIRST_WIDTH.get(self.size, USUAL_FIRST_WIDTH)
        return first, 2 * first, 4 * first, 8 * first

    @property
    def has_bottlenecks(self) -> bool:
        return self.size == "resnet50"

    @property
    def has_small_stem(self) -> bool:
        return self.is_resnet and self.image_px <= SMALL_STEM_UP_TO_PX

    def num_uniforms(self, *, drop_path: float) -> int:
        """Random numbers that the classifier takes for each image in training.

        One for each branch that is dropped, and of a model of timm one more if it draws others: they seed those.
        """
        branches = self.num_branches if drop_path else 0
        return branches + (self.timm is not None and self.timm_facts.draws)

    @property
    def num_branches(self) -> int:
        """Residual branches, each dropped independently (stochastic depth): two per ViT block, one per ResNet block."""
        if self.timm is not None:
            return len(self.timm_facts.drop_paths)
        return 2 * self.dims.depth if self.is_vit else sum(self.stage_blocks)

    @property
    def dims(self) -> ViTDims:
        """Of a ViT: what the recipe sets, else what the size gives. UsageError: the model is not a ViT."""
        if not self.is_vit:
            raise UsageError(f"the model is {self.name}, which has no patches", remedy="take a vit_* for this")
        width, depth, heads, patch_px = MODEL_SIZES[self.size]
        return ViTDims(self.width or width, self.depth or depth, self.heads or heads, self.patch_px or patch_px)

    @property
    def tunable_shapes(self) -> tuple[dict[str, tuple[int, ...]], str]:
        """(what methods of `config.tuning` look for by name: matrices of the blocks, positions; the head's name)."""
        if self.timm is not None:
            facts, spec = self.timm_facts, self.timm_spec
            weights = timm_models.weights_of(spec, num_classes=2)[0]
            return {w.name: w.shape for w in weights if w.name not in facts.unused}, facts.head
        width, depth, _, _ = self.dims
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (MLP_RATIO * width, width), "mlp.fc2": (width, MLP_RATIO * width)}
        blocks = {f"blocks.{k}.{name}.weight": shape for k in range(depth) for name, shape in linear.items()}
        return {"pos_embed": (1, 1 + self.num_patches, width), **blocks}, "head"

    @property
    def prefix_tokens(self) -> int:
        """Tokens that the classifier has before the patches; it has as many heads."""
        return 2 if self.distillation_token else 1

    @property
    def num_patches(self) -> int:
        return (self.image_px // self.dims.patch_px) ** 2

    def num_kept(self, mask_ratio: float) -> int:
        """Patches that pretraining shows its encoder."""
        return int(self.num_patches * (1 - mask_ratio))


def check_patches(name: str, px: int, *, patch_px: int) -> None:
    """Raise ValueError unless `px` is a multiple of `patch_px`."""
    if px % patch_px:
        lower = max(px // patch_px, 1) * patch_px
        raise ValueError(
            f"{name} is {px}, not a multiple of patch_px = {patch_px}: the nearest are {lower} and {lower + patch_px}"
        )


def check_masking(model: Model, *, mask_ratio: float, norm_pix: bool) -> None:
    """Raise ValueError where pretraining has no patch to see or none to predict, or targets without a variance."""
    num_kept = model.num_kept(mask_ratio)
    if not 0 < num_kept < model.num_patches:
        raise ValueError(
            f"mask_ratio {mask_ratio:g} of {model.num_patches} patches keeps {num_kept}: keep at least one and mask at "
            "least one, or take smaller patches"
        )
    if norm_pix and model.channels * model.dims.patch_px**2 == 1:
        raise ValueError(
            "norm_pix with patch_px 1 and one channel: a patch of one value has no variance. Set norm_pix: false, or "
            "take larger patches"
        )
