"""Floating-point operations of a training step, by formula: what MFU divides by the device's peak.

Matrix products alone are counted, 2·m·n·k each; norms, softmax and the optimizer are a few per cent beside them. They
are counted as this code computes them (`plan.shapes`). The backward pass is two products for each one forward, but one
for the patch embedding, whose input needs no gradient.

    ViT-B/16 at 224 px: classifier 35 GFLOP forward, 105 a training step an image; MAE with 75 % masked 19 and 57

`train` is what MFU means by model FLOPs (forward and backward, arXiv 2204.02311, appendix B); `hardware` adds what
activation checkpointing computes again: each block but its last product, whose output nothing needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from livt_scale.config import timm_models
from livt_scale.config.recipe import Model, Pretrain, Recipe, Stage
from livt_scale.config.tuning import Tuning
from livt_scale.plan.shapes import Network, classifier, mae


@dataclass(frozen=True)
class Flops:
    """Of one image."""

    forward: int
    backward: int
    recomputed: int  # by activation checkpointing, where it is on

    @property
    def train(self) -> int:
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        return self.train + self.recomputed


def stage_flops(recipe: Recipe, stage: Stage, *, num_classes: int) -> Flops:
    """Of one training image in `stage`; `recomputed` is 0 unless the recipe recomputes."""
    flops = network_flops(recipe, stage, num_classes=num_classes)
    return flops if recipe.parallel.activation_checkpointing else Flops(flops.forward, flops.backward, 0)


def network_flops(recipe: Recipe, stage: Stage, *, num_classes: int) -> Flops:
    """Of one training image in `stage`, with what activation checkpointing would compute again."""
    part, model = recipe.stage(stage), recipe.at(stage).model
    if isinstance(part, Pretrain):
        return mae_flops(model, mask_ratio=part.mask_ratio)
    flops = classifier_flops(model, num_classes=num_classes, tuning=part.tuning)
    if part.backbone_frozen:  # the gradient of the head's weights is all that goes back
        return Flops(flops.forward, _product(1, _head_width(model, num_classes), num_classes), 0)
    return flops


def mae_flops(model: Model, *, mask_ratio: float) -> Flops:
    return _of(mae(model, mask_ratio=mask_ratio))


def classifier_flops(model: Model, *, num_classes: int, tuning: Tuning | None = None) -> Flops:
    if model.is_resnet:
        return _resnet_flops(model, num_classes=num_classes)
    if model.timm is not None:
        forward, backward = timm_models.weights_of(model.timm_spec, num_classes=num_classes)[1]
        return Flops(forward, backward, recomputed=0)
    return _of(classifier(model, num_classes=num_classes, tuning=tuning))


def _head_width(model: Model, num_classes: int) -> int:
    if model.timm is None:
        return model.dims.width
    head = f"{model.timm_facts.head}.weight"
    weights = timm_models.weights_of(model.timm_spec, num_classes=num_classes)[0]
    return next(weight.shape[1] for weight in weights if weight.name == head)


def _of(network: Network) -> Flops:
    return Flops(network.forward_flops, network.backward_flops, network.recomputed_flops)


def _resnet_flops(model: Model, *, num_classes: int) -> Flops:
    """Convolutions and head; a block's first is strided in a BasicBlock, its second in a bottleneck, as timm's."""
    px = model.image_px if model.has_small_stem else -(-model.image_px // 2)
    inner = model.stage_widths[0]
    stem = _convolution(px, 3 if model.has_small_stem else 7, model.channels, inner)
    px = px if model.has_small_stem else -(-px // 2)  # max pooling
    rest = 0
    for stage, (blocks, planes) in enumerate(zip(model.stage_blocks, model.stage_widths, strict=True)):
        outer = 4 * planes if model.has_bottlenecks else planes
        for block in range(blocks):
            before, px = px, -(-px // 2) if stage and not block else px
            if model.has_bottlenecks:
                rest += _convolution(before, 1, inner, planes)
                rest += _convolution(px, 3, planes, planes) + _convolution(px, 1, planes, outer)
            else:
                rest += _convolution(px, 3, inner, planes) + _convolution(px, 3, planes, planes)
            if before != px or inner != outer:
                rest += _convolution(px, 1, inner, outer)
            inner = outer
    rest += _product(1, inner, num_classes)
    return Flops(forward=stem + rest, backward=stem + 2 * rest, recomputed=0)


def _convolution(px: int, kernel: int, inner: int, outer: int) -> int:
    return _product(px**2, kernel**2 * inner, outer)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns
