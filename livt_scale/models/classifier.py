"""Stage 2's network: timm's VisionTransformer with mean pooling, as LiVT fine-tunes it, and how it takes MAE's weights.
A ResNet (`models.resnet`) and any other model of timm (`models.timm_backbone`) are built here too.

The state dict is timm's, so an export is plain timm. Two things differ from timm's own: the initialisation (MAE's; a
head of almost zero, so that training starts from equal odds), and stochastic depth, whose coins the caller may give:
`drop` holds one uniform number for each image and residual branch, so that a run's coins belong to its samples and not
to a rank. `drop[b, 2k]` decides the attention of block k for image b, `drop[b, 2k + 1]` its MLP.

A linear probe is the same network, of which the head alone has gradients (`models.parameter_efficient`).

Source: LiVT, arXiv 2212.02015, section 4; MAE, arXiv 2111.06377, A.2; stochastic depth, arXiv 1603.09382.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers import trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from livt_scale.config.recipe import Model
from livt_scale.models.cosine_head import CosineHead
from livt_scale.models.head_norm import HeadNorm
from livt_scale.models.layers import LAYER_NORM, DropPath, check_images, coins, on_grid, vit_args
from livt_scale.models.mae import reset_encoder
from livt_scale.models.resnet import ResNetClassifier
from livt_scale.models.timm_backbone import TimmClassifier, build_timm
from livt_scale.util.errors import CheckpointMismatch, UsageError

# What may be left over in a pretrained state, and what fine-tuning initialises. Everything else must match.
LEFT = re.compile(r"decoder_.*|mask_token|norm\.(weight|bias)")
MADE = re.compile(r"(fc_norm|head|head_dist)\.(weight|bias)|head_norm\.sums|dist_token")
NORM = re.compile(r"norm\.(weight|bias)")  # made too where the state has none: that of a classifier by mean pooling
HEAD_STD = 2e-5  # LiVT's: training starts from equal odds
PROBE_STD = 0.01  # MAE's main_linprobe.py, after MoCo v3: LARS moves weights by a share of their norm


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors: loaded from the pretrained state, left out, newly initialised, resized to another grid."""

    used: tuple[str, ...]
    left: tuple[str, ...]
    made: tuple[str, ...]
    resized: tuple[str, ...] = ()


def build_classifier(
    model: Model,
    *,
    num_classes: int,
    drop_path: float,
    head_std: float = HEAD_STD,
    head_norm: bool = False,
    cosine_scale: float | None = None,
) -> AnyClassifier:
    """The classifier of a recipe's `model`, freshly initialised from torch's global generator.

    head_std: of the head's initial weights, not of a ResNet. head_norm: with a `HeadNorm` before the head, of our own
    ViTs alone. cosine_scale: with a `CosineHead`; None: a linear head. What is trained: `models.parameter_efficient`.
    """
    classifier: AnyClassifier
    if model.is_resnet:
        classifier = ResNetClassifier(model, num_classes=num_classes, drop_path=drop_path)
    elif model.timm is not None:
        classifier = build_timm(model, num_classes=num_classes, drop_path=drop_path, head_std=head_std)
    else:
        kind = DistilledClassifier if model.distillation_token else Classifier
        classifier = kind(model, num_classes=num_classes, drop_path=drop_path, head_std=head_std)
        if head_norm:
            classifier.head_norm = HeadNorm(classifier.num_features)
    if cosine_scale is not None:
        head = head_of(classifier)
        cosine = CosineHead(head.in_features, head.out_features, scale=cosine_scale)
        classifier.set_submodule(head_name(classifier), cosine)
    return classifier


def head_name(classifier: nn.Module) -> str:
    """What timm calls the last linear layer: "head" of a ViT, "fc" of a ResNet, "head.fc" of a ConvNeXt."""
    if isinstance(classifier, TimmClassifier):
        return classifier.facts.head
    return "fc" if isinstance(classifier, ResNetClassifier) else "head"


def head_of(classifier: nn.Module) -> nn.Linear:
    """The last layer. UsageError: it is not one plain linear one, as a method that works on its rows needs."""
    name = head_name(classifier)
    if isinstance(classifier, DistilledClassifier):
        raise UsageError("the model has two heads, of class and distillation token", remedy="choose another model")
    head = classifier.get_submodule(name)
    if not isinstance(head, nn.Linear) or isinstance(head, CosineHead):
        raise UsageError(f"{name} is a {type(head).__name__}, not a linear layer", remedy="choose another model")
    return head


