"""From a recipe's `model` to the numbers of its networks and the arguments of timm's VisionTransformer.

The sizes themselves (ViT-Ti to ViT-H, and vit_micro for 28 to 32 px) stand in `livt_scale.recipe.MODEL_SIZES`; here
they become what a constructor takes. The same arguments make the classifier, and can be written beside an exported
model, so that timm builds the same network again.

    >>> vit_args(Model(size="vit_micro", image_px=28, channels=1))["embed_dim"]
    96

Sources: ViT arXiv 2010.11929 table 1 (B, L, H), DeiT arXiv 2012.12877 table 1 (Ti, S).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from livt_scale.recipe import Model

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
