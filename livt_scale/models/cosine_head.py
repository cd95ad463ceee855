"""A cosine classifier: logits that depend on the direction of features and class weights, not on their norms.

    features f [B, D], weights w [C, D]:    logit[b, c] = scale · (f_b · w_c) / (‖f_b‖ ‖w_c‖)

A linear head gives frequent classes rows with larger norms; here every row counts alike. No bias. The rows begin with
norm 1 and random directions, since the gradient of a direction grows as its row gets shorter.

A plain linear layer cannot give the same logits: the features of each image are divided by their own norm.

Source: cosine classifiers, arXiv 1804.09458; scale 25 and no bias as in LIFT, arXiv 2309.10019.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Linear):
    """In place of a classifier's last linear layer; its state is `weight` [C, D] alone."""

    def __init__(self, num_features: int, num_classes: int, *, scale: float) -> None:
        super().__init__(num_features, num_classes, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.randn_like(self.weight), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Features float [B, D] to logits [B, C]."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
