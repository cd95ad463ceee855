"""Changes to a network block by block, under every strategy: activation checkpointing and torch.compile.

The blocks are changed in place, without a wrapper, so no name changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of encoder and decoder, or a ResNet's residual ones, in the order of their calls."""
    return (module for module in model.modules() if isinstance(module, Block | BasicBlock | Bottleneck))


def prepare_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """`recompute`: keep a block's input alone and run its forward again in the backward pass (activation
    checkpointing). `compiled`: torch.compile each block; alike blocks are compiled once."""
    for block in blocks_of(model):
        if recompute:
            # No random state to keep: stochastic depth takes its numbers from the batch.
            block.forward = partial(_recomputed, block.forward)
        if compiled:
            block.compile()


def _recomputed(forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
