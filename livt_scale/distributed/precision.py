"""Precision: matrix products in the recipe's precision by autocast, sensitive operations in fp32; fp16's loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LOW: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_SCALE = 1.0  # at this scale, a gradient that is not finite is not the scale's fault
GROWTH_INTERVAL = 2000  # steps


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch's autocast to `precision` ("fp32": switched off)."""
    return torch.autocast(device.type, LOW.get(precision, torch.bfloat16), enabled=precision in LOW)


def infer(model: nn.Module, device: torch.device, precision: str, *inputs: Any, **named: Any) -> Any:
    """`model`'s output in evaluation mode; its mode is restored. The caller turns gradients off."""
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            return model(*inputs, **named)
    finally:
        model.train(was_training)


@dataclass
class DynamicScale:
    """fp16's dynamic loss scale as a rule on numbers, for engines that do not use torch's GradScaler.

    The rule and its constants are GradScaler's, so that a run may change the strategy: start at 65536; halve if a
    gradient is not finite, and skip that step; double after 2000 steps without one.
    """

    value: float = 65536.0
    good_steps: int = 0

    def note(self, *, finite: bool) -> bool:
        """Adapt after a step; True if its gradient was not finite because of the scale."""
        at_fault = not finite and self.value > LOWEST_SCALE
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
        return at_fault

    def saved(self) -> dict[str, float]:
        return {"scale": self.value, "good_steps": self.good_steps}
