"""AdamW as the MAE and LiVT codes use it: which weights decay, layer-wise rates, and the schedule as a pure function.
LARS as MAE's linear probe uses it: timm's.

The rate of a step follows from its number alone, so a continued run needs no scheduler state. With 10 steps an epoch,
1 warm-up epoch and a peak of 1: step 0 has rate 0, step 5 has 0.5, step 10 has 1, and half a cosine leads down to
`min_lr` at the last epoch's end. Layer decay d gives a ViT of 12 blocks d^13 at the patches, d^12 in block 0, …, d in
block 11, 1 at the head: what was pretrained longest moves least.

Source: MAE, arXiv 2111.06377, tables 8 to 10; layer-wise decay, BEiT, arXiv 2106.08254; LARS, arXiv 1708.03888.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from livt_scale.config.stages import StagePart

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of `param_groups`

BLOCK = re.compile(r"blocks\.(\d+)\.")
TOKENS_AND_POSITIONS = ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed")


def param_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None, depth: int, tokens_decay: bool = False
) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with `params`, `weight_decay`, `lr_scale` and `name`, in a fixed order.

    `always_adapt` is LARS's: what decays is also scaled by the norms, biases and norms never are, as in MAE's code.
    Every trainable parameter is in exactly one. Biases and norms (all of one dim) do not decay; tokens and positions do
    where `tokens_decay` says so: in the public codes they do in pretraining and do not in fine-tuning.
    `layer_decay` None: one rate for all, as in pretraining; else by `layer_of` over `depth` blocks.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and (tokens_decay or name not in TOKENS_AND_POSITIONS)
        layer = depth + 1 if layer_decay is None else layer_of(name, depth=depth)
        scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer)
        kind = "decay" if decays else "no_decay"
        group = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale,
            "always_adapt": decays,
            "name": kind if layer_decay is None else f"layer_{layer:02d}_{kind}",
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    assert layer_decay is None or len({layer for layer, _ in groups}) == depth + 2, "names of a wrapped model?"
    return [groups[key] for key in sorted(groups)]


def layer_of(name: str, *, depth: int) -> int:
    """Layer of a ViT's parameter: patches, tokens, positions 0; block k has k + 1; the rest, depth + 1."""
    if name in TOKENS_AND_POSITIONS or name.startswith("patch_embed."):
        return 0
    if block := BLOCK.match(name):
        return int(block[1]) + 1
    return depth + 1


def lr_at(
    step: int, *, steps_per_epoch: int, epochs: float, warmup_epochs: float, peak_lr: float, min_lr: float
) -> float:
    """The learning rate of step `step` (from 0): linear warm-up from 0, then half a cosine, on fractional epochs."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak_lr * epoch / warmup_epochs
    if epoch >= epochs:  # past the end, or a warm-up that fills the run
        return min_lr if epochs > warmup_epochs else peak_lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_adamw(
    groups: Iterable[dict[str, Any]],
    *,
    betas: tuple[float, float],
    implementation: Literal["fused", "foreach"] = "fused",
) -> torch.optim.AdamW:
    """AdamW over `param_groups`. Its rate is 0 until `set_lr` is called, which every step does."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, **{implementation: True})


def make_lars(groups: Iterable[dict[str, Any]], *, momentum: float) -> torch.optim.Optimizer:
    """LARS over `param_groups`: w <- w - lr · m with m <- momentum · m + q · gradient, q = 0.001 · |w| / |gradient|.

    Its rate is 0 until `set_lr` is called. The momentum is there from the start, as zeros, so that a checkpoint of any
    step has it.
    """
    from timm.optim import Lars  # brings all of timm's optimizers along, which few runs need

    optimizer = Lars(list(groups), lr=0.0, momentum=momentum)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_maker(part: StagePart) -> MakeOptimizer | None:
    """What builds the optimizer of a stage; None: AdamW with its `betas`, which each strategy builds itself."""
    if part.trained_by.name == "adamw":
        return None
    if part.lars_momentum is not None:
        return partial(make_lars, momentum=part.lars_momentum)
    return part.trained_by.build


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
