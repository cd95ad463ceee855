"""Outputs made by hand: logits of a classifier that is right now and then, more so for the first classes."""

from __future__ import annotations

from typing import Any

import torch

from livt_scale.evaluation.logits import About, Outputs

NAMES = ("head", 'two\nlines "quoted", with comma', "<script>alert(1)</script>", "tail & more", "名前")
COUNTS = (900, 120, 60, 19, 1)


def outputs(
    size: int = 400, *, counts: tuple[int, ...] = COUNTS, seed: int = 0, loss: str = "ce", **facts: Any
) -> Outputs:
    num_classes = len(counts)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (size,), generator=generator)
    logits = torch.randn(size, num_classes, generator=generator)
    logits[torch.arange(size), labels] += 2.0 - 1.5 * labels / num_classes
    names = NAMES if num_classes == len(NAMES) else tuple(f"class {c}" for c in range(num_classes))
    about = About(
        names,
        counts,
        many_over=100,
        few_under=20,
        loss=loss,
        logit_scale=30.0 if loss == "ldam" else 1.0,
        facts={
            "precision": "fp32",
            "views": {"number": 1, "average": "logits"},
            "data": {"folder": "shards/val", "manifest_digest": "a" * 64, "num_samples": size},
            "weights": {"checkpoint": "step-00000080", "read_from": "runs/try", "recipe_digest": "b" * 64},
            **facts,
        },
    )
    return Outputs(logits, labels, tuple(f"img-{i:05d}" for i in range(size)), about)
