"""A linear probe's BatchNorm without weights, whose statistics do not depend on the number of ranks.

    features of the head      y = LayerNorm(mean of the patch tokens)          `fc_norm`, frozen
    what the head is given    (y − mean) / √(variance + 1e-6)                   each feature by itself

MAE's linear probe takes mean and variance of the images that one GPU holds, so that its result depends on how many
GPUs there are. Here they are of all images of the steps before, over all ranks: the backbone is frozen, so every batch
draws its features from one distribution, and the average over all of them is the best estimate of what a batch
guesses. It is what BatchNorm's running statistics are after training, so that training and evaluation compute the same.
The first step has no step before it, and goes without.

Two affine maps in a row are one: the result is `fc_norm` with other weights. Both modes compute with those, and `fold`
leaves nothing else, so that timm's plain network gives the same logits, bit for bit.

Why not torch's SyncBatchNorm: it sees the micro-batches of one moment, which depend on the number of ranks.

Source: MAE, arXiv 2111.06377, A.1 (linear probing), and its public main_linprobe.py: eps 1e-6, no weights.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class HeadNorm(nn.Module):
    """Accumulates statistics of features in training and normalises by those of the earlier steps.

    `sums` float64 [3, D], part of the state: how many images, Σ y, Σ y². `settle` adds those of a step to it.
    """

    sums: Tensor
    of_step: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, width, dtype=torch.float64))
        self.register_buffer("of_step", torch.zeros(3, width, dtype=torch.float64), persistent=False)

    def forward(self, pooled: Tensor, norm: nn.LayerNorm) -> Tensor:
        """What the head is given, float32 [B, D], of the mean tokens `pooled` [B, D]."""
        if self.training:
            self._count(norm(pooled))
        weight, bias = self.folded(norm)
        return F.layer_norm(pooled, norm.normalized_shape, weight.to(pooled.dtype), bias.to(pooled.dtype), norm.eps)

    @torch.no_grad()
    def folded(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Weight and bias float32 [D] of the LayerNorm that does what `norm` and this do, one after the other."""
        images, total, squares = self.sums
        mean = total / images.clamp(min=1)
        variance = torch.where(images > 0, (squares / images.clamp(min=1) - mean.square()).clamp(min=0), 1 - EPS)
        scale = (variance + EPS).rsqrt()  # before the first step: 1, and the mean 0
        return (norm.weight * scale).float(), ((norm.bias - mean) * scale).float()

    @torch.no_grad()
    def settle(self, *, keep: bool) -> None:
        """A step has ended: add what all ranks have counted in it, or forget it. A collective call."""
        if keep:
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self.of_step)
            self.sums += self.of_step
        self.of_step.zero_()

    @torch.no_grad()
    def _count(self, features: Tensor) -> None:
        values = features.double()
        self.of_step += torch.stack([torch.ones_like(values).sum(0), values.sum(0), values.square().sum(0)])


def of(model: nn.Module) -> HeadNorm | None:
    """The one that `model` has, or None."""
    norm = getattr(model, "head_norm", None)
    return norm if isinstance(norm, HeadNorm) else None


def settle(model: nn.Module, *, keep: bool) -> None:
    """`HeadNorm.settle` of `model`, where it has one. A collective call."""
    norm = of(model)
    if norm is not None:
        norm.settle(keep=keep)
