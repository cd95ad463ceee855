"""Stochastic depth whose coin is thrown by the caller, so that a run's coins belong to its samples and not to a rank.

Source: arXiv 1603.09382.
"""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth of one residual branch: a sample's branch is 0, or scaled by 1 / keep. Identity in evaluation.

    `uniforms` `[B]` is set before each forward pass and stays until the next, for activation checkpointing runs the
    branch a second time during the backward pass.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniforms: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:  # [B, tokens, D] or [B, C, H, W]
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        assert self.uniforms is not None, "stochastic depth in training needs `drop`"
        assert len(self.uniforms) == len(branch), (self.uniforms.shape, branch.shape)
        scale = (self.uniforms < keep).to(branch.dtype) / keep
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
