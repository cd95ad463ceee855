"""timm's ResNet, trained from scratch on labels alone: the baseline for a ViT on long-tailed data.

    image_px > 64   7x7 convolution of stride 2, then max pooling (the paper's, for ImageNet); the grid is px / 32
    image_px <= 64  3x3 convolution of stride 1 and no pooling, as is usual for CIFAR; the grid is px / 8

timm has no option for the second: its first convolution and its pooling are replaced, and keep their names. It also has
none for a first stage that is not 64 wide (resnet_micro's): the norm and the block after the stem are replaced too.
Initialisation is timm's: the last norm of each residual branch begins at 0. Stochastic depth is the caller's, as in
`models.classifier`: `drop[b, k]` decides block k for image b.

In training, batch norm looks at one rank's micro-batch. So what is learnt depends on its size, and with it on the
number of ranks. The running statistics are kept alike on all ranks by `distributed.batchnorm`.

Source: ResNet, arXiv 1512.03385 (section 4.2 for CIFAR); the last norm at 0, arXiv 1706.02677, section 5.1.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from livt_scale.config.model import USUAL_FIRST_WIDTH
from livt_scale.config.recipe import Model
from livt_scale.models.layers import DropPath, check_images, coins


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, whose weights may lie in a lower precision than its statistics (a sharded strategy gathers them so)."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        kind = self.running_mean.dtype
        weight, bias = self.weight.to(kind), self.bias.to(kind)  # no copy where they agree
        momentum = self.momentum or 0.0
        return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, self.training, momentum, self.eps)


class ResNetClassifier(ResNet):
    """Logits of images."""

    def __init__(self, model: Model, *, num_classes: int, drop_path: float) -> None:
        block, layers = (Bottleneck if model.has_bottlenecks else BasicBlock), model.stage_blocks
        super().__init__(
            block, layers, num_classes=num_classes, in_chans=model.channels, channels=model.stage_widths,
            norm_layer=BatchNorm2d, zero_init_last=True,
        )  # fmt: skip
        if model.has_small_stem:
            use_small_stem(self, model.stage_widths[0])
        blocks = residual_blocks(self)
        for k, one in enumerate(blocks):
            one.drop_path = DropPath(drop_path * k / max(len(blocks) - 1, 1))  # linear over depth, as timm
        self.drop_path = drop_path
        self.num_branches = model.num_branches  # columns of `drop`

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Images float `[B, C, H, W]` to logits `[B, num_classes]`. Raises UsageError for images of other channels.

        `drop`: uniform numbers in [0, 1) `[B, blocks]`, of use in training alone; None: from torch's generator.
        """
        check_images(images, (self.in_chans, None, None))
        if self.training and self.drop_path > 0:
            drop = coins(images, self.num_branches, given=drop)
            for k, one in enumerate(residual_blocks(self)):
                one.drop_path.draw(drop[:, k])
        logits: Tensor = self.forward_head(self.forward_features(images))
        return logits


def residual_blocks(network: nn.Module) -> list[Any]:
    """In the order in which they are called."""
    return [module for module in network.modules() if isinstance(module, BasicBlock | Bottleneck)]


def use_small_stem(network: ResNet, width: int) -> None:
    """Give `network`, timm's plain ResNet, the stem for images up to 64 px, in place and newly initialised.

    width: channels of the first stage and of the stem. timm's stem has 64; another width is for BasicBlocks alone.
    """
    network.conv1 = nn.Conv2d(network.in_chans, width, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    if width != USUAL_FIRST_WIDTH:
        norm = type(network.bn1)
        network.bn1 = norm(width)
        network.layer1[0] = BasicBlock(width, width, norm_layer=norm)  # timm's has a shortcut for 64 channels
    network.init_weights()
