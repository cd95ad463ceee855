"""What each parallel strategy can do: the one table that recipe checks, the planner and the engines read.

    CAPABILITIES["zero3"].ema           -> False
    supports("auto", "offload")         -> False: auto may choose ddp, which cannot
    choices("other_optimizer")          -> "ddp or fsdp"

Every strategy supports one process, fp16, torch.compile, activation checkpointing, gradient clipping and batch norm, so
these have no row. The table is here, not in `livt_scale.distributed`, because recipes are checked against it and
`livt plan` reads it without torch. To add a strategy: a column here, and its engine in `livt_scale.distributed.wrap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
Feature = Literal["offload", "hybrid", "ema", "other_optimizer", "frozen_parameters", "layer_groups"]

STRATEGIES: tuple[StrategyName, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")
AUTO: tuple[StrategyName, ...] = ("ddp", "fsdp")  # what `strategy: auto` chooses from
_ZERO_STAGES: dict[StrategyName, int] = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one strategy does and supports."""

    zero_stage: int | None  # of DeepSpeed's engine; None: torch's own

    # A rank holds only its share of these between steps. Sharded parameters are gathered in the forward pass, which
    # therefore is a collective call.
    shards_parameters: bool
    shards_gradients: bool
    shards_moments: bool

    reduces_each_micro_batch: bool  # otherwise gradients accumulate locally and are exchanged once per step

    offload: bool  # parallel.offload: cpu
    hybrid: bool  # parallel.shard_within: node
    ema: bool  # stages.finetune.ema; ZeRO-3 holds no parameter complete or as torch's shards
    other_optimizer: bool  # than AdamW: flat pieces do not give it each layer, whose norm lars needs
    frozen_parameters: bool  # stages.finetune.train other than all
    layer_groups: bool  # log.layer_groups reads the gradient of each layer, which DeepSpeed keeps to itself


_TABLE: dict[str, tuple[bool, ...]] = {
    # STRATEGIES:                  ddp    fsdp   zero1  zero2  zero3
    "shards_parameters":          (False, True,  False, False, True),
    "shards_gradients":           (False, True,  False, True,  True),
    "shards_moments":             (False, True,  True,  True,  True),
    "reduces_each_micro_batch":   (False, False, False, True,  True),
    "offload":                    (False, True,  True,  True,  True),
    "hybrid":                     (False, True,  False, False, False),
    "ema":                        (True,  True,  True,  True,  False),
    "other_optimizer":          (True,  True,  False, False, False),
    "frozen_parameters":          (True,  True,  False, False, False),
    "layer_groups":               (True,  True,  False, False, False),
}  # fmt: skip

CAPABILITIES: dict[StrategyName, Capabilities] = {
    name: Capabilities(zero_stage=_ZERO_STAGES.get(name), **{row: cells[column] for row, cells in _TABLE.items()})
    for column, name in enumerate(STRATEGIES)
}


def supports(strategy: Literal["auto", StrategyName], feature: Feature) -> bool:
    """Whether a recipe may combine `strategy` with `feature`; for "auto", whether every choice of it supports it."""
    return all(getattr(CAPABILITIES[name], feature) for name in (AUTO if strategy == "auto" else (strategy,)))


def choices(feature: Feature) -> str:
    """The strategies that support `feature`, as an error lists them."""
    *others, last = (name for name in STRATEGIES if supports(name, feature))
    return f"{', '.join(others)} or {last}" if others else last
