"""Changes to a network block by block, under every strategy: activation checkpointing and torch.compile.

The blocks are changed in place, without a wrapper, so no name changes.

Alike blocks share one graph for each shape, mode (training, evaluation) and precision. Shapes are fixed, so batches of
one size are compiled once; an evaluation fills up its last batch (`evaluation/evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from livt_scale.models.timm_backbone import TimmClassifier

BACKEND = "inductor"
MAX_GRAPHS = 64  # of one kind of block; torch's limit is 8, after which a block runs uncompiled


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks in the order of their calls: transformer blocks of encoder and decoder, a ResNet's residual ones, of
    another model of timm those that it names."""
    if isinstance(model, TimmClassifier):
        return (model.get_submodule(name) for name in model.facts.blocks)
    return (module for module in model.modules() if isinstance(module, Block | BasicBlock | Bottleneck))


def prepare_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """`recompute`: keep a block's input alone and run its forward again in the backward pass (activation
    checkpointing). `compiled`: torch.compile each block; alike blocks are compiled once."""
    if compiled:
        torch._dynamo.reset()  # what an earlier stage has compiled
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for block in blocks_of(model):
        if recompute:
            # Stochastic depth takes its numbers from the batch; what else draws, must draw the same again.
            draws = isinstance(model, TimmClassifier) and model.facts.draws
            block.forward = partial(_recomputed, block.forward, draws)
        if compiled:
            block.compile(backend=BACKEND, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    """Whether `prepare_blocks` has compiled its blocks."""
    return any(block._compiled_call_impl is not None for block in blocks_of(model))


def _recomputed(forward: Any, draws: bool, *inputs: Any, **named: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws, **named)
