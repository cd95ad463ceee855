"""The arithmetic of a forward pass: matrix products in the recipe's precision, all that is sensitive in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LOW: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch's autocast to `precision` ("fp32": switched off)."""
    return torch.autocast(device.type, LOW.get(precision, torch.bfloat16), enabled=precision in LOW)


def infer(model: nn.Module, device: torch.device, precision: str, *inputs: Any, **named: Any) -> Any:
    """`model`'s output in evaluation mode; it is left in the mode it was in. The caller turns gradients off."""
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            return model(*inputs, **named)
    finally:
        model.train(was_training)
