"""Ten families of timm, each built so small that a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from livt_scale.config.model import Model

_SMALL_VIT: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {  # the recipe's part `model`, without channels
    "vit": {"timm": "vit_tiny_patch16_224", "image_px": 32, "args": _SMALL_VIT},
    "registers": {"timm": "vit_small_patch14_reg4_dinov2", "image_px": 28, "args": _SMALL_VIT},
    "dinov2": {"timm": "vit_small_patch14_dinov2", "image_px": 28, "args": _SMALL_VIT},
    "dinov3": {"timm": "vit_small_patch16_dinov3", "image_px": 32, "args": _SMALL_VIT},
    "eva02": {"timm": "eva02_tiny_patch14_224", "image_px": 28, "args": _SMALL_VIT},
    "clip": {"timm": "vit_base_patch16_clip_224", "image_px": 32, "args": _SMALL_VIT},
    "siglip": {"timm": "vit_base_patch16_siglip_224", "image_px": 32, "args": _SMALL_VIT},
    "convnext": {"timm": "convnext_atto", "image_px": 32, "args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}},
    "swin": {
        "timm": "swin_tiny_patch4_window7_224",
        "image_px": 32,
        "args": {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    },
    "efficientnet": {"timm": "test_efficientnet", "image_px": 32},
}


def family(name: str, **changes: Any) -> Model:
    return Model.model_validate({**FAMILIES[name], "channels": 1, **changes})


def families(ordinary: Iterable[str]) -> list[Any]:
    """All names for `parametrize`: those in `ordinary` in the ordinary suite, the others in the slow one."""
    return [pytest.param(name, marks=() if name in ordinary else pytest.mark.slow) for name in FAMILIES]
