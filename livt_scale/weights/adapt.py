"""Adapts the weights of a ViT to another grid, patch size or number of channels, then loads them strictly.

    positions   bicubic over the grid, the class token's kept: 14 x 14 -> 24 x 24 from 224 to 384 px, as MAE and LiVT
    patches     the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013, eq. 4; timm's `resample_patch_embed`)
    channels    to one: their sum; to n: repeated and cut, times old over new (timm's rule for its input convolutions)

The layer that predicts pixels (`decoder_pred`) fits no other patch size or channels: it is then newly initialised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from livt_scale.config.recipe import Model
from livt_scale.models.classifier import Classifier, load_encoder
from livt_scale.models.layers import on_grid
from livt_scale.models.mae import MaskedAutoencoder
from livt_scale.util.errors import WeightsError

HEAD = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
_OF_CLASSIFIER = re.compile(r"(fc_norm|head)\.(weight|bias)")
_DECODER = re.compile(r"decoder_.*|mask_token")
_NORM = re.compile(r"norm\.(weight|bias)")


@dataclass(frozen=True)
class Taken:
    """Names of tensors: used, left in the file, newly initialised; and the changes to those that were changed."""

    used: tuple[str, ...]
    left: tuple[str, ...]
    made: tuple[str, ...]
    changed: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def adapt(state: Mapping[str, Tensor], to: Model) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(`state` on the grid, patches and channels of `to`; what was changed, and how). Widths are not touched."""
    made, changed = dict(state), {}
    patch_px = to.dims.patch_px
    projection = state["patch_embed.proj.weight"]  # [D, C, p, p]
    channels, old_px = projection.shape[1], projection.shape[2]
    if channels != to.channels:
        projection = with_channels(projection, to.channels)
        changed["patch_embed.proj.weight"] = f"channels {channels} -> {to.channels}"
    if old_px != patch_px:
        projection = resample_patch_embed(projection, [patch_px, patch_px])
        said = changed.get("patch_embed.proj.weight")
        changed["patch_embed.proj.weight"] = f"{said}, " * bool(said) + f"patch {old_px} -> {patch_px} px"
    made["patch_embed.proj.weight"] = projection
    if changed:
        for name in [n for n in made if n.startswith("decoder_pred.")]:
            del made[name]
    grid = to.image_px // patch_px
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in made and (old := round((made[name].shape[1] - 1) ** 0.5)) != grid:
            made[name] = on_grid(made[name], old=old, new=grid)
            changed[name] = f"grid {old} x {old} -> {grid} x {grid}, bicubic"
    return made, changed


def start_classifier(classifier: Classifier, state: Mapping[str, Tensor], to: Model, *, keep_head: bool) -> Taken:
    """Put the encoder of `state` into `classifier`, in place; with `keep_head` its pooled norm and head too.

    Raises WeightsError (no head of mean pooling, or of other classes), CheckpointMismatch as `load_encoder`.
    """
    if keep_head:
        check_head(state, num_classes=classifier.num_classes)
    fitted, changed = adapt(state, to)
    encoder = {name: tensor for name, tensor in fitted.items() if not _OF_CLASSIFIER.fullmatch(name)}
    report = load_encoder(classifier, encoder)
    own = classifier.state_dict()
    kept = HEAD if keep_head else ()
    for name in kept:
        own[name].copy_(fitted[name])
    used = (*report.used, *kept)
    left = tuple(name for name in state if name not in used)
    return Taken(used, left, tuple(n for n in report.made if n not in kept), _only(changed, used))


def check_head(state: Mapping[str, Tensor], *, num_classes: int) -> None:
    """Raise WeightsError unless `state` has a head over the mean of the patches, for `num_classes` classes."""
    missing = [name for name in HEAD if name not in state]
    if missing:
        raise WeightsError(
            f"the head cannot be kept: {', '.join(missing)} is missing",
            remedy="set keep_head: false; a head that reads the class token is of no use to mean pooling",
        )
    if (theirs := state["head.weight"].shape[0]) != num_classes:
        raise WeightsError(
            f"the head cannot be kept: it is of {theirs} classes, the data have {num_classes}",
            remedy="set keep_head: false",
        )


@torch.no_grad()
def start_mae(mae: MaskedAutoencoder, state: Mapping[str, Tensor], to: Model) -> Taken:
    """Load `state` into `mae`, in place. A missing decoder is newly initialised, all of it.

    Raises WeightsError with the names that do not fit.
    """
    fitted, changed = adapt(state, to)
    own = mae.state_dict()
    report = compare({name: tensor.shape for name, tensor in own.items()}, fitted)
    for name in report.used:
        own[name].copy_(fitted[name])
    left = tuple(name for name in state if name not in report.used)
    return Taken(report.used, left, report.made, _only(changed, report.used))


def compare(own: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> Taken:
    """What a network of the shapes `own` takes from `state`. Raises WeightsError if a part is missing or differs.

    May be missing: a classifier's head, the entire decoder, the decoder's prediction, the encoder's last norm.
    """
    has_decoder = "mask_token" in state
    used = tuple(name for name in own if name in state)
    made = tuple(name for name in own if name not in state)
    left = tuple(name for name in state if name not in own)
    wrong = [f"{name} is missing" for name in made if not _may_be_made(name, has_decoder)]
    wrong += [f"{n} has no place" for n in left if not any(r.fullmatch(n) for r in (_OF_CLASSIFIER, _DECODER, _NORM))]
    wrong += [
        f"{name} is {list(state[name].shape)}, the model's {list(own[name])}"
        for name in used
        if state[name].shape != own[name]
    ]
    if wrong:
        raise WeightsError(
            f"the weights do not fit the model: {'; '.join(wrong[:6])}{' …' if len(wrong) > 6 else ''}",
            remedy="take the model (size, depth, decoder) that they are of",
        )
    return Taken(used, left, made)


def _may_be_made(name: str, has_decoder: bool) -> bool:
    if _DECODER.fullmatch(name):
        return not has_decoder or name.startswith("decoder_pred.")
    return bool(_OF_CLASSIFIER.fullmatch(name) or _NORM.fullmatch(name))


def with_channels(projection: Tensor, channels: int) -> Tensor:
    """The weights `[D, C, p, p]` of a first convolution for other channels: see above."""
    given = projection.shape[1]
    if channels == 1:
        return projection.sum(dim=1, keepdim=True)
    repeated = projection.repeat(1, -(-channels // given), 1, 1)[:, :channels]
    return repeated * (given / channels)


def _only(changed: dict[str, str], used: tuple[str, ...]) -> dict[str, str]:
    return {name: how for name, how in changed.items() if name in used}
