"""The weights of both stages' networks by name and shape, from the recipe alone: no network is built, no torch.
A model of timm is built on the meta device, without memory.

    ViT-H/14, 1000 classes: classifier 632 M weights in 32 blocks of 19.7 M; MAE 657 M, 26 M of them the decoder's

The names are those of `models.mae` and `models.classifier`; a test compares both lists with the networks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from livt_scale.config import timm_models
from livt_scale.config.model import MLP_RATIO
from livt_scale.config.recipe import Finetune, Model, Recipe, Stage
from livt_scale.config.tuning import Tuning, tuned


@dataclass(frozen=True)
class Weight:
    """`block`: which transformer block it belongs to, "blocks.0"; None outside of them. `trained`: has a gradient.

    `moments`: tensors of its size that the optimizer keeps of a trained one: AdamW's two, LARS's one. `leads_back`: it
    is frozen, and gradients of other parameters pass through its layer.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    block: str | None = None
    moments: int = 2
    leads_back: bool = False

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows_numel(self, ranks: int) -> int:
        """Elements of the first rank's rows, by torch's `fully_shard`: the fullest rank's, with what pads them."""
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:])

    def num_pieces(self, ranks: int) -> int:
        """How many ranks have rows of it."""
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / math.ceil(self.shape[0] / ranks))


def weights_of(model: Model, stage: Stage, *, num_classes: int) -> tuple[Weight, ...]:
    """All weights of the stage's network, fixed positions included, each trained by AdamW."""
    return tuple(_mae(model) if stage == "pretrain" else _classifier(model, num_classes))


def stage_weights(recipe: Recipe, stage: Stage, *, num_classes: int) -> tuple[Weight, ...]:
    """`weights_of`, with what `stages.finetune.train` adds and without gradients of what it freezes.

    Each optimizer has its moments.
    """
    part = recipe.stage(stage)
    weights = weights_of(recipe.model, stage, num_classes=num_classes)
    head = recipe.model.timm_facts.head if recipe.model.timm else "fc" if recipe.model.is_resnet else "head"
    if isinstance(part, Finetune) and part.head == "cosine":
        weights = tuple(w for w in weights if w.name != f"{head}.bias")
    weights = tuple(replace(w, moments=part.trained_by.moments) for w in weights)
    if part.tuning.freezes:
        return tuple(_tuned(weights, part.tuning, head=head))
    return weights


def _tuned(weights: tuple[Weight, ...], tuning: Tuning, *, head: str) -> Iterator[Weight]:
    """`weights` after `tuning`; a weight that is not trained anyway stays as it is."""
    plain = {w.name: w for w in weights}
    yield from (w for w in weights if not w.trained)
    shapes = {w.name: w.shape for w in weights if w.trained}
    blocks = {w.block for w in weights if w.block is not None}
    for name, shape, trained, before in tuned(tuning, shapes, head=head):
        if before is not None:
            old = plain[before]
            back = not trained and not tuning.head_alone and old.block is not None
            yield replace(old, name=name, trained=trained, leads_back=back)
        else:
            block = next((b for b in blocks if name.startswith(f"{b}.")), None)
            yield Weight(name, shape, block=block, moments=weights[0].moments)


def _mae(model: Model) -> Iterator[Weight]:
    width, depth, _, patch_px = model.dims
    decoder, tokens = model.decoder, 1 + model.num_patches
    yield from _embedding(model, prefix=("cls_token",), fixed_positions=True)
    for k in range(depth):
        yield from _block(f"blocks.{k}", width)
    yield from _norm("norm", width)
    yield from _linear("decoder_embed", width, decoder.width)
    yield Weight("mask_token", (1, 1, decoder.width))
    yield Weight("decoder_pos_embed", (1, tokens, decoder.width), trained=False)
    for k in range(decoder.depth):
        yield from _block(f"decoder_blocks.{k}", decoder.width)
    yield from _norm("decoder_norm", decoder.width)
    yield from _linear("decoder_pred", decoder.width, patch_px**2 * model.channels)


