"""AdamW as the MAE and LiVT codes use it: which weights decay, layer-wise rates, and the schedule as a pure function.
LARS as MAE's linear probe uses it: timm's.

The rate of a step follows from its number alone, so a continued run needs no scheduler state. With 10 steps an epoch,
1 warm-up epoch and a peak of 1: step 0 has rate 0, step 5 has 0.5, step 10 has 1, and half a cosine leads down to
`min_lr` at the last epoch's end. Layer decay d gives a ViT of 12 blocks d^13 at the patches, d^12 in block 0, …, d in
block 11, 1 at the head: what was pretrained longest moves least.

    groups = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    optimizer = torch.optim.AdamW(groups)
    set_lr(optimizer, lr_at(step, steps_per_epoch=38, epochs=30, warmup_epochs=3, peak_lr=1e-3, min_lr=0.0))

Source: MAE, arXiv 2111.06377, tables 8 to 10; layer-wise decay, BEiT, arXiv 2106.08254; LARS, arXiv 1708.03888.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from livt_scale.config.optimizers import Sgd
from livt_scale.config.stages import StagePart
from livt_scale.util.errors import UsageError

__all__ = ["lr_at", "make_adamw", "make_lars", "make_sgd", "optimizer_maker", "param_groups", "set_lr"]

Momentum = TypeVar("Momentum", bound=torch.optim.Optimizer)
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of `param_groups`

BLOCK = re.compile(r"blocks\.(\d+)\.")
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's
TOKENS_AND_POSITIONS = ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed")


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    tokens_decay: bool = False,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch, each with `params`, `lr` > 0, `weight_decay`, `lr_scale` and `name`.

    Every trainable parameter is in exactly one, and the groups have a fixed order. Biases and norms (all of one dim) do
    not decay; tokens and positions do where `tokens_decay` is set: in the public codes they do in pretraining and do
    not in fine-tuning. `layer_decay` d in (0, 1]: the head has the rate `lr`, the last block of a ViT d · lr, the patch
    embedding d^(blocks + 1) · lr; None: `lr` for all. For a schedule, `set_lr` gives all groups another rate.
    `always_adapt` is for LARS: what decays is also scaled by the norms; biases and norms never are, as in MAE's code.

    The model may be wrapped by DistributedDataParallel or torch.compile. Raises UsageError for a value out of range, a
    model without trainable parameters, and a `layer_decay` for a model without `blocks.0`, `blocks.1`, … to decay over.
    """
    _check_rates(lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    named = [(WRAPPERS.sub("", name), parameter) for name, parameter in model.named_parameters()]
    layers = _layers(model)
    last = max(layers.values(), default=0)
    exempt = _exempt(model)
    if layer_decay is not None and layer_decay < 1 and not last:
        raise UsageError(
            f"layer_decay is {layer_decay:g}, and {type(model).__name__} has neither parameters named blocks.0.… nor "
            "timm's group_matcher",
            remedy="leave it out, or give a model with the names of timm",
        )
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and (tokens_decay or name not in exempt)
        layer = last if layer_decay is None else layers[name]
        scale = 1.0 if layer_decay is None else layer_decay ** (last - layer)
        kind = "decay" if decays else "no_decay"
        group = {
            "params": [],
            "lr": lr * scale,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale,
            "always_adapt": decays,
            "name": kind if layer_decay is None else f"layer_{layer:02d}_{kind}",
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    if not groups:
        raise UsageError(f"{type(model).__name__} has no parameter to train", remedy="unfreeze some: requires_grad_()")
    return [groups[key] for key in sorted(groups)]


def _check_rates(*, lr: float, weight_decay: float, layer_decay: float | None) -> None:
    for name, value, fits, range_ in (
        ("lr", lr, 0 < lr < math.inf, "above 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more"),
        ("layer_decay", layer_decay, layer_decay is None or 0 < layer_decay <= 1, "above 0 and at most 1, or None"),
    ):
        if not fits:
            raise UsageError(f"{name} is {value}", remedy=f"give a number {range_}")


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by its plain name, the first layer 0; all 0: there are no layers.

    Of a timm model by its own `group_matcher`, as in `timm.optim.param_groups_layer_decay`; else by `layer_of`.
    """
    plain = unwrapped(model)
    names = [name for name, _ in plain.named_parameters()]
    matcher = getattr(plain, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        found = group_parameters(plain, matcher(coarse=False), reverse=True)
        last = max(found.values(), default=0)
        return {name: found.get(name, last) for name in names}
    numbers = [int(block[1]) for name in names if (block := BLOCK.match(name))]
    depth = max(numbers, default=-1) + 1
    return {name: layer_of(name, depth=depth) if depth else 0 for name in names}


def _exempt(model: nn.Module) -> set[str]:
    """Parameters of more than one dim that do not decay: tokens and positions, and what a timm model names."""
    named: set[str] = getattr(unwrapped(model), "no_weight_decay", set)()
    return {*TOKENS_AND_POSITIONS, *named}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and torch.compile, in any order."""
    while True:
        children = dict(model.named_children())
        if set(children) not in ({"module"}, {"_orig_mod"}):
            return model
        [model] = children.values()


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
    """AdamW over `param_groups`, whose rates the loop sets again at every step."""
    return torch.optim.AdamW(list(groups), betas=betas, **{implementation: True})


def make_lars(groups: Iterable[dict[str, Any]], *, momentum: float) -> torch.optim.Optimizer:
    """LARS over `param_groups`: w <- w - lr · m with m <- momentum · m + q · gradient, q = 0.001 · |w| / |gradient|.

    The momentum is there from the start, as zeros, so that a checkpoint of any step has it.
    """
    from timm.optim import Lars  # brings all of timm's optimizers along, which few runs need

    return _with_momenta(Lars(list(groups), momentum=momentum))


def make_sgd(groups: Iterable[dict[str, Any]], *, momentum: float) -> torch.optim.SGD:
    """SGD over `param_groups`: w <- w - lr · m with m <- momentum · m + gradient + weight_decay · w.

    The momentum is there from the start, as `make_lars`'s.
    """
    return _with_momenta(torch.optim.SGD(list(groups), lr=0.0, momentum=momentum))


def _with_momenta(optimizer: Momentum) -> Momentum:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_maker(part: StagePart) -> MakeOptimizer | None:
    """The function that builds a stage's optimizer; None: AdamW with its `betas`, which each strategy builds itself."""
    if part.trained_by.name == "adamw":
        return None
    if part.lars_momentum is not None:
        return partial(make_lars, momentum=part.lars_momentum)
    if isinstance(part.trained_by, Sgd):
        return partial(make_sgd, momentum=part.trained_by.momentum)
    return part.trained_by.build


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its own `lr_scale` (1 without one)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
