"""τ-normalisation: each class's row of the head divided by its norm to the power τ. Nothing is trained.

    w_c ← w_c / ‖w_c‖^τ        τ = 0: as it was;  τ = 1: rows of norm 1

A classifier trained on a long tail has larger rows for larger classes; less of that norm favours the rare ones. The
bias is dropped, as in the paper, unless it is asked to stay. The features of the evaluation set are computed once, and
each τ costs one matrix product.

Source: Kang et al. 2020, Decoupling Representation and Classifier, arXiv 1910.09217, section 4.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.evaluation.holdout import half_rows
from livt_scale.export.write_export import check_target, write_export
from livt_scale.models.classifier import head_of
from livt_scale.posthoc import features
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import UsageError

TAUS = tuple(k / 10 for k in range(21))


def normalised(weight: Tensor, tau: float) -> Tensor:
    """Rows of `weight` float [C, D] over their norm^τ. A row of zeros stays."""
    norms = weight.norm(dim=1, keepdim=True)  # [C, 1]
    return torch.where(norms > 0, weight / norms.clamp_min(torch.finfo(weight.dtype).tiny) ** tau, weight)


def tau_normalise(
    source: Path,
    out: Path,
    *,
    taus: Sequence[float] = TAUS,
    keep_bias: bool = False,
    data: str | None = None,
    which: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Export the classifier of `source` (a run or an export) with the τ of `taus` that is best on half of `data`.

    Returns what was tried there (`sweep`), and `before` and `after` on the other half. Ties go to the smaller τ.
    """
    if not taus or any(not 0 <= tau < 100 for tau in taus):
        raise UsageError(f"--tau {', '.join(map(str, taus)) or 'none'}: give numbers from 0 up")
    check_target(out)
    trained = open_trained(source, which=which)
    head = head_of(trained.model)
    check_target(out, weights={**trained.weights, "baseline": {"method": "tau-norm"}}, force=force)
    shards = features.held_out_set(trained, source, data)
    outputs = features.features(trained, shards)
    rows = half_rows(outputs.labels.numpy())
    choosing, reporting = (outputs.rows(part) for part in rows)
    bias = head.bias.detach()

    def logits(values: Tensor, tau: float) -> Tensor:
        scores = values @ normalised(head.weight.detach(), tau).T
        return scores + bias if keep_bias else scores

    about = (trained.classes, trained.recipe)
    sweep = [
        {"tau": tau, "mean_class": features.mean_class_accuracy(logits(choosing.values, tau), choosing.labels, *about)}
        for tau in sorted(set(taus))
    ]
    best = max(sweep, key=lambda row: row["mean_class"])["tau"]  # the first of equals
    as_trained = reporting.values @ head.weight.detach().T + bias
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        new_head = head_of(model)
        new_head.weight.copy_(normalised(head.weight, best))
        if not keep_bias:
            new_head.bias.zero_()
    halves = features.about_halves(shards, *rows)
    made = {"method": "tau-norm", "tau": best, "bias": "kept" if keep_bias else "dropped", "held_out": halves}
    calibration = features.calibration(logits(outputs.values, best), outputs.labels, shards)
    weights = {**trained.weights, "baseline": made}
    write_export(replace(trained, model=model, weights=weights, calibration=calibration), out, force=force)
    return {
        "out": str(out),
        **made,
        "sweep": sweep,
        "before": features.figures(as_trained, reporting.labels, *about)["top1"],
        "after": features.figures(logits(reporting.values, best), reporting.labels, *about)["top1"],
    }