@contextmanager
def head_inputs(classifier: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block the list holds what the head was given in the latest forward pass: float [B, D].

    A hook on the head alone, so it also sees the features of a model that a strategy has wrapped or sharded.
    """
    latest: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = [inputs[0].detach()]

    hook = classifier.get_submodule(head_name(classifier)).register_forward_pre_hook(keep)
    try:
        yield latest
    finally:
        hook.remove()


class Classifier(VisionTransformer):
    """Logits of images."""

    pooling: ClassVar[str] = "avg"
    head_norm: HeadNorm | None

    def __init__(self, model: Model, *, num_classes: int, drop_path: float, head_std: float) -> None:
        super().__init__(
            **vit_args(model),
            num_classes=num_classes,
            global_pool=self.pooling,
            norm_layer=LAYER_NORM,
            weight_init="skip",
        )
        self.image_shape = (model.channels, model.image_px, model.image_px)
        depth = len(self.blocks)
        for k, block in enumerate(self.blocks):
            rate = drop_path * k / max(depth - 1, 1)  # linear over depth, as timm: none in the first block
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        self.drop_path = drop_path
        self.num_branches = model.num_branches  # columns of `drop`
        self.head_norm = None
        reset_encoder(self)
        trunc_normal_(self.head.weight, std=head_std)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Images float `[B, C, H, W]` to logits `[B, num_classes]`. Raises UsageError for images of another size.

        `drop`: uniform numbers in [0, 1) `[B, 2·depth]`, of use in training alone; None: from torch's generator.
        """
        check_images(images, self.image_shape)
        if self.training and self.drop_path > 0:
            drop = coins(images, self.num_branches, given=drop)
            for k, block in enumerate(self.blocks):
                block.drop_path1.draw(drop[:, 2 * k])
                block.drop_path2.draw(drop[:, 2 * k + 1])
        return self.forward_head(self.forward_features(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `[B, tokens, D]` to logits, or to what the head is given."""
        if self.head_norm is None:
            out: Tensor = super().forward_head(x, pre_logits)
            return out
        features = self.head_norm(self.pool(x), self.fc_norm)
        return features if pre_logits else self.head(features)

    @torch.no_grad()
    def fold_head_norm(self) -> None:
        """Put the statistics before the head into `fc_norm`: from now on a plain network with the same logits."""
        if self.head_norm is not None:
            weight, bias = self.head_norm.folded(self.fc_norm)
            self.fc_norm.weight.copy_(weight)
            self.fc_norm.bias.copy_(bias)
            self.head_norm = None


class DistilledClassifier(Classifier, VisionTransformerDistilled):
    """DeiT's layout: class and distillation token, each with a head on it; the logits are the mean of both heads'.

    In training after `set_distilled_training()` both are given out, as a pair: class head, distillation head.
    """

    pooling: ClassVar[str] = "token"

    def __init__(self, model: Model, *, num_classes: int, drop_path: float, head_std: float) -> None:
        super().__init__(model, num_classes=num_classes, drop_path=drop_path, head_std=head_std)
        trunc_normal_(self.dist_token, std=0.02)  # timm's
        trunc_normal_(self.head_dist.weight, std=head_std)


AnyClassifier = Classifier | ResNetClassifier | TimmClassifier


@torch.no_grad()
def load_encoder(classifier: Classifier, mae_state: Mapping[str, Tensor]) -> LoadReport:
    """Copy the encoder of a masked autoencoder into `classifier`, in place, and report what was loaded.

    Strict: only the decoder, the mask token and the encoder's last norm may be left over, only the norm before a head,
    the heads and the distillation token may be missing (they keep their values). Positions of another grid are
    resampled (bicubic, as LiVT for 384 px); a distillation token begins with the class token's position.
    Raises CheckpointMismatch with every name that does not fit, or if no tensor matches.
    """
    own = classifier.state_dict()
    used = [name for name in own if name in mae_state and not MADE.fullmatch(name)]
    made = [name for name in own if MADE.fullmatch(name) or (NORM.fullmatch(name) and name not in mae_state)]
    left = [name for name in mae_state if name not in used]
    if not used:
        raise CheckpointMismatch(
            f"no tensor of the pretrained weights ({len(left)} names) belongs to this classifier",
            remedy=f"they should be named like {next(iter(own))!r}; found for example {next(iter(left), 'nothing')!r}",
        )
    source = {name: mae_state[name] for name in used}
    resized = _resize_positions(source, classifier)
    wrong = [f"{name} is missing" for name in own if name not in mae_state and name not in made]
    wrong += [f"{name} has no place" for name in left if not LEFT.fullmatch(name)]
    wrong += [
        f"{name} is {list(source[name].shape)}, the model's {list(own[name].shape)}"
        for name in used
        if source[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointMismatch(
            f"the pretrained encoder does not fit: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}",
            remedy="use the same model (size, patch, channels) in both stages",
        )
    for name in used:
        own[name].copy_(source[name])
    return LoadReport(tuple(used), tuple(left), tuple(made), resized)


def _resize_positions(source: dict[str, Tensor], classifier: Classifier) -> tuple[str, ...]:
    """Resample `pos_embed` in `source` where only its grid differs, and give each token in front of the patches the
    class token's position; the names that were resampled."""
    given, own = source.get("pos_embed"), classifier.pos_embed
    if given is None or given.ndim != 3 or given.shape[1] == own.shape[1] or given.shape[2] != own.shape[2]:
        return ()
    grid = round((given.shape[1] - 1) ** 0.5)
    if grid**2 != given.shape[1] - 1:
        return ()  # no square: the comparison of shapes will name it
    new = classifier.patch_embed.grid_size[0]
    resampled = given if new == grid else on_grid(given, old=grid, new=new)
    source["pos_embed"] = torch.cat([resampled[:, :1]] * (classifier.num_prefix_tokens - 1) + [resampled], dim=1)
    return ("pos_embed",) if new != grid else ()
