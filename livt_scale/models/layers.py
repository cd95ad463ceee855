"""Pieces that the models share: dimensions by name, sine-cosine positions, drop path keyed by sample."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from livt_scale.config.recipe import Model
from livt_scale.util.errors import UsageError

MLP_RATIO = 4.0  # hidden width of a block's MLP over the block's width, in every ViT of the sources


class LayerNorm(nn.LayerNorm):
    """torch's, whose weights may lie in a lower precision than its input (a sharded strategy gathers them so).

    The input keeps its precision: the residual stream of a bf16 run is fp32, as autocast has it.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)  # no copy where they agree
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


LAYER_NORM = partial(LayerNorm, eps=1e-6)  # eps of the MAE and LiVT code; torch's default is 1e-5


def vit_args(model: Model) -> dict[str, Any]:
    """Plain keyword arguments (JSON types) of timm's VisionTransformer for this encoder, without head and pooling."""
    width, depth, heads, patch_px = model.dims
    return {
        "img_size": model.image_px,
        "patch_size": patch_px,
        "in_chans": model.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": MLP_RATIO,
        "qkv_bias": True,
    }


def sincos_positions(width: int, grid: int) -> torch.Tensor:
    """Positions of a class token and `grid` x `grid` patches, row by row: float32 `[1, 1 + grid², width]`.

    `width` is a multiple of 4: sine and cosine of column and row. Computed in float64.
    """
    assert width % 4 == 0, width
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))  # [width / 4]
    rows, columns = np.divmod(np.arange(grid * grid), grid)  # [grid²] each
    table = np.zeros((1 + grid * grid, width))
    halves = []
    for coordinate in (columns, rows):
        angle = np.multiply.outer(coordinate, frequency)  # [grid², width / 4]
        halves += [np.sin(angle), np.cos(angle)]
    table[1:] = np.concatenate(halves, axis=1)
    return torch.from_numpy(table).float().unsqueeze(0)


def on_grid(positions: torch.Tensor, *, old: int, new: int) -> torch.Tensor:
    """`positions` `[1, 1 + old², width]` resampled to `[1, 1 + new², width]`, the class token's kept.

    Bicubic without antialiasing, as MAE's and LiVT's codes go from 224 to 384 px.
    """
    return resample_abs_pos_embed(positions, [new, new], [old, old], num_prefix_tokens=1, antialias=False)


def check_images(images: Tensor, shape: tuple[int, int | None, int | None]) -> None:
    """Raise UsageError unless `images` are `[B, C, H, W]` of this (C, H, W); None: any."""
    fits = images.ndim == 4 and all(n in (None, m) for n, m in zip(shape, images.shape[1:], strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise UsageError(
            f"images are {list(images.shape)}, and the model takes [B, {wanted}]",
            remedy="build model and loader for the same image_px and channels",
        )


def coins(images: Tensor, branches: int, *, given: Tensor | None) -> Tensor:
    """Uniform numbers in [0, 1) `[B, branches]` for stochastic depth: those given, or of torch's global generator.

    Raises UsageError where those given have another shape.
    """
    if given is None:
        return torch.rand(len(images), branches, device=images.device)
    if given.shape != (len(images), branches):
        raise UsageError(f"drop is {list(given.shape)}", remedy=f"give [{len(images)}, {branches}], or None")
    return given


class DropPath(nn.Module):
    """Stochastic depth of one residual branch: a sample's branch is 0, or scaled by 1 / keep. Identity in evaluation.

    `draw` is called before each forward pass in training. What it drew stays until the next, for activation
    checkpointing runs the branch a second time during the backward pass. The rate is not used in `forward`: a compiled
    block is compiled for the numbers in it, and the blocks of a network differ in this one alone.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.scale: Tensor | None = None  # [B]

    def draw(self, uniforms: Tensor) -> None:
        """Decide by `uniforms` `[B]`, in [0, 1), which samples have the branch."""
        keep = 1 - self.rate
        self.scale = (uniforms < keep).to(uniforms.dtype) / keep

    def forward(self, branch: Tensor) -> Tensor:  # [B, tokens, D] or [B, C, H, W]
        if not self.training or self.scale is None:
            return branch
        assert len(self.scale) == len(branch), (self.scale.shape, branch.shape)
        return branch * self.scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