def _classifier(model: Model, num_classes: int) -> Iterator[Weight]:
    if model.is_resnet:
        yield from _resnet(model, num_classes)
        return
    if model.timm is not None:
        yield from _of_timm(model, num_classes)
        return
    width, depth, _, _ = model.dims
    distilled = model.distillation_token
    yield from _embedding(
        model, prefix=("cls_token", "dist_token") if distilled else ("cls_token",), fixed_positions=False
    )
    for k in range(depth):
        yield from _block(f"blocks.{k}", width)
    yield from _norm("norm" if distilled else "fc_norm", width)
    for head in ("head", "head_dist") if distilled else ("head",):
        yield from _linear(head, width, num_classes)


def _of_timm(model: Model, num_classes: int) -> Iterator[Weight]:
    """Counted on torch's meta device; what has no part in the logits is not trained."""
    unused = model.timm_facts.unused
    for name, shape, block in timm_models.weights_of(model.timm_spec, num_classes=num_classes)[0]:
        yield Weight(name, shape, trained=name not in unused, block=block)


def _resnet(model: Model, num_classes: int) -> Iterator[Weight]:
    """Weights alone: batch norm's running statistics are not trained, and are not counted."""
    inner = model.stage_widths[0]
    yield from _convolution("conv1", "bn1", 3 if model.has_small_stem else 7, model.channels, inner)
    for stage, (blocks, planes) in enumerate(zip(model.stage_blocks, model.stage_widths, strict=True)):
        outer = 4 * planes if model.has_bottlenecks else planes
        for k in range(blocks):
            name = f"layer{stage + 1}.{k}"
            kernels = (1, 3, 1) if model.has_bottlenecks else (3, 3)
            widths = (inner, *[planes] * (len(kernels) - 1), outer)
            for n, kernel in enumerate(kernels):
                conv, norm = f"{name}.conv{n + 1}", f"{name}.bn{n + 1}"
                yield from _convolution(conv, norm, kernel, widths[n], widths[n + 1], name)
            if inner != outer:
                yield from _convolution(f"{name}.downsample.0", f"{name}.downsample.1", 1, inner, outer, name)
            inner = outer
    yield from _linear("fc", inner, num_classes)


def _convolution(
    name: str, norm: str, kernel: int, inner: int, outer: int, block: str | None = None
) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (outer, inner, kernel, kernel), block=block)
    yield from _norm(norm, outer, block)


def _embedding(model: Model, *, prefix: Sequence[str], fixed_positions: bool) -> Iterator[Weight]:
    """prefix: the tokens before the patches."""
    width, _, _, patch_px = model.dims
    for token in prefix:
        yield Weight(token, (1, 1, width))
    yield Weight("pos_embed", (1, len(prefix) + model.num_patches, width), trained=not fixed_positions)
    yield Weight("patch_embed.proj.weight", (width, model.channels, patch_px, patch_px))
    yield Weight("patch_embed.proj.bias", (width,))


def _block(name: str, width: int) -> Iterator[Weight]:
    yield from _norm(f"{name}.norm1", width, name)
    yield from _linear(f"{name}.attn.qkv", width, 3 * width, name)
    yield from _linear(f"{name}.attn.proj", width, width, name)
    yield from _norm(f"{name}.norm2", width, name)
    yield from _linear(f"{name}.mlp.fc1", width, MLP_RATIO * width, name)
    yield from _linear(f"{name}.mlp.fc2", MLP_RATIO * width, width, name)


def _linear(name: str, inner: int, outer: int, block: str | None = None) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (outer, inner), block=block)
    yield Weight(f"{name}.bias", (outer,), block=block)


def _norm(name: str, width: int, block: str | None = None) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,), block=block)
    yield Weight(f"{name}.bias", (width,), block=block)
