"""A linear probe of cached features: logistic regression, to its optimum, by L-BFGS.

    minimise over W, b:   mean over the training images of loss(W f + b, y)  +  weight_decay / 2 · ‖W‖²

With the loss `ce` and weight_decay = 1 / N (the default) it is scikit-learn's LogisticRegression with C = 1. `bal_ce`
and `bal_bce` are the balanced losses of fine-tuning: the prior of the classes is in the training loss, not in the
prediction.

Not `stages.finetune.train: head`, which trains the head by steps of LARS on augmented images, as MAE's published
probes; not `livt retrain`, which replaces the head of a finished run by one trained on evenly sampled classes, and
exports it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from livt_scale.losses import make_loss
from livt_scale.losses.formulas import soft_targets
from livt_scale.posthoc.feature_set import FeatureSet, check_comparable
from livt_scale.posthoc.knn import report_of
from livt_scale.util.errors import UsageError, nearest

LOSSES = ("ce", "bal_ce", "bal_bce")  # convex, and sums over single images
MAX_LOGITS = 2**26  # computed together: 256 MB
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSettings:
    """weight_decay: None: 1 / N. max_steps: of L-BFGS."""

    loss: str = "ce"
    weight_decay: float | None = None
    max_steps: int = 500


def fitted(features: Tensor, labels: Tensor, *, num_classes: int, settings: ProbeSettings) -> tuple[nn.Linear, bool]:
    """(the linear layer for features float32 [N, D] and labels [N]; whether L-BFGS has converged)."""
    counts = torch.bincount(labels, minlength=num_classes)
    if settings.loss not in LOSSES:
        raise UsageError(f"no probe has the loss {settings.loss!r}", remedy=nearest(settings.loss, LOSSES))
    criterion = make_loss(settings.loss, counts.tolist())
    decay = 1 / len(labels) if settings.weight_decay is None else settings.weight_decay
    head = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rows = max(1, MAX_LOGITS // num_classes)
    lbfgs = torch.optim.LBFGS(
        head.parameters(), max_iter=settings.max_steps, tolerance_grad=1e-6, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        lbfgs.zero_grad()
        total = features.new_zeros(())
        for values, own in zip(features.split(rows), labels.split(rows), strict=True):
            loss = criterion(head(values), soft_targets(own, num_classes, 0.0)) * (len(own) / len(labels))
            loss.backward()
            total += loss.detach()
        penalty = decay / 2 * head.weight.square().sum()
        penalty.backward()
        return total + penalty.detach()

    lbfgs.step(closure)
    steps = lbfgs.state[next(head.parameters())]["n_iter"]
    return head.requires_grad_(False), steps < settings.max_steps


def probe_report(train: FeatureSet, evaluated: FeatureSet, *, settings: ProbeSettings) -> dict[str, Any]:
    """Accuracy on `evaluated` of the probe of `train`, as `livt eval` reports it. UsageError, DataError."""
    check_comparable(train, evaluated)
    num_classes = len(train.facts.class_names)
    head, converged = fitted(train.features, train.labels, num_classes=num_classes, settings=settings)
    if not converged:
        _log.warning("probe: not converged after %d steps of L-BFGS: give more --steps", settings.max_steps)
    how = {"method": "probe", "loss": settings.loss, "weight_decay": settings.weight_decay, "converged": converged}
    return report_of(head(evaluated.features), train, evaluated) | how
